"""The laws of the baselines: full fine-tuning, the head alone, nothing."""

import pytest
import torch
from torch import nn

import loratory as lt
from tests.laws.kinds import move, plain_state, same


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.conv(x))).flatten(1)


class Classifier(nn.Module):
    """A body and a head, in transformers' form."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Body()
        self.classifier = nn.Linear(4 * 6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.base_model(x))


def make() -> Classifier:
    torch.manual_seed(1)
    return Classifier()


HEAD = {"classifier.weight", "classifier.bias"}
TRAINED = {"full": {n for n, _ in make().named_parameters()}, "head-only": HEAD, "frozen": set()}
each = pytest.mark.parametrize("name", TRAINED)


@each
def test_trains_exactly_what_it_says(name: str):
    model, x = make(), torch.randn(7, 3, 8)
    lt.adapt(model, name)
    assert set(lt.trained(model)) == {f"also_train/{n}" for n in TRAINED[name]}
    assert {n for n, p in model.named_parameters() if p.requires_grad and "loratory" not in n} == TRAINED[name]
    out = model(x).square().sum()
    assert out.requires_grad == (name != "frozen")
    if out.requires_grad:
        out.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and "loratory" not in n} == TRAINED[name]
    sizes = {n: p.numel() for n, p in make().named_parameters()}
    assert lt.summary(model).trained == sum(sizes[n] for n in TRAINED[name])
    assert lt.summary(model).total == sum(sizes.values())


@each
def test_function_is_unchanged_at_the_start_and_restored_at_the_end(name: str):
    model, base, x = make(), make(), torch.randn(7, 3, 8)
    lt.adapt(model, name)
    assert same(plain_state(model), base.state_dict())
    assert torch.equal(model.eval()(x), base.eval()(x))
    optimizer = torch.optim.SGD(lt.param_groups(model, lr=0.1)) if TRAINED[name] else None
    model.train()(x).square().sum().backward() if optimizer else model.train()(x)
    if optimizer:
        optimizer.step()
        changed = {n for n, p in base.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])}
        assert changed == TRAINED[name]
    lt.detach(model)
    if name == "full":  # the running statistics were a copy, too
        assert same(model.state_dict(), base.state_dict())
    assert same(dict(model.named_parameters()), dict(base.named_parameters()))
    assert all(p.requires_grad for p in model.parameters())


@each
def test_save_and_load_give_the_same_bits(name: str, tmp_path):
    model, again, x = make(), make(), torch.randn(7, 3, 8)
    lt.adapt(model, name)
    move(model)
    lt.save(model, tmp_path)
    lt.load(again, tmp_path)
    assert same(plain_state(model), plain_state(again))
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_full_and_lora_stay_apart():
    model, x = make().eval(), torch.randn(7, 3, 8)
    base = model(x)
    lt.adapt(model, lt.LoRA(rank=2), "conv", name="small")
    move(model)
    small = model(x)
    lt.adapt(model, "full", name="large")
    move(model)
    assert not torch.equal(model(x), base)
    lt.use(model, "small")
    assert torch.equal(model(x), small)
    lt.use(model)
    assert torch.equal(model(x), base)


def test_merging_full_leaves_its_weights():
    model, x = make().eval(), torch.randn(7, 3, 8)
    lt.adapt(model, "full")
    move(model)
    tuned, weights = model(x), plain_state(model)
    lt.merge(model, probe=x, keep_base=False)
    assert torch.equal(model(x), tuned)
    assert same(model.state_dict(), weights)


def test_a_mix_of_full_models_is_the_weighted_sum_of_their_changes():
    model = make()
    W = model.classifier.weight.detach().clone()
    lt.adapt(model, "full", name="a")
    move(model, seed=1)
    a = model.classifier.weight.detach() - W
    lt.adapt(model, "full", name="b")
    move(model, seed=2)
    b = model.classifier.weight.detach() - W
    lt.use(model, "a", "b", mix=[0.7, -0.4])
    torch.testing.assert_close(model.classifier.weight.detach(), W + 0.7 * a - 0.4 * b)


def test_head_only_needs_a_head():
    with pytest.raises(ValueError, match=r"no output head.*also_train="):
        lt.adapt(Body(), "head-only")
    model = Body()
    lt.adapt(model, "head-only", also_train="norm")
    assert set(lt.trained(model)) == {"also_train/norm.weight", "also_train/norm.bias"}


def test_head_only_refuses_a_head_tied_to_the_input(stories):
    model = stories()
    with pytest.raises(ValueError, match=r"'lm_head.weight' is also 'model.embed_tokens.weight'.*untie them first"):
        lt.adapt(model, "head-only")
    assert not hasattr(model, "_loratory_state")
