"""Collected gradients: the sums, the byte budget, and that everything is afterwards as before."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import loratory as lt
from loratory.runtime import collect as module
from loratory.runtime.layer import layers_of
from tests.laws.kinds import square
from tests.runtime.models import IDS, tiny_bert


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.norm, self.drop, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.norm(self.a(x))))


def by_hand(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    model.train()
    for x in batches:
        (square(model, x) / len(x)).backward()
    return {name: model.get_submodule(name).weight.grad for name in ("a", "b")}


def test_the_sum_of_the_batches_gradients_over_their_rows():
    batches = list(torch.randn(10, 6).split(4))
    torch.manual_seed(3)
    expected = by_hand(Net(), batches)
    torch.manual_seed(3)
    seen = lt.collect(Net(), batches, square)
    assert (seen.samples, seen.passes, seen.what) == (10, 1, ("gradient",))
    for name, gradient in expected.items():
        torch.testing.assert_close(seen.of(name).gradient, gradient)


def test_so_many_samples_and_the_last_batch_cut():
    x = torch.randn(10, 6)
    torch.manual_seed(3)
    expected = by_hand(Net(), [x[:4], x[4:7]])
    torch.manual_seed(3)
    seen = lt.collect(Net(), x.split(4), square, samples=7)
    assert seen.samples == 7
    torch.testing.assert_close(seen.of("a").gradient, expected["a"])
    model = tiny_bert()
    batch = {"input_ids": IDS, "labels": torch.arange(len(IDS)) % 2}
    whole = lt.collect(model, [batch], samples=1, where="query")
    cut = lt.collect(model, [{k: v[:1] for k, v in batch.items()}], where="query")
    name = next(iter(whole.layers))
    assert torch.equal(whole.of(name).gradient, cut.of(name).gradient)


@pytest.mark.parametrize("once", [False, True], ids=["list", "iterator"])
def test_a_small_budget_takes_more_passes_and_gives_the_same_bits(once: bool, monkeypatch: pytest.MonkeyPatch):
    batches = list(torch.randn(10, 6).split(4))
    whole = lt.collect(Net(), batches, square)
    alive, most, right = weakref.WeakSet(), [], torch.zeros

    def zeros(*args, **options):
        made = right(*args, **options)
        if made.numel() >= 24:
            alive.add(made)
        most.append(sum(t.numel() * t.element_size() for t in list(alive)))
        return made

    monkeypatch.setattr(module.torch, "zeros", zeros)
    seen = lt.collect(Net(), iter(batches) if once else batches, square, budget=2 * 4 * 48)
    monkeypatch.undo()
    assert max(most) <= 4 * 48
    assert (seen.passes, seen.samples) == (2, 10)
    for name in ("a", "b"):
        assert torch.equal(seen.of(name).gradient, whole.of(name).gradient)
    folder = seen.folder.path
    assert sorted(kept.name for kept in folder.iterdir()) == ["0", "1"]
    del seen
    assert not folder.exists()
    with pytest.raises(
        ValueError, match=r"layer 'a' needs 384 bytes for what is collected of it, but the budget is 300"
    ):
        lt.collect(Net(), batches, square, budget=300)


def test_everything_is_as_before():
    model = Net().eval()
    model.a.requires_grad_(False)
    model.b.weight.grad = torch.ones(3, 8)
    lt.adapt(model, lt.LoRA(rank=2), "a", name="there")
    mode = {n: m.training for n, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    loader = DataLoader(list(torch.randn(10, 6)), 4, shuffle=True, generator=torch.Generator().manual_seed(5))
    order = [x.clone() for x in loader]
    loader.generator.manual_seed(5)
    cpu = torch.get_rng_state()
    seen = lt.collect(model, loader, square, budget=2 * 4 * 48)
    assert torch.equal(torch.get_rng_state(), cpu)
    assert seen.passes == 2
    assert all(torch.equal(a, b) for a, b in zip(order, loader, strict=True))
    assert {n: m.training for n, m in model.named_modules()} == mode
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.b.weight.grad, torch.ones(3, 8))
    assert model.a.weight.grad is None
    assert lt.active(model) == ("there",)
    assert not model.a.weight._post_accumulate_grad_hooks


def test_an_error_in_between_leaves_everything_as_before():
    model = Net().eval()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}

    def breaks(model: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        lt.collect(model, [torch.randn(4, 6)], breaks)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not model.training


def test_gradients_lie_as_the_matrix_of_the_layer():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 4, 3))
    x = torch.randn(5, 4, 4, 4)
    seen = lt.collect(model, [x], square, where=["0", "2"])
    (square(model.train(), x) / 5).backward()
    torch.testing.assert_close(seen.of("0").gradient, model[0].weight.grad.reshape(2, 3, 18))


def test_a_method_without_its_data_says_what_to_do():
    model = Net()
    seen = lt.collect(model, [torch.randn(4, 6)], square, where="a")
    with pytest.raises(ValueError, match="layer 'b' was not collected by seen=, so LoRASB cannot start there"):
        lt.adapt(model, lt.LoRASB(rank=2), ["a", "b"], seen=seen)
    lt.adapt(model, lt.LoRASB(rank=2), "a", seen=seen)
    assert layers_of(model)["a"].site.seen is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "hessian"}, "what names 'hessian'; it can be gradient"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"budget": "2 gigs"}, "budget is '2 gigs'; give bytes, or a text such as"),
        ({"budget": 0}, "budget is 0; give a positive number of bytes"),
        ({"batches": []}, "batches holds no rows"),
        ({"loss": None}, r"the model returned no loss \(Tensor\); put labels into the batches, or give loss="),
        ({"loss": lambda m, x: square(m, x) * float("nan")}, "the loss of rows 1 to 4 is nan; look at these rows"),
        ({"loss": lambda m, x: m.a(x).sum()}, "layer 'b' received no gradient; is it frozen, unused or detached"),
    ],
)
def test_mistakes_are_named(options, message):
    given = {"batches": [torch.randn(4, 6)], "loss": square} | options
    with pytest.raises(ValueError, match=message):
        lt.collect(Net(), given.pop("batches"), given.pop("loss"), **given)


def test_quantised_and_shared_weights_are_refused():
    model = Net()
    lt.quantize(model, "int8", exclude=["b"])
    with pytest.raises(ValueError, match=r"layer 'a' is quantised, and a method that starts from gradients.*LoRA-XS"):
        lt.collect(model, [torch.randn(4, 6)], square)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(
        ValueError, match=r"layer '0' shares its weight with '1.weight', so its gradient would mix both"
    ):
        lt.collect(tied, [torch.randn(4, 4)], square, where="0")


@pytest.mark.parametrize(("text", "number"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5KiB", 1536), (7, 7)])
def test_budgets_are_read(text, number):
    assert module.read_bytes(text) == number
