"""LoRA against its formula written out; rsLoRA's scale, LoRA+'s rates, starts."""

import math

import pytest
import torch
from torch import Tensor, nn

import loratory as lt
from loratory.methods.lora import scale
from loratory.sites import find_site
from tests.laws.kinds import Row, stacked

ROW = Row(
    made=lambda rank: {
        "LoRA": lt.LoRA(rank=rank, alpha=3),
        "rsLoRA": lt.LoRA(rank=rank, alpha=3, rslora=True, start="gaussian"),
    },
    count=lambda site, rank: stacked(site) * rank * (site.inputs + site.outputs),
)

PLANTED = [
    (
        "rsLoRA and LoRA scales exchanged",
        "(math.sqrt(rank) if rslora else rank)",
        "(rank if rslora else math.sqrt(rank))",
    ),
    ("scale left out", "t.B, scale(self.alpha, t.A.shape[-2], self.rslora), t.A", "t.B, 1.0, t.A"),
    (
        "scale of the wrong axis",
        "scale(self.alpha, t.A.shape[-2], self.rslora)",
        "scale(self.alpha, t.A.shape[-1], self.rslora)",
    ),
    ("sign of the update", "t.B, scale(", "-t.B, scale("),
    (
        "rate of B given to A",
        '{"A": trained(A), "B": trained(B, lr=self.lr_ratio)}',
        '{"A": trained(A, lr=self.lr_ratio), "B": trained(B)}',
    ),
]


def adapted(layer: nn.Module, method: lt.Method) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """The layer in a model, its adapter's tensors random."""
    model = nn.Sequential(layer).double()
    lt.adapt(model, method, "0")
    t = model[0].loratory["default"].tensors()
    with torch.no_grad():
        for tensor in t.values():
            tensor.copy_(torch.randn_like(tensor))
    return model, {n: tensor.detach() for n, tensor in t.items()}


def test_linear_is_the_formula():
    W, b, x = torch.randn(5, 7).double(), torch.randn(5).double(), torch.randn(3, 7).double()
    layer = nn.Linear(7, 5).double()
    layer.load_state_dict({"weight": W, "bias": b})
    model, t = adapted(layer, lt.LoRA(rank=2, alpha=6))
    assert {n: tuple(v.shape) for n, v in t.items()} == {"A": (2, 7), "B": (5, 2)}
    torch.testing.assert_close(model(x), x @ W.T + b + 6 / 2 * (x @ t["A"].T) @ t["B"].T)


def test_transposed_linear_is_the_formula():
    from transformers.pytorch_utils import Conv1D

    x = torch.randn(3, 7).double()
    model, t = adapted(Conv1D(5, 7), lt.LoRA(rank=2, alpha=6))
    assert {n: tuple(v.shape) for n, v in t.items()} == {"A": (2, 7), "B": (5, 2)}
    layer = model[0]
    torch.testing.assert_close(model(x), x @ layer.weight + layer.bias + 3 * (x @ t["A"].T) @ t["B"].T)
    lt.merge(model)
    torch.testing.assert_close(layer.weight, layer.loratory.unmerged.T + 3 * (t["B"] @ t["A"]).T)


def test_embedding_is_the_formula():
    ids = torch.tensor([[0, 3, 5], [5, 1, 1]])
    model, t = adapted(nn.Embedding(6, 4), lt.LoRA(rank=2, alpha=6))
    assert {n: tuple(v.shape) for n, v in t.items()} == {"A": (2, 6), "B": (4, 2)}
    torch.testing.assert_close(model(ids), model[0].weight[ids] + 3 * t["A"].T[ids] @ t["B"].T)


def test_convolution_is_a_kernel_then_one_by_one():
    x = torch.randn(2, 4, 6, 5).double()
    model, t = adapted(nn.Conv2d(4, 6, (3, 2), padding=1, stride=(2, 1)), lt.LoRA(rank=2, alpha=6))
    assert {n: tuple(v.shape) for n, v in t.items()} == {"A": (2, 24), "B": (6, 2)}
    kernel = torch.einsum("or,rcij->ocij", t["B"], t["A"].reshape(2, 4, 3, 2))
    own = model[0]
    expected = nn.functional.conv2d(x, own.weight + 3 * kernel, own.bias, (2, 1), 1)
    torch.testing.assert_close(model(x), expected)


