"""TLoRA: its rings, its starts, its invariants, and a hand example."""

import itertools

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.ops.tensor_ring import balanced, ring_matrix, ring_rows
from tests.laws.kinds import LINEAR, Row, stacked
from tests.methods.test_lora import adapted


def count(site, rank):
    ins, outs = balanced(site.inputs, 3), balanced(site.outputs, 3)
    return stacked(site) * (4 * sum(f * f for f in ins) + rank * rank * (sum(ins) + sum(outs)))


ROW = Row(
    made=lambda rank: {
        "TLoRA": lt.TLoRA(rank=rank),
        "TLoRA gauge": lt.TLoRA(rank=rank, start="gauge", scale=0.5),
    },
    count=count,
    served=(*LINEAR, "experts", "experts transposed"),
    refusal="and TLoRA is defined for linear layers alone",
)

PLANTED = [
    ("transform on the other side", "W.to(change.dtype) @ change", "W.to(change.dtype) @ change.mT"),
    ("pairs of the ring not turned", "Q.mT.flatten(-2).mT", "Q.flatten(-2).mT"),
    ("scale left out", "self.scale * P.flatten(-2)", "P.flatten(-2)"),
    ("transform decayed", "trained(core, decay=False)", "trained(core)"),
    ("ring starts away from zero", 'first = letter == "B" and d == 1', "first = False"),
    ("orthogonality without the product", "(E + E.mT + E.mT @ E)", "(E + E.mT)"),
]


def random_cores(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape).double() for shape in shapes]


def test_hand_example():
    A1, A2 = (torch.tensor(m).reshape(2, 2, 1, 1) for m in ([[1.0, 1], [0, 1]], [[1.0, 0], [2, 1]]))
    expected = torch.tensor([[1.0, 0, 1, 0], [2, 1, 2, 1], [0, 0, 1, 0], [0, 0, 2, 1]])
    assert torch.equal(ring_matrix([A1, A2]), expected)
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(torch.eye(4))
    model = nn.Sequential(layer)
    lt.adapt(model, lt.TLoRA(rank=1, transform_rank=1, dimensions=2), "0")
    t = layer.loratory["default"]
    with torch.no_grad():
        t.A1.copy_(A1), t.A2.copy_(A2)
    torch.testing.assert_close(model(torch.tensor([1.0, 2, 3, 4])), torch.tensor([4.0, 14, 3, 10]))


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (2, 3, 4)])
def test_the_transform_is_its_traces(sizes):
    cores = random_cores(*((s, s, 3, 3) for s in sizes))
    T = ring_matrix(cores)
    places = list(itertools.product(*map(range, sizes)))
    for (row, i), (col, j) in itertools.product(enumerate(places), enumerate(places)):
        product = torch.eye(3).double()
        for core, a, b in zip(cores, i, j, strict=True):
            product = product @ core[a, b]
        torch.testing.assert_close(T[row, col], product.trace())


def test_one_ring_rank_is_a_kronecker_product():
    cores = random_cores((2, 2, 1, 1), (3, 3, 1, 1))
    torch.testing.assert_close(ring_matrix(cores), torch.kron(cores[0][..., 0, 0], cores[1][..., 0, 0]))


@pytest.mark.parametrize("residual", ["ring", "lora"])
def test_linear_is_the_formula(residual):
    x = torch.randn(3, 12).double()
    model, t = adapted(nn.Linear(12, 6), lt.TLoRA(rank=2, residual=residual, scale=0.5))
    T = ring_matrix([t["A1"], t["A2"], t["A3"]])
    if residual == "lora":
        D = t["B"] @ t["A"]
    else:
        P, Q = (ring_rows([t[f"{c}{d}"] for d in (1, 2, 3)]) for c in "BC")
        D = torch.stack([torch.stack([(p @ q).trace() for q in Q]) for p in P])
        assert torch.linalg.matrix_rank(D) <= 4
    W = model[0].weight @ T + 0.5 * D
    torch.testing.assert_close(model(x), x @ W.T + model[0].bias)
    base = model[0].weight.detach().clone()
    lt.merge(model, probe=x)
    torch.testing.assert_close(model[0].weight, base @ T + 0.5 * D)


