"""The contract of vision sites: what virtual tokens do to outputs, modes, rows, recomputed blocks and other adapters."""

import copy
import pickle

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.runtime.layer import layers_of
from tests.laws.bodies import PATCHES, PIXELS, VISION, Case, bert, deit, outputs, vit
from tests.laws.kinds import move, same
from tests.runtime.test_row_groups import gradients
from tests.runtime.test_rows import alone

VPT = lt.VPT(tokens=3)
FOUR = torch.cat([PIXELS, 2 * PIXELS.flip(3)])
SERVED = ["long", None, "short", "lora"]
every = pytest.mark.parametrize("make", VISION.values(), ids=VISION)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every
def test_outputs_have_no_entries_of_virtual_tokens(make):
    model = Case(make, VPT).plain()
    model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    plain = model(PIXELS, **asked)
    lt.adapt(model, VPT)
    out = model(PIXELS, **asked)
    assert [h.shape for h in out.hidden_states] == [h.shape for h in plain.hidden_states]
    assert torch.equal(out.hidden_states[0], plain.hidden_states[0])
    assert not torch.allclose(out.hidden_states[1], plain.hidden_states[1])
    for ours, theirs in zip(out.attentions, plain.attentions, strict=True):
        assert ours.shape == (*theirs.shape[:3], theirs.shape[3] + 3)  # the keys stay
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]))
    parts = model(PIXELS, return_dict=False, **asked)
    assert torch.equal(parts[0], out[0])
    assert [h.shape for h in parts[-2]] == [h.shape for h in plain.hidden_states]


def test_a_mask_that_the_body_made_itself_is_not_taken():
    """Some attentions, and older versions when they are compiled, are given one of the rows without virtual tokens."""
    model = Case(deit, VPT).plain()
    lt.adapt(model, VPT)
    move(model)
    wanted = model(PIXELS).logits
    seen = []

    def masked(module, args, kwargs):
        rows = args[0].shape[1] - (0 if module is model.deit.layers[0] else 3)
        seen.append(rows)
        return (args[0], torch.ones(1, 1, rows, rows, dtype=torch.bool)), kwargs

    for block in model.deit.layers:
        block.register_forward_pre_hook(masked, with_kwargs=True, prepend=True)
    close(model(PIXELS).logits, wanted)
    assert seen == [6] * len(model.deit.layers)


def test_virtual_tokens_stand_between_class_token_and_patches_in_every_block():
    model = Case(deit, VPT).plain()
    seen: list[torch.Tensor] = []
    for block in model.deit.layers:
        block.layernorm_before.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    outputs(model)
    plain, seen[:] = list(seen), []
    lt.adapt(model, VPT)
    move(model)
    (P,) = lt.trained(model).values()
    outputs(model)
    close(seen[0], torch.cat([plain[0][:, :1], P[0].expand(2, -1, -1), plain[0][:, 1:]], 1))
    for block, x in enumerate(seen):
        assert x.shape[1] == 3 + 2 + 4  # prompts; DeiT's class and distillation tokens; patches
        close(x[:, 1:4], P[block].expand(2, -1, -1))