def test_grouped_convolution_has_factors_for_each_group():
    x = torch.randn(2, 4, 6, 5).double()
    model, t = adapted(nn.Conv2d(4, 6, 3, groups=2), lt.LoRA(rank=3, alpha=6))
    assert {n: tuple(v.shape) for n, v in t.items()} == {"A": (2, 3, 18), "B": (2, 3, 3)}
    kernels = [(t["B"][g] @ t["A"][g]).reshape(3, 2, 3, 3) for g in (0, 1)]
    own = model[0]
    torch.testing.assert_close(
        model(x), nn.functional.conv2d(x, own.weight + 2 * torch.cat(kernels), own.bias, groups=2)
    )


def test_gradients_are_those_of_the_sheet():
    model, t = adapted(nn.Linear(7, 5), lt.LoRA(rank=2, alpha=6))
    x, g = torch.randn(3, 7).double().requires_grad_(), torch.randn(3, 5).double()
    model(x).backward(g)
    own = model[0].loratory["default"]
    A, B, W = t["A"], t["B"], model[0].weight
    torch.testing.assert_close(own.A.grad, 3 * B.T @ g.T @ x.detach())
    torch.testing.assert_close(own.B.grad, 3 * g.T @ (x.detach() @ A.T))
    torch.testing.assert_close(x.grad, g @ W + 3 * (g @ B) @ A)


def test_scale_table():
    table = {  # (alpha, rank): LoRA, rsLoRA
        (8, 1): (8, 8),
        (8, 4): (2, 4),
        (16, 16): (1, 4),
        (16, 64): (0.25, 2),
        (32, 256): (0.125, 2),
        (None, 64): (1, 1),
    }
    for (alpha, rank), (plain, stabilised) in table.items():
        assert scale(alpha, rank, False) == plain
        assert scale(alpha, rank, True) == stabilised


def test_dropout_acts_on_the_input_of_the_adapter_alone():
    model, t = adapted(nn.Linear(200, 5), lt.LoRA(rank=2, alpha=6, dropout=0.4))
    x = torch.randn(3, 200).double()
    base, update = model[0].weight @ x.T, None
    torch.manual_seed(5)
    out = model.train()(x)
    torch.manual_seed(5)
    u = nn.functional.dropout(x, 0.4)
    update = 3 * (u @ t["A"].T) @ t["B"].T
    torch.testing.assert_close(out, base.T + model[0].bias + update)
    assert not torch.equal(model(x), out)
    torch.testing.assert_close(model.eval()(x), base.T + model[0].bias + 3 * (x @ t["A"].T) @ t["B"].T)


def test_dropout_in_a_mix_acts_on_the_adapters_alone():
    model, t = adapted(nn.Linear(200, 5), lt.LoRA(rank=2, dropout=0.4))
    x = torch.randn(3, 200).double()
    lt.use(model, "default", mix=[0.5])
    torch.manual_seed(5)
    out = model.train()(x)
    torch.manual_seed(5)
    u = nn.functional.dropout(x, 0.4)
    torch.testing.assert_close(out, x @ model[0].weight.T + model[0].bias + 0.5 * (u @ t["A"].T) @ t["B"].T)


def test_starts():
    site = find_site("q", nn.Linear(400, 300))
    site.generator = torch.Generator().manual_seed(0)
    kaiming, gaussian = (lt.LoRA(rank=16, start=start).init(site) for start in ("kaiming", "gaussian"))
    bound = 1 / math.sqrt(400)
    A = kaiming["A"].tensor
    assert 0.99 * bound < A.abs().max() <= bound
    assert abs(A.mean()) < 0.05 * bound
    assert abs(gaussian["A"].tensor.std() * 16 - 1) < 0.05
    for start in (kaiming, gaussian):
        assert torch.equal(start["B"].tensor, torch.zeros(300, 16))
    table = find_site("e", nn.Embedding(400, 300))
    table.generator = torch.Generator().manual_seed(0)
    start = lt.LoRA(rank=16).init(table)
    assert torch.equal(start["A"].tensor, torch.zeros(16, 400))
    assert abs(start["B"].tensor.std() - 1) < 0.05


def test_the_first_step_moves_only_the_zero_factor():
    model, x = nn.Sequential(nn.Linear(7, 5)), torch.randn(3, 7)
    lt.adapt(model, lt.LoRA(rank=2), "0")
    model(x).square().sum().backward()
    own = model[0].loratory["default"]
    assert torch.equal(own.A.grad, torch.zeros(2, 7))
    assert bool((own.B.grad != 0).any())


