"""merge and unmerge: checked, undone on failure, refused where it would be wrong."""

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from loratory.runtime.merge import TOLERANCES
from tests.laws.kinds import move, plain_state, same
from tests.runtime.models import IDS, Tiny


def tuned(dtype: torch.dtype = torch.float32) -> Tiny:
    model = Tiny().to(dtype).eval()
    lt.adapt(model, lt.LoRA(rank=2, alpha=3), "attention")
    move(model)
    return model


def test_tolerances():
    expected = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
    assert expected == TOLERANCES


def test_merge_unmerge_returns_the_bits():
    model = tuned(torch.bfloat16)
    base, before = plain_state(model), model(IDS)
    check = lt.merge(model, probe=IDS)
    assert not same(plain_state(model), base)
    lt.unmerge(model)
    assert same(plain_state(model), base)
    assert torch.equal(model(IDS), before)
    assert (check.dtype, check.tolerance, check.probe) == ("bfloat16", 2e-2, "the model's output")
    assert "of the output's range (allowed 0.02)" in str(check)


@pytest.mark.parametrize("probe", [IDS, (IDS,), {"ids": IDS}], ids=["tensor", "tuple", "mapping"])
def test_probes(probe):
    assert lt.merge(tuned(), probe=probe).probe == "the model's output"


def test_without_a_probe_every_layer_is_tried():
    check = lt.merge(tuned())
    assert check.probe.startswith("layer 'blocks.")
    assert 0 < check.relative <= 1e-5


def test_a_transformers_model_has_its_own_probe(stories):
    model = stories()
    lt.adapt(model, lt.LoRA(rank=4))
    move(model)
    check = lt.merge(model)
    assert check.probe == "the model's output"
    assert 0 < check.relative <= 1e-5


def test_merging_twice_is_refused():
    model = tuned()
    lt.merge(model, probe=IDS)
    merged = plain_state(model)
    with pytest.raises(RuntimeError, match=r"the model is merged already with default; call loratory.unmerge\(model\)"):
        lt.merge(model, probe=IDS)
    assert same(plain_state(model), merged)


def test_unmerge_without_merge_is_refused():
    with pytest.raises(RuntimeError, match="the model is not merged; there is nothing to unmerge"):
        lt.unmerge(tuned())


def test_merging_no_adapter_is_refused():
    model = tuned()
    lt.use(model)
    with pytest.raises(ValueError, match=r"no adapter is active; choose among default with loratory.use"):
        lt.merge(model, probe=IDS)


def test_without_the_base_a_plain_model_is_left():
    model = tuned()
    before = model(IDS)
    lt.merge(model, probe=IDS, keep_base=False)
    plain = Tiny().eval()
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(IDS), before)
    with pytest.raises(ValueError, match="this Tiny has no adapters"):
        lt.unmerge(model)
    lt.adapt(model, lt.LoRA(rank=2))


def test_a_failed_check_restores_the_bits():
    model = tuned()
    base, before = plain_state(model), model(IDS)
    with pytest.raises(RuntimeError, match=r"merge check on the model's output.*allowed 1e-12\); the merge was undone"):
        lt.merge(model, probe=IDS, tolerance=1e-12)
    assert same(plain_state(model), base)
    assert torch.equal(model(IDS), before)
    assert all(not layer.merged for layer in layers_of(model).values())
    lt.merge(model, probe=IDS)


def test_a_broken_adapter_is_not_merged():
    model = tuned()
    base = plain_state(model)
    with torch.no_grad():
        layers_of(model)["blocks.1.attn.v_proj"]["default"].B[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"layer 'blocks.1.attn.v_proj': the merged weight holds NaN or infinity"):
        lt.merge(model)
    assert same(plain_state(model), base)


def test_a_method_whose_merge_is_wrong_is_caught():
    class Wrong(lt.LoRA):
        """Wrong: a merge that is not its forward."""

        def weight(self, t, W):
            return W + 1.01 * self.delta(t)

        def forward(self, t, x, base, site):
            B, s, A = self.factors(t)
            return base(x) + s * site.up(site.down(x, A), B)

    model = Tiny().eval()
    lt.adapt(model, Wrong(rank=2), "attention")
    move(model)
    base = plain_state(model)
    with pytest.raises(RuntimeError, match="the merge was undone"):
        lt.merge(model, probe=IDS)
    with pytest.raises(RuntimeError, match=r"merge check on layer 'blocks.*the merge was undone"):
        lt.merge(model)
    assert same(plain_state(model), base)


def test_training_mode_returns_after_the_probe():
    model = tuned().train()
    model.blocks[0].eval()
    flags = [m.training for m in model.modules()]
    lt.merge(model, probe=IDS)
    assert [m.training for m in model.modules()] == flags


def test_a_tied_weight_is_refused_or_parted(stories):
    model = stories()
    lt.adapt(model, lt.LoRA(rank=2), "lm_head")
    move(model)
    ids = torch.tensor([[1, 5, 9]])
    before, base = model(ids).logits, model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(ValueError, match=r"layer 'lm_head' shares its weight with 'model.embed_tokens'.*untie=True"):
        lt.merge(model)
    assert model.config.tie_word_embeddings is True
    lt.merge(model, untie=True, keep_base=False)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.model.embed_tokens.weight, base)
    assert not torch.equal(model.lm_head.weight, base)
    assert model.config.tie_word_embeddings is False


def test_unmerging_a_parted_weight_ties_it_again(stories):
    model = stories()
    lt.adapt(model, lt.LoRA(rank=2), "lm_head")
    move(model)
    lt.merge(model, untie=True)
    lt.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert torch.equal(model.lm_head.weight, stories().lm_head.weight)


def test_the_merged_state_is_visible():
    model = tuned()
    assert "merged=False" in repr(model.blocks[0].attn["q_proj"])
    lt.merge(model, probe=IDS)
    assert "merged=True" in repr(model.blocks[0].attn["q_proj"])


def test_a_merged_model_has_no_extra_products():
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    lt.adapt(model, lt.LoRA(rank=2), "0")
    move(model)
    x = torch.randn(2, 4)
    lt.merge(model, probe=x)
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