@pytest.mark.parametrize("make", [vit, VISION["DINOv3"]], ids=["ViT", "DINOv3"])
def test_the_frozen_body_drops_nothing(make):
    model = Case(make, VPT).plain()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.5
        if hasattr(m, "attention_dropout"):
            m.attention_dropout = 0.5
    model.train()
    before = {n: m.training for n, m in model.named_modules()}
    lt.adapt(model, VPT)
    lt.adapt(model, lt.LoRA(rank=2, dropout=0.5), "q_proj", name="low")
    move(model)
    lt.use(model, "default")
    quiet = outputs(model)
    assert model.training
    assert torch.equal(outputs(model), quiet)
    assert torch.equal(outputs(model.eval()), quiet)
    lt.use(model, "default", "low")
    assert torch.equal(outputs(model), outputs(model))
    assert not torch.equal(outputs(model.train()), outputs(model))  # the other adapter's own dropout
    lt.detach(model)
    assert {n: m.training for n, m in model.named_modules()} == before
    if make is vit:
        assert not torch.equal(outputs(model), outputs(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_give_the_same_gradients(reentrant):
    def run(checkpointed):
        model = Case(vit, VPT).plain(torch.float64)
        lt.adapt(model, lt.VPT(tokens=3), also_train="classifier", seed=1)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:  # whose blocks learn nothing without it, where transformers (up to 5.17) runs hooks inside what is recomputed
            model.enable_input_require_grads()
        calls = []
        model.vit.layers[1].mlp.register_forward_pre_hook(lambda *call: calls.append(1))
        outputs(model).square().sum().backward()
        assert len(calls) == (2 if checkpointed else 1)
        return {n: p.grad for n, p in lt.trained(model).items()}

    plain, again = run(False), run(True)
    assert set(plain) == set(again)
    for n, gradient in plain.items():
        torch.testing.assert_close(again[n], gradient, rtol=1e-10, atol=1e-12)


def test_each_row_has_its_own_virtual_tokens():
    model = Case(vit, VPT).plain(torch.float64)
    for i, (name, method) in enumerate(
        {"long": VPT, "short": lt.VPT(tokens=1, deep=False), "lora": lt.LoRA(rank=2)}.items()
    ):
        lt.adapt(model, method, name=name, seed=i)
        move(model, seed=i)
    x = FOUR.double()
    wanted = alone(model, SERVED, lambda i: model(x[i : i + 1]).logits)
    slow = gradients(model, wanted)
    with lt.rows(model, SERVED):
        out = model(x).logits
        close(out, wanted)
        fast = gradients(model, out)
    assert set(slow) == set(fast)
    assert {n.split("loratory.")[1].split(".")[0] for n in slow} == {"long", "short", "lora"}
    for n in slow:
        torch.testing.assert_close(fast[n], slow[n], rtol=1e-6, atol=1e-8)
    with lt.rows(model, ["long"] * 4):
        close(model(x).logits[:1], wanted[:1])


def test_beside_a_low_rank_adapter():
    model = Case(vit, VPT).adapted(name="virtual")
    alone = outputs(model)
    lt.adapt(model, lt.LoRA(rank=2), name="low")
    move(model)
    low = outputs(model)
    lt.use(model, "virtual", "low")
    assert not torch.allclose(outputs(model), low)
    assert not torch.allclose(outputs(model), alone)
    lt.use(model, "virtual")
    assert torch.equal(outputs(model), alone)
    lt.use(model, "low")
    lt.merge(model, keep_base=False)
    assert not layers_of(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    close(outputs(model), low)


def test_a_trained_head_is_saved_beside_and_fits_its_base_alone(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    model = Case(vit, VPT).plain()
    lt.adapt(model, VPT, also_train="classifier")
    move(model)
    model(PIXELS, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in lt.trained(model).values())
    lt.save(model, tmp_path)
    again = Case(vit, VPT).plain()
    lt.load(again, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    for changed, message in (
        ({"num_hidden_layers": 2}, r"parameter 'vit.layers.2.* does not have; load the base it was made for"),
        ({"hidden_size": 8}, r"'vit.embeddings.cls_token' is \(1, 1, 8\) here, but \(1, 1, 16\) in the adapter's base"),
        ({"patch_size": 2}, r"here, but .* in the adapter's base; load the base it was made for"),
    ):
        with pytest.raises(ValueError, match=message):
            lt.load(ViTForImageClassification(ViTConfig(**PATCHES | changed, num_labels=3)), tmp_path)


def test_pickled_and_copied_models_keep_their_virtual_tokens():
    model = Case(vit, VPT).adapted()
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(outputs(twin), outputs(model))
    lt.detach(copy.deepcopy(model))
    assert torch.equal(outputs(twin), outputs(model))
    lt.detach(twin)
    assert same(twin.state_dict(), Case(vit, VPT).plain().state_dict())


def test_what_cannot_be_is_refused():
    model = Case(vit, VPT).adapted(name="a")
    lt.adapt(model, lt.VPT(tokens=1), name="b")
    with pytest.raises(ValueError, match="'a' and 'b' both put virtual tokens into the model; activate one"):
        lt.use(model, "a", "b")
    with pytest.raises(ValueError, match=r"mix holds 0.5 for adapter 'a', whose virtual tokens cannot be weighed"):
        lt.use(model, "a", mix=[0.5])
    with pytest.raises(RuntimeError, match=r"VPT: the call has an attention_mask over patches.*leave it out"):
        model.vit(PIXELS, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"Input image size \(12\*12\) doesn't match model"):
        model(torch.zeros(1, 3, 12, 12))
    for error, make, options, message in (
        (ValueError, vit, {"exclude": "q_proj"}, "acts on the whole model, so exclude= and blocks="),
        (ValueError, vit, {"where": "q_proj"}, "acts on one body, but where='q_proj' names 3 modules"),
        (TypeError, vit, {"where": "classifier"}, r"'classifier' \(Linear\) is no body of a transformers vision model"),
        (TypeError, bert, {}, r"'bert' \(BertModel\) is no body of a transformers vision model"),
        (TypeError, lambda: nn.Sequential(nn.Linear(3, 3)), {}, "is a Sequential, but the method puts virtual tokens"),
    ):
        with pytest.raises(error, match=message):
            lt.adapt(make(), VPT, **options)
    with pytest.raises(TypeError, match=r"'vit'.* is no body of a transformers text model"):
        lt.adapt(vit(), lt.PromptTuning(tokens=2))


def test_the_image_part_of_a_model_of_several():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = sizes | {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 8, "patch_size": 4})).eval()
    with pytest.raises(ValueError, match=r"name the one that reads images with where=, .* where='vision_model'"):
        lt.adapt(model, VPT)
    before = model.get_image_features(pixel_values=PIXELS)[1]
    lt.adapt(model, VPT, where="vision_model")
    assert list(layers_of(model)) == ["vision_model"]
    after = model.get_image_features(pixel_values=PIXELS)[1]
    assert after.shape == before.shape
    assert not torch.allclose(after, before)
