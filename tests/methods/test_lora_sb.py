"""LoRA-SB: its start from the first step of full fine-tuning, and its steps as projections of that."""

import pytest
import torch
from torch import nn

import loratory as lt
from tests.laws.kinds import Row, square, stacked

ROW = Row(
    made=lambda rank: {
        "LoRA-SB": lt.LoRASB(rank=rank, first_step=1e-4),
        "LoRA-SB scaled": lt.LoRASB(rank=rank, alpha=3),
    },
    count=lambda site, rank: stacked(site) * rank * rank,
    start=5e-3,  # a step of training has been taken
)

PLANTED = [
    ("uphill", "leading(-step * G", "leading(step * G"),
    ("gradient instead of its sign", ".sign()", ""),
    ("scale not taken out of the start", "(S / s).diag_embed()", "S.diag_embed()"),
    ("scale forgotten", "R if s == 1 else s * R", "R"),
    ("core transposed", "s * R, t.A", "s * R.mT, t.A"),
    ("first step of the whole warm-up", "learning_rate / max(1.0, warmup * steps)", "learning_rate"),
    ("residual instead of what is held", "1 - residual**2", "residual**2"),
]


def layer_and_rows() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(7, 9).double(), torch.randn(12, 7).double()


def test_the_start_is_the_best_part_of_adams_first_step():
    layer, x = layer_and_rows()
    model, W = nn.Sequential(layer), layer.weight.detach().clone()
    seen = lt.collect(model, [x[:8], x[8:]], square)
    lt.adapt(model, lt.LoRASB(rank=3, alpha=12, first_step=1e-3), "0", seen=seen)
    t = layer.loratory["default"]
    assert {n: tuple(v.shape) for n, v in t.tensors().items()} == {"A": (3, 7), "R": (3, 3), "B": (9, 3)}
    assert list(lt.trained(model)) == ["layers/0/R"]
    free = W.requires_grad_()
    y = [nn.functional.linear(part, free, layer.bias) for part in (x[:8], x[8:])]
    (y[0].square().sum() / 8 + y[1].square().sum() / 4).backward()
    D = -1e-3 * free.grad.sign()
    S = torch.linalg.svdvals(D)
    torch.testing.assert_close((D - 4 * t.B @ t.R @ t.A).norm(), S[3:].norm())
    torch.testing.assert_close(t.R.detach(), torch.diag(S[:3]) / 4)
    torch.testing.assert_close(t.B.T @ t.B, torch.eye(3).double())
    torch.testing.assert_close(t.A @ t.A.T, torch.eye(3).double())
    before, after = nn.functional.linear(x, W, layer.bias).square().sum(), model(x).square().sum()
    assert after < before
    held = float(S[:3].square().sum() / S.square().sum())
    assert f"energy that the start holds: {held:.3g} on average" in str(lt.summary(model))


@pytest.mark.parametrize(("alpha", "gradient"), [(None, "plain"), (12, "projected")])
def test_a_step_is_the_projection_of_the_weights_own(alpha, gradient):
    layer, x = layer_and_rows()
    model = nn.Sequential(layer)
    lt.adapt(model, lt.LoRASB(rank=3, alpha=alpha, gradient=gradient), "0", seen=lt.collect(model, [x], square))
    t, s = layer.loratory["default"], 1 if alpha is None else alpha / 3
    optimizer = torch.optim.SGD(lt.param_groups(model, lr=1e-2))
    for _ in range(3):
        W = (layer.weight + s * t.B @ t.R @ t.A).detach().requires_grad_()
        (nn.functional.linear(x, W, layer.bias) ** 3).sum().backward()
        optimizer.zero_grad()
        (model(x) ** 3).sum().backward()
        torch.testing.assert_close(s * t.B @ t.R.grad @ t.A, t.B @ t.B.T @ W.grad @ t.A.T @ t.A, rtol=1e-5, atol=1e-9)
        optimizer.step()


def test_a_run_gives_the_first_step_of_its_warm_up():
    method = lt.LoRASB()
    assert method.planned(learning_rate=1e-3, warmup=0.25, steps=8).first_step == 1e-3 / 2
    assert method.planned(learning_rate=1e-3, warmup=0.0, steps=8).first_step == 1e-3
    own = lt.LoRASB(first_step=0.5)
    assert own.planned(learning_rate=1e-3, warmup=0.25, steps=8) is own
    for wrong in ({"learning_rate": 0.0}, {"warmup": -0.1}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            method.planned(**{"learning_rate": 1e-3, "warmup": 0.25, "steps": 8} | wrong)


def test_it_needs_training_batches():
    model = nn.Sequential(nn.Linear(7, 5))
    with pytest.raises(
        ValueError, match=r"layer '0': LoRASB needs training batches.*seen=loratory.collect\(model, batches"
    ):
        lt.adapt(model, lt.LoRASB(rank=2), "0")
    assert type(model[0]) is nn.Linear


def test_a_layer_without_a_gradient_is_refused():
    model = nn.Sequential(nn.Linear(7, 5))
    seen = lt.collect(model, [torch.zeros(3, 7)], square)
    with pytest.raises(
        ValueError, match=r"layer '0' received no gradient \(all of it is zero\); is it frozen, unused or"
    ):
        lt.adapt(model, lt.LoRASB(rank=2), "0", seen=seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_step": 0}, "first_step is 0; it must be a positive"),
        ({"samples": 0}, "samples is 0; it must be a positive"),
        ({"gradient": "scaled"}, "gradient is 'scaled'; it must be one of plain, projected"),
        ({"dropout": 1}, "dropout is 1; it must lie in"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.LoRASB(**options)


def test_the_meta_device_needs_no_rows_and_the_summary_says_how_far_the_start_goes():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 9))
    lt.adapt(model, lt.LoRASB(rank=3), "0")
    assert lt.summary(model).trained == 9
    layer, x = layer_and_rows()
    model, norm = nn.Sequential(layer), layer.weight.norm().item()
    lt.adapt(model, lt.LoRASB(rank=3, first_step=1e-3), "0", seen=lt.collect(model, [x], square))
    moved = layer.loratory["default"].R.norm().item() / norm
    assert f"what the start changes of W (Frobenius): {moved:.3g} on average" in str(lt.summary(model))
