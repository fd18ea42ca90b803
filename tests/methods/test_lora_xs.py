"""LoRA-XS: its spectral start, what is trained, and the projected gradient."""

import pytest
import torch
from torch import nn

import loratory as lt
from tests.laws.kinds import Row, stacked
from tests.methods.test_lora import adapted

ROW = Row(
    made=lambda rank: {
        "LoRA-XS": lt.LoRAXS(rank=rank, alpha=3),
        "LoRA-XS made again": lt.LoRAXS(rank=rank, alpha=3, basis="weight"),
        "LoRA-XS random": lt.LoRAXS(rank=rank, alpha=9 * rank, start="random"),
    },
    count=lambda site, rank: stacked(site) * rank * rank,
    start=2e-3,  # R starts at 1e-5, not at 0
)

PLANTED = [
    ("singular values twice", "B.copy_(U)", "B.copy_(U * s.unsqueeze(-2))"),
    ("singular values left out", "A.copy_(s.unsqueeze(-1) * Vh)", "A.copy_(Vh)"),
    ("core transposed", "return t.B, R if s == 1 else s * R, t.A", "return t.B, (R if s == 1 else s * R).mT, t.A"),
    ("scale forgotten", "R if s == 1 else s * R", "R"),
    ("projections trained", '"A": frozen(A, rebuilt=made)', '"A": trained(A)'),
    ("A in the file all the same", "frozen(A, rebuilt=made)", "frozen(A)", "tests/store/test_made_again.py"),
    ("random A and B made again", 'if self.basis == "weight" and', "if False and", "tests/store/test_made_again.py"),
    ("start a tenth as large", "* self.std", "* self.std / 10"),
    ("gradient never projected", 'if self.gradient == "projected" else t.R', "if False else t.R"),
]


def test_the_projections_are_the_leading_singular_vectors():
    torch.manual_seed(0)
    layer = nn.Linear(7, 9)
    W = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    lt.adapt(model, lt.LoRAXS(rank=3, alpha=6), "0")
    t = layer.loratory["default"]
    assert {n: tuple(v.shape) for n, v in t.tensors().items()} == {"A": (3, 7), "R": (3, 3), "B": (9, 3)}
    assert list(lt.trained(model)) == ["layers/0/R"]
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(t.B.T @ t.B, torch.eye(3))
    torch.testing.assert_close(t.A @ t.A.T, torch.diag(S[:3] ** 2))
    torch.testing.assert_close((W - t.B @ t.A).norm(), S[3:].norm())
    left = float(S[3:].norm() / S.norm())
    assert f"leave out of W (Frobenius): {left:.3g} on average, at most {left:.3g} (layer '0')" in str(
        lt.summary(model)
    )


def test_linear_is_the_formula():
    x = torch.randn(3, 7).double()
    model, t = adapted(nn.Linear(7, 5), lt.LoRAXS(rank=2, alpha=6))
    W = model[0].weight + 6 / 2 * t["B"] @ t["R"] @ t["A"]
    torch.testing.assert_close(model(x), x @ W.T + model[0].bias)


def test_r_starts_small_and_exactly_zero_on_request():
    model = nn.Sequential(nn.Linear(400, 300))
    lt.adapt(model, lt.LoRAXS(rank=200), "0", seed=1)
    assert model[0].loratory["default"].R.std().item() == pytest.approx(1e-5, rel=0.02)
    x = torch.randn(2, 400)
    with lt.disabled(model):
        base = model(x)
    assert not torch.equal(model(x), base)
    lt.detach(model)
    lt.adapt(model, lt.LoRAXS(std=0), "0")
    assert model[0].loratory["default"].R.shape == (64, 64)
    assert torch.equal(model(x), base)


def test_a_step_along_the_projected_gradient_is_the_nearest_to_a_step_of_the_weight():
    torch.manual_seed(0)
    layer = nn.Linear(7, 9, bias=False).double()
    W = layer.weight.detach().clone().requires_grad_()
    x, model = torch.randn(20, 7).double(), nn.Sequential(layer)
    lt.adapt(model, lt.LoRAXS(rank=3, alpha=12, gradient="projected", std=0), "0")
    t = layer.loratory["default"]
    (model(x) ** 3).sum().backward()
    ((x @ W.T) ** 3).sum().backward()
    moved = 4 * t.B @ t.R.grad @ t.A
    on_B, on_A = t.B @ torch.linalg.pinv(t.B), torch.linalg.pinv(t.A) @ t.A
    torch.testing.assert_close(moved, on_B @ W.grad @ on_A)
    plain = nn.Sequential(nn.Linear(7, 9, bias=False).double())
    plain[0].weight.data.copy_(W.detach())
    lt.adapt(plain, lt.LoRAXS(rank=3, alpha=12, std=0), "0")
    (plain(x) ** 3).sum().backward()
    moved = 4 * t.B @ plain[0].loratory["default"].R.grad @ t.A
    assert not torch.allclose(moved, on_B @ W.grad @ on_A, rtol=0.5)


def test_the_layers_input_is_not_kept_for_the_backward_pass():
    kept = []
    layer = nn.Linear(64, 48)
    model = nn.Sequential(layer)
    lt.adapt(model, lt.LoRAXS(rank=2), "0")
    x = torch.randn(10, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x).sum()
    assert not [t for t in kept if t.numel() >= x.numel() and t.data_ptr() == x.data_ptr()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"std": -1e-5}, "std is -1e-05; it must be a finite number, at least 0"),
        ({"start": "svd"}, "start is 'svd'; it must be one of spectral, random"),
        ({"gradient": "scaled"}, "gradient is 'scaled'; it must be one of plain, projected"),
        ({"alpha": 0}, "alpha is 0; it must be a positive"),
        ({"dropout": 1}, "dropout is 1; it must lie in"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.LoRAXS(**options)


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"layer '0' has 7 inputs and 5 outputs, so rank 6 is too large \(at most 5\)"):
        lt.adapt(nn.Sequential(nn.Linear(7, 5)), lt.LoRAXS(rank=6), "0")
