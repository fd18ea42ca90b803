"""Switching, mixing, switching off; trained copies follow."""

import pytest
import torch
from torch import nn

import loratory as lt
from tests.laws.kinds import move
from tests.runtime.models import IDS, Tiny


def two() -> Tiny:
    model = Tiny().eval()
    lt.adapt(model, lt.LoRA(rank=2, alpha=3), "attention", name="a")
    move(model, seed=1)
    lt.adapt(model, lt.DoRA(rank=3), "mlp, q_proj", name="b")
    move(model, seed=2)
    return model


def test_the_newest_adapter_is_active_and_use_switches():
    model = two()
    assert (lt.active(model), lt.adapters(model)) == (("b",), ("a", "b"))
    b = model(IDS)
    lt.use(model, "a")
    a = model(IDS)
    lt.use(model)
    base = model(IDS)
    assert torch.equal(base, Tiny().eval()(IDS))
    assert lt.active(model) == ()
    lt.use(model, "b")
    assert torch.equal(model(IDS), b)
    assert not torch.equal(a, b)


def test_order_of_names_does_not_matter():
    model = two()
    lt.use(model, "a", "b", mix=[0.3, 0.9])
    one = model(IDS)
    lt.use(model, "b", "a", mix=[0.9, 0.3])
    torch.testing.assert_close(model(IDS), one)


def test_a_mix_of_one_and_nothing_is_that_one():
    model = two()
    lt.use(model, "a")
    a = model(IDS)
    lt.use(model, "a", "b", mix=[1.0, 0.0])
    torch.testing.assert_close(model(IDS), a)
    lt.use(model, "a", mix=[0.0])
    torch.testing.assert_close(model(IDS), Tiny().eval()(IDS))


def test_switching_does_not_change_what_is_trained():
    model = two()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    lt.use(model, "a")
    lt.use(model)
    lt.use(model, "a", "b", mix=[0.5, 0.5])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_disabled_is_the_base_and_ends_even_after_an_error():
    model = two()
    lt.use(model, "a", "b", mix=[0.3, 0.9])
    mixed = model(IDS)
    with lt.disabled(model):
        assert lt.active(model) == ()
        assert torch.equal(model(IDS), Tiny().eval()(IDS))
    assert torch.equal(model(IDS), mixed)
    with pytest.raises(ZeroDivisionError), lt.disabled(model):
        _ = 1 / 0
    assert lt.active(model) == ("a", "b")
    assert torch.equal(model(IDS), mixed)


@pytest.mark.parametrize(
    ("names", "mix", "message"),
    [
        (("c",), None, r"there is no adapter 'c'; the model has: "),
        (("a", "a"), None, r"the names \('a', 'a'\) repeat one; name each adapter once and weigh it with mix="),
        (("a", "b"), [0.5], r"mix holds 1 weights for 2 adapters \(a, b\); give one each"),
        (("a",), [float("nan")], r"mix holds nan for adapter 'a'; each weight must be a finite number"),
    ],
)
def test_refusals(names, mix, message):
    model = two()
    with pytest.raises(ValueError, match=message):
        lt.use(model, *names, mix=mix)
    assert lt.active(model) == ("b",)


def test_switching_a_merged_model_is_refused():
    model = two()
    lt.merge(model, probe=IDS)
    with pytest.raises(RuntimeError, match=r"merged with b; call loratory.unmerge\(model\) before switching adapters"):
        lt.use(model, "a")
    with pytest.raises(RuntimeError, match=r"the model is merged"), lt.disabled(model):
        pass
    with pytest.raises(RuntimeError, match=r"the model is merged; call loratory.unmerge\(model\) before adding"):
        lt.adapt(model, lt.LoRA(rank=2), name="c")


def test_modules_trained_in_full_follow_the_adapter():
    model = Tiny().eval()
    base = model(IDS)
    lt.adapt(model, lt.LoRA(rank=2), "q_proj", name="a", also_train="head")
    move(model, seed=1)
    a, head = model(IDS), model.head.weight.detach().clone()
    lt.adapt(model, lt.LoRA(rank=2), "q_proj", name="b")
    move(model, seed=2)
    assert not torch.equal(model.head.weight, head)  # b has no copy: the base's own head
    lt.use(model, "a")
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model(IDS), a)
    with lt.disabled(model):
        assert torch.equal(model(IDS), base)
    lt.detach(model)
    assert torch.equal(model(IDS), base)
    assert not any("loratory" in n for n, _ in model.named_modules())


def test_a_tied_embedding_follows_its_copy(stories):
    model = stories()
    base = model.model.embed_tokens.weight.detach().clone()
    lt.adapt(model, lt.LoRA(rank=2), "q_proj", also_train="embed_tokens")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    names = [n for n in lt.trained(model) if n.startswith("also_train")]
    assert names == ["also_train/model.embed_tokens.weight"]
    assert "one tied weight" in str(lt.summary(model))
    model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    torch.optim.SGD(lt.param_groups(model, lr=0.1)).step()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, base)
    lt.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, base)


def test_also_train_parts_a_tied_weight_when_told(stories):
    model = stories()
    lt.adapt(model, lt.LoRA(rank=2), "q_proj", also_train="lm_head", untie=True)
    move(model)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.equal(model.model.embed_tokens.weight, stories().model.embed_tokens.weight)
    assert model.config.tie_word_embeddings is False
    lt.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize(
    ("bias", "count"),
    [("none", 0), ("adapted", 2), ("lora_only", 2), ("all", 2 * 6 + 1)],  # no bias in down_proj
)
def test_bias_options(bias: str, count: int):
    model = Tiny()
    lt.adapt(model, "lora", where="q_proj", rank=2, bias=bias)
    trained = [n for n in lt.trained(model) if n.endswith(".bias")]
    assert len(trained) == count
    if bias in ("adapted", "lora_only"):
        assert trained == [f"also_train/blocks.{i}.attn.q_proj.bias" for i in (0, 1)]
    before = {n: p.detach().clone() for n, p in Tiny().named_parameters()}
    move(model)
    lt.detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_biases_of_a_second_adapter_are_the_models_own():
    model = Tiny()
    for name in ("a", "b"):
        lt.adapt(model, lt.LoRA(rank=2), "q_proj", bias="all", name=name)
    assert len([n for n in lt.trained(model) if n.startswith("also_train")]) == 2 * 6 + 1
    assert not any("loratory" in n for n in lt.trained(model))


def test_a_trained_bias_is_used_and_merged():
    model = Tiny().eval()
    lt.adapt(model, lt.DoRA(rank=2), "q_proj", bias="adapted")
    move(model)
    before = model(IDS)
    lt.merge(model, probe=IDS)
    torch.testing.assert_close(model(IDS), before)
    lt.unmerge(model)
    torch.testing.assert_close(model(IDS), before)


def test_buffers_of_a_module_trained_in_full_are_the_adapters_own():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    mean = model[1].running_mean.clone()
    lt.adapt(model, lt.LoRA(rank=2), "0", also_train="1")
    model.train()(torch.randn(8, 3) + 5)
    assert not torch.equal(model[1].running_mean, mean)
    lt.use(model)
    assert torch.equal(model[1].running_mean, mean)