def slices(start: str) -> torch.Tensor:
    """The gradients of the slices of a core, one a row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6)).double()
    lt.adapt(model, lt.TLoRA(rank=2, start=start), "0", seed=1)
    t = model[0].loratory["default"]
    T = ring_matrix([t.A1, t.A2, t.A3])
    assert (T - torch.eye(12)).abs().max() <= 1e-7
    assert not (ring_rows([t.B1, t.B2, t.B3])).any()
    (model(torch.randn(4, 12).double()) ** 3).sum().backward()
    return t.A2.grad.flatten(-2).flatten(0, 1).T


def test_slices_learn_alike_at_the_papers_start_and_not_at_the_gauge():
    alike, apart = slices("paper"), slices("gauge")
    torch.testing.assert_close(alike, alike[:1].expand_as(alike))
    assert (apart - apart[:1]).abs().max() > 0.1 * apart.abs().max()


def test_penalties():
    model = nn.Sequential(nn.Linear(12, 6)).double()
    lt.adapt(model, lt.TLoRA(rank=2, identity_reg=0.3, orthogonal_reg=0.7), "0")
    assert float(lt.penalty(model)) == pytest.approx(0, abs=1e-20)
    t = model[0].loratory["default"]
    with torch.no_grad():
        for d in (1, 2, 3):
            getattr(t, f"A{d}").add_(0.1 * torch.randn_like(getattr(t, f"A{d}")))
    T, cores = ring_matrix([t.A1, t.A2, t.A3]), (t.A1, t.A2, t.A3)
    near = sum(
        ((core[:, :, r, s] - torch.eye(len(core)) / 2) ** 2).sum() for core in cores for r in (0, 1) for s in (0, 1)
    )
    expected = 0.3 * near + 0.7 * ((T.T @ T - torch.eye(12)) ** 2).sum()
    torch.testing.assert_close(lt.penalty(model), expected)


def test_the_transform_is_not_decayed():
    model = nn.Sequential(nn.Linear(12, 6))
    lt.adapt(model, lt.TLoRA(rank=2), "0")
    t = model[0].loratory["default"]
    kept = {
        id(p) for g in lt.param_groups(model, lr=1e-2, weight_decay=0.5) if not g["weight_decay"] for p in g["params"]
    }
    assert kept == {id(t.A1), id(t.A2), id(t.A3)}


@pytest.mark.parametrize(
    ("size", "factors"),
    [(320, (5, 8, 8)), (640, (8, 8, 10)), (1280, (8, 10, 16)), (768, (8, 8, 12)), (2048, (8, 16, 16)), (7, (1, 1, 7))],
)
def test_factors_are_balanced(size, factors):
    assert balanced(size, 3) == factors


def attentions(widths: dict[int, int], context: int) -> nn.Module:
    """The attention projections of a diffusion model's blocks: one over the picture, one over the text."""
    with torch.device("meta"):
        return nn.Sequential(
            *[
                nn.ModuleDict(
                    {f"{p}1": nn.Linear(w, w, bias=False) for p in "qkvo"}
                    | {f"{p}2": nn.Linear(context if p in "kv" else w, w, bias=False) for p in "qkvo"}
                )
                for w, blocks in widths.items()
                for _ in range(blocks)
            ]
        )


SD, SDXL = ({320: 5, 640: 5, 1280: 6}, 768), ({640: 10, 1280: 60}, 2048)


@pytest.mark.parametrize(
    ("shapes", "method", "numbers"),
    [
        (SD, lt.LoRA(rank=4), 797_184),
        (SD, lt.TLoRA(rank=4, residual="lora"), 938_200),
        (SD, lt.TLoRA(rank=6), 394_528),
        (SDXL, lt.LoRA(rank=1), 1_451_520),
        (SDXL, lt.TLoRA(transform_rank=1, rank=2), 396_720),
    ],
)
def test_papers_figures(shapes, method, numbers):
    model = attentions(*shapes)
    lt.adapt(model, method)
    assert lt.summary(model).trained == numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"transform_rank": 0}, "transform_rank is 0; it must be a positive integer"),
        ({"residual": "full"}, "residual is 'full'; it must be one of ring, lora"),
        ({"start": "zero"}, "start is 'zero'; it must be one of paper, gauge"),
        ({"in_factors": (4, 3)}, r"in_factors is \(4, 3\); it must hold 3 positive integers"),
        ({"identity_reg": -1}, "identity_reg is -1; it must be a finite number, at least 0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.TLoRA(**options)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (12, {"in_factors": (2, 2, 2)}, r"in_factors \(2, 2, 2\) multiply to 8, but it has 12 inputs"),
        (7, {}, r"has 7 inputs, which do not factor \(best: \(1, 1, 7\)\)"),
    ],
)
def test_layers_that_do_not_fit_are_refused(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        lt.adapt(nn.Sequential(nn.Linear(inputs, 6)), lt.TLoRA(rank=2, **options), "0")


def test_a_convolution_of_one_place_is_a_linear_layer():
    model, x = nn.Sequential(nn.Conv2d(8, 6, 1, stride=2)), torch.randn(2, 8, 5, 4)
    before = model(x)
    lt.adapt(model, lt.TLoRA(rank=2), "0")
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        for p in lt.trained(model).values():
            p += 0.3 * torch.randn_like(p)
    linear = nn.Sequential(nn.Linear(8, 6))
    with torch.no_grad():
        linear[0].weight.copy_(model[0].weight.flatten(1)), linear[0].bias.copy_(model[0].bias)
    lt.adapt(linear, lt.TLoRA(rank=2), "0")
    for name, p in lt.trained(linear).items():
        p.data.copy_(lt.trained(model)[name])
    torch.testing.assert_close(model(x), linear(x[..., ::2, ::2].movedim(1, -1)).movedim(-1, 1))
    lt.merge(model, probe=x)
    with pytest.raises(ValueError, match="layer '0' is a convolution with a kernel of more than one place"):
        lt.adapt(nn.Sequential(nn.Conv2d(8, 6, 3)), lt.TLoRA(), "0")
