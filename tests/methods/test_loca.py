"""LoCA: its spectrum, both ways of computing it, and its schedule."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import loratory as lt
from loratory.ops.dct import cosine_delta, cosine_delta_reference, cosine_product, dct_matrix
from tests.laws.kinds import LINEAR, Row, move, stacked

ROW = Row(
    made=lambda rank: {
        "LoCA": lt.LoCA(n_frequency=8 * rank, scale=3, location_steps=0),
        "LoCA dense": lt.LoCA(n_frequency=8 * rank, scale=3, dct_mode="dense"),
    },
    count=lambda site, rank: stacked(site) * 3 * 8 * rank,
    served=(*LINEAR, "experts", "experts transposed"),
    refusal="is not linear, and LoCA is defined for linear layers alone",
    sloped=("a",),  # a location's gradient is a difference between neighbours
    clipped=("u",),
    stepped=("a",),  # the first steps train coefficients
)

PLANTED = [
    ("scale twice", "self.scale * cosine_delta(", "self.scale**2 * cosine_delta("),
    ("scale left out of the sparse way", "self.scale * cosine_product(", "cosine_product("),
    ("locations trained first", ">= COEFFICIENT_STEPS", "< LOCATION_STEPS"),
    ("locations never rest", "run.step < last and", "True and"),
    ("both always trained", "run.rest(t.a if places else t.u)", "pass"),
    ("locations decayed", "decay=False, ", ""),
    ("last index reached", "clamp(0, 0.999)", "clamp(0, 1)"),
    ("columns by the rows' length", "u[..., i, :] * end for", "u[..., i, :] * ends[0] for"),
]


def parts(M: int = 9, N: int = 7, k: int = 5, *stack: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    u = torch.rand(*stack, 2, k).double() * torch.tensor([M - 1, N - 1]).double().unsqueeze(-1)
    return torch.randn(*stack, k).double().requires_grad_(), u.requires_grad_()


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_cosine_matrix_is_orthogonal(n):
    C = dct_matrix(n, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(C @ C.T, torch.eye(n).double())
    torch.testing.assert_close(C[0], torch.full((n,), n**-0.5).double())


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("k", [3, 40])
def test_the_update_is_its_definition(stack, k):
    a, location = parts(9, 7, k, *stack)
    torch.testing.assert_close(cosine_delta(a, location, 9, 7), cosine_delta_reference(a, location, 9, 7))
    assert torch.autograd.gradcheck(lambda c: cosine_delta(c, location.detach(), 9, 7), a)


@pytest.mark.parametrize("k", [3, 40])
def test_a_locations_gradient_is_a_difference_in_the_spectrum(k):
    a, location = parts(9, 7, k)
    G = torch.randn(9, 7).double()
    cosine_delta(a, location, 9, 7).backward(G)
    K = dct_matrix(9, G.device, G.dtype) @ G @ dct_matrix(7, G.device, G.dtype).T
    for p in range(k):
        r, c = (int(v) for v in location[:, p].detach().round())
        down, right = K[min(r + 1, 8), c] - K[max(r - 1, 0), c], K[r, min(c + 1, 6)] - K[r, max(c - 1, 0)]
        expected = torch.stack([(a[p] / 2 * d).clamp(-1, 1) for d in (down, right)])
        torch.testing.assert_close(location.grad[:, p], expected.detach())


def test_the_product_is_that_of_the_update_and_so_are_all_gradients():
    a, location = parts()
    x = torch.randn(2, 3, 7).double().requires_grad_()
    g = torch.randn(2, 3, 9).double()
    found = torch.autograd.grad(cosine_product(x, a, location, 9, 7), (x, a, location), g)
    expected = torch.autograd.grad(x @ cosine_delta(a, location, 9, 7).T, (x, a, location), g)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def layer_with(**options) -> tuple[nn.Linear, nn.ModuleDict]:
    torch.manual_seed(1)
    layer = nn.Linear(7, 9)
    model = nn.ModuleDict({"fc": layer})
    lt.adapt(model, lt.LoCA(**{"n_frequency": 12, "scale": 2} | options), seed=1)
    move(model)
    return layer, model


def gradients(
    layer: nn.Linear, model: nn.Module, autocast: bool = False, again: bool = False
) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    x = torch.randn(30, 7).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
    (y.float() ** 3).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in lt.trained(model).items()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_dense_kept_and_sparse_are_the_same(autocast, again):
    dense = gradients(*layer_with(dct_mode="dense"), autocast, again)
    kept = gradients(*layer_with(dct_mode="dense", cache_delta=True), autocast, again)
    sparse = gradients(*layer_with(dct_mode="sparse"), autocast, again)
    for name, value in dense.items():
        tolerance = (
            {"rtol": 0.05, "atol": 0.05 * float(value.float().abs().max())}
            if autocast
            else {"rtol": 1e-5, "atol": 1e-5}
        )
        for other in (kept, sparse):
            assert other[name].dtype == value.dtype
            torch.testing.assert_close(other[name], value, **tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kept", [False, True])
def test_the_update_is_not_kept_between_forward_and_backward(kept: bool, dropout: float):
    layer, _ = layer_with(dct_mode="dense", cache_delta=kept, dropout=dropout)
    seen: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        layer(torch.randn(30, 7, requires_grad=True))
    weights = [t for t in seen if t.shape[-2:] in ((9, 7), (7, 9)) and t.data_ptr() != layer.weight.data_ptr()]
    assert bool(weights) is kept


def test_the_schedule_turns_and_comes_to_rest():
    layer, model = layer_with(location_steps=40)
    t = layer.loratory["default"]
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-2, weight_decay=0.1))
    lt.drive(model, optimizer, steps=60)
    moved = []
    for _ in range(60):
        a, u = t.a.detach().clone(), t.u.detach().clone()
        for _ in range(2):  # accumulated
            (layer(torch.randn(4, 7)) ** 2).sum().backward()
        assert not bool((t.u.grad if t.phase[0] else t.a.grad).any())
        optimizer.step()
        optimizer.zero_grad()
        layer.eval()(torch.randn(4, 7))  # does not count
        layer.train()
        moved.append("a" * (not torch.equal(t.a, a)) + "u" * (not torch.equal(t.u, u)))
    assert moved == ["a"] * 10 + ["u"] * 20 + ["a"] * 30


def test_a_tenth_of_the_run_trains_locations():
    assert lt.LoCA().planned(learning_rate=1e-3, warmup=0.0, steps=400).location_steps == 40
    layer, model = layer_with()
    optimizer = torch.optim.SGD(lt.param_groups(model))
    with pytest.raises(
        ValueError, match=r"rest after a tenth of the run; give location_steps=, or steps= to loratory.drive"
    ):
        lt.drive(model, optimizer)
    drive = lt.drive(model, optimizer, steps=400, step=35)
    assert layer.loratory["default"].phase.tolist() == [1, 0]
    drive = lt.drive(model, optimizer, steps=400, step=15)
    assert layer.loratory["default"].phase.tolist() == [0, 1]
    drive.close()
    _, model = layer_with(location_steps=9)
    with pytest.warns(UserWarning, match=r"location phase \(9 steps\) is longer than the training \(5\)"):
        lt.drive(model, torch.optim.SGD(lt.param_groups(model)), steps=5)


def test_without_drive_the_first_step_says_so():
    layer, model = layer_with()
    optimizer = torch.optim.SGD(lt.param_groups(model))
    layer(torch.randn(4, 7)).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"layer 'fc': LoCA acts during training; call loratory.drive\(model, optimizer"
    ):
        optimizer.step()


def test_locations_have_a_rate_of_their_own_and_no_decay():
    _, model = layer_with(location_lr_ratio=0.1)
    groups = {
        g["names"][0][-1]: (g["lr"], g["weight_decay"]) for g in lt.param_groups(model, lr=1e-2, weight_decay=0.5)
    }
    assert groups == {"a": (1e-2, 0.5), "u": (pytest.approx(1e-3), 0.0)}


def test_coefficients_at_known_places_are_learned():
    layer, model = layer_with(n_frequency=12, scale=1, location_steps=0)
    layer.bias.data.zero_()
    t = layer.loratory["default"]
    optimizer = torch.optim.Adam([t.a], lr=0.1)
    lt.drive(model, optimizer, steps=100)
    W = layer.weight.detach() + t.method.delta(t).detach() * 0.3
    x = torch.randn(200, 7)
    losses = []
    for _ in range(100):
        loss = nn.functional.mse_loss(layer(x), x @ W.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-4 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_frequency": 0}, "n_frequency is 0; it must be a positive integer"),
        ({"scale": 0}, "scale is 0.0; it must be finite and not 0"),
        ({"scale": float("inf")}, "scale is inf; it must be finite"),
        ({"dct_mode": "fft"}, "dct_mode is 'fft'; it must be one of auto, dense, sparse"),
        ({"location_steps": -1}, "location_steps is -1; it must be an integer, at least 0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.LoCA(**options)


def test_the_last_index_of_a_long_side_is_out_of_reach():
    layer = nn.Linear(801, 2, bias=False)
    lt.adapt(nn.ModuleDict({"fc": layer}), lt.LoCA(n_frequency=1))
    t = layer.loratory["default"]
    with torch.no_grad():
        t.a.fill_(1.0)
        t.u.fill_(1.0)
    row = dct_matrix(801, torch.device("cpu"), torch.float32)[799]  # round(0.999 * 800)
    torch.testing.assert_close(t.method.delta(t).detach()[0].abs(), row.abs() * 0.5**0.5)


def test_more_entries_than_the_weight_has_are_refused():
    with pytest.raises(ValueError, match=r"layer 'fc': n_frequency \(64\) exceeds the 63 entries of this weight"):
        lt.adapt(nn.ModuleDict({"fc": nn.Linear(7, 9)}), lt.LoCA(n_frequency=64))
    model = nn.ModuleDict({"fc": nn.Linear(7, 9)})
    lt.adapt(model, lt.LoCA())
    assert lt.summary(model).trained == 3 * 63
