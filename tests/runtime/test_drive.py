"""Methods that act during training: when they are called, what they find, and how a run goes on."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.methods.method import Run
from tests.runtime.models import IDS, Tiny


@dataclass(frozen=True, kw_only=True)
class Told(lt.LoRA):
    """Told: a LoRA that writes down how it is called."""

    calls: ClassVar[list] = []

    def before_step(self, run: Run) -> None:
        self.calls.append(("before", run.step, run.epoch, torch.rand(1, generator=run.generator).item()))
        run.rest(next(iter(run.layers.values())).A)

    def after_step(self, run: Run) -> None:
        assert all(t.B.grad is not None for t in run.layers.values())
        assert run.layers.keys() == run.sites.keys()
        self.calls.append(("after", run.step))


@dataclass(frozen=True, kw_only=True)
class Holding(lt.LoRA):
    """Holding: a LoRA of which some columns of B are left as they are."""

    def before_step(self, run: Run) -> None:
        run.kept["begun"] = run.kept.get("begun", 0) + 1
        for t in run.layers.values():
            run.hold(t.B, run.step % 3)


@pytest.fixture
def model() -> Tiny:
    Told.calls.clear()
    made = Tiny()
    lt.adapt(made, Told(rank=2), seed=1)
    return made


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    (model(IDS) ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_method_is_called_around_each_step(model):
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    lt.drive(model, optimizer, steps=3, epoch_steps=2, seed=4)
    for _ in range(3):
        model(IDS)
        step(model, optimizer)
    assert [c[:3] for c in Told.calls] == [
        ("before", 0, 0.0), ("after", 0), ("before", 1, 0.5), ("after", 1), ("before", 2, 1.0), ("after", 2), ("before", 3, 1.5),
    ]  # fmt: skip
    drawn = [c[3] for c in Told.calls if c[0] == "before"]
    generator = torch.Generator().manual_seed(4)
    assert drawn == [torch.rand(1, generator=generator).item() for _ in range(4)]


def test_a_resting_tensor_and_its_moments_stay(model):
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-2), weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in lt.trained(model).items()}
    lt.drive(model, optimizer)
    step(model, optimizer)
    step(model, optimizer)
    still = [n for n, p in lt.trained(model).items() if torch.equal(p, before[n])]
    assert still == [next(n for n in before if n.endswith("/A"))]
    assert len(optimizer.state) == len(before) - 1


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_held_columns_stay_whatever_moments_and_decay_do(cls):
    model = Tiny()
    lt.adapt(model, Holding(rank=3), seed=1)
    optimizer = cls(lt.param_groups(model, lr=1e-2, weight_decay=0.5))
    lt.drive(model, optimizer)
    for count in (0, 1, 2, 0, 1):
        before = {n: p.detach().clone() for n, p in lt.trained(model).items()}
        step(model, optimizer)
        for n, p in lt.trained(model).items():
            if n.endswith("/B"):
                assert (p == before[n]).all(0).tolist() == [j < count for j in range(3)]
            else:
                assert not torch.equal(p, before[n])


def test_what_a_method_keeps_lasts_until_a_run_is_restored():
    model = Tiny()
    lt.adapt(model, Holding(rank=2), seed=1)
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-2))
    drive = lt.drive(model, optimizer, reschedule=True)
    _, run = drive.runs["default"]
    assert run.reschedule
    step(model, optimizer)
    assert run.kept == {"begun": 2}
    drive.restore(drive.state())
    assert run.kept == {"begun": 1}


def test_a_run_goes_on_where_it_was(model):
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    drive = lt.drive(model, optimizer, steps=9)
    step(model, optimizer)
    kept = drive.state()
    step(model, optimizer)
    expected = Told.calls[-1]
    again = lt.drive(model, optimizer, steps=9)
    again.restore(kept)
    step(model, optimizer)
    assert Told.calls[-1] == expected


def test_a_second_call_replaces_the_first(model):
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    lt.drive(model, optimizer)
    lt.drive(model, optimizer)
    Told.calls.clear()
    step(model, optimizer)
    assert [c[0] for c in Told.calls] == ["after", "before"]


def test_a_loop_without_drive_is_refused_at_its_first_step(model):
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    with pytest.raises(
        RuntimeError, match=r"Told acts during training; call loratory.drive\(model, optimizer, steps=\.\.\.\)"
    ):
        step(model, optimizer)
    assert Told.calls == []


def test_other_methods_need_no_drive_and_are_not_disturbed():
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2))
    optimizer = torch.optim.Adam(lt.param_groups(model, lr=1e-2))
    assert lt.drive(model, optimizer).runs == {}
    step(model, optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"epoch_steps": 0}, "epoch_steps is 0; it must be at least 1"),
        ({"steps": 3, "step": 4}, r"step is 4; it must lie between 0 and steps \(3\)"),
    ],
)
def test_mistakes_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        lt.drive(model, torch.optim.Adam(lt.param_groups(model)), **options)


def test_an_optimizer_of_other_tensors_is_refused(model):
    with pytest.raises(
        ValueError,
        match=r"the optimizer steps none of adapter 'default''s tensors; build it from loratory.param_groups",
    ):
        lt.drive(model, torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1))