def test_lora_plus_rates_reach_the_optimizer():
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4))
    lt.adapt(model, lt.LoRA(rank=2, lr_ratio=16), "0, 1")
    groups = {g["lr"]: g["names"] for g in lt.param_groups(model, lr=1e-3, weight_decay=0.1)}
    assert groups == {1e-3: ["layers/0/A", "layers/1/A"], 16e-3: ["layers/0/B", "layers/1/B"]}
    before = {n: p.detach().clone() for n, p in lt.trained(model).items()}
    for p in lt.trained(model).values():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(lt.param_groups(model, lr=1e-3)).step()
    for n, p in lt.trained(model).items():
        torch.testing.assert_close(before[n] - p, torch.full_like(p, 16e-3 if n.endswith("B") else 1e-3))


def test_claim_rslora_keeps_learning_at_high_rank():
    """arXiv 2312.03732 on random data, out = in = 256, alpha 8: rank 4 against rank 256."""

    def run(rank: int, rslora: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 256, bias=False))
        x, target = torch.randn(512, 256), torch.randn(512, 256)
        lt.adapt(model, lt.LoRA(rank=rank, alpha=8, rslora=rslora), "0", seed=1)
        optimizer = torch.optim.SGD(lt.param_groups(model, lr=1e-2))
        first = 0.0
        for step in range(30):
            loss = (model(x) - target).square().sum(-1).mean() / 2
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                first = float(model[0].loratory["default"].B.grad.norm())
            optimizer.step()
        return first, loss.item()

    (low, _), (high, loss) = run(4, False), run(256, False)
    (low_rs, _), (high_rs, loss_rs) = run(4, True), run(256, True)
    assert low / high > 4
    assert 1 / 3 < low_rs / high_rs < 3
    assert loss_rs < loss


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": 0}, ValueError, r"rank is 0; it must be a positive integer"),
        ({"rank": -3}, ValueError, r"rank is -3; it must be a positive integer"),
        ({"rank": 2.0}, TypeError, r"rank is 2.0; it must be a positive integer"),
        ({"rank": True}, TypeError, r"rank is True; it must be a positive integer"),
        ({"rank": "8"}, TypeError, r"rank is '8'; it must be a positive integer"),
        ({"alpha": 0}, ValueError, r"alpha is 0; it must be a positive, finite number"),
        ({"alpha": -1.0}, ValueError, r"alpha is -1.0; it must be a positive"),
        ({"alpha": float("nan")}, ValueError, r"alpha is nan; it must be a positive"),
        ({"alpha": float("inf")}, ValueError, r"alpha is inf; it must be a positive, finite"),
        ({"alpha": True}, TypeError, r"alpha is True; it must be a positive number"),
        ({"alpha": "16"}, TypeError, r"alpha is '16'; it must be a positive number"),
        ({"dropout": 1.0}, ValueError, r"dropout is 1.0; it must lie in \[0, 1\)"),
        ({"dropout": -0.1}, ValueError, r"dropout is -0.1; it must lie in \[0, 1\)"),
        ({"dropout": float("nan")}, ValueError, r"dropout is nan; it must lie in"),
        ({"dropout": None}, TypeError, r"dropout is None, which it cannot be; leave it out"),
        ({"start": "zero"}, ValueError, r"start is 'zero'; it must be one of kaiming, gaussian"),
    ],
)
@pytest.mark.parametrize("cls", [lt.LoRA, lt.DoRA])
def test_bad_hyperparameters(cls, fields, error, message):
    with pytest.raises(error, match=message):
        cls(**fields)


def test_bad_rate():
    with pytest.raises(ValueError, match=r"lr_ratio is 0; it must be a positive, finite number"):
        lt.LoRA(lr_ratio=0)
    with pytest.raises(TypeError, match=r"lr_ratio is '16'"):
        lt.LoRA(lr_ratio="16")


def test_a_method_prints_compares_hashes_and_cannot_change():
    method = lt.LoRA(rank=4, alpha=8)
    assert repr(method) == "LoRA(rank=4, alpha=8.0, dropout=0.0, rslora=False, lr_ratio=1.0, start='kaiming')"
    assert method == lt.LoRA(rank=4, alpha=8)
    assert len({method, lt.LoRA(rank=4, alpha=8), lt.LoRA(rank=5)}) == 2
    with pytest.raises(AttributeError):
        method.rank = 5
    with pytest.raises(TypeError):
        lt.LoRA(4)
