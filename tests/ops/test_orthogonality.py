"""AWOM and AWOR: by hand, by expectation, by bound."""

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.ops.orthogonality import awom, awor

A1, A2 = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.0, 2], [3, 0]])


def test_by_hand():
    assert (awom(A1, A2), awor(A1, A2)) == (2, 0.75)
    B = torch.tensor([[3.0, 0], [0, 4]])
    assert awom(torch.eye(2), B) == 5
    assert awom(torch.eye(2), B, "spectral") == 4
    assert awor(torch.eye(2), B) == awor(torch.eye(2), B, 2.5) == 0.5
    assert awor(torch.eye(2), B, 3.0) == 0.75
    tall = torch.tensor([[1.0, 0], [0, 0], [0, 1]])  # out 3, in 2: the products run over outputs
    assert awor(tall, tall) == 0.5


def test_a_stack_has_one_figure_for_each_matrix():
    first, second = torch.stack([A1, A2]), torch.stack([A2, A2])
    assert awom(first, second).tolist() == [2, awom(A2, A2)]
    assert awor(first, second).tolist() == [0.75, 0.5]


@pytest.mark.parametrize("p", [0.01, 0.05])
def test_independent_places(p):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(600, 300, generator=generator) < p for _ in range(2))
    assert float(awor(first.float(), second.float())) == pytest.approx((1 - p * p) ** 600, abs=0.02)


def test_disjoint_rows_and_diagonals_keep_the_bound():
    """Struct masks of k1 and k2 different rows: at most (1 + k1 + k2) m entries of the product are not 0."""
    m, model = 256, nn.Sequential(nn.Linear(256, 256))
    lt.adapt(model, lt.SHiRA(mask="struct", frequency=200, offset=30), "0", name="two")  # rows 30, 230
    lt.adapt(model, lt.SHiRA(mask="struct", frequency=100, offset=5), "0", name="three")  # rows 5, 105, 205
    for name in ("two", "three"):
        nn.init.ones_(model[0].loratory[name].v)
    ratio = lt.orthogonality(model, "two", "three")["0"].ratio
    assert ratio == pytest.approx(0.97673, abs=5e-6)
    assert ratio >= 1 - (1 + 2 + 3) / m


def test_low_rank_adapters_meet_everywhere_and_sparse_ones_seldom():
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 48))
    for name, method in {"l1": lt.LoRA(rank=2), "l2": lt.LoRA(rank=2), "s1": lt.SHiRA(), "s2": lt.SHiRA()}.items():
        lt.adapt(model, method, ["0", "2"] if name != "s2" else "0", name=name)
        with torch.no_grad():
            for p in lt.trained(model).values():
                p += torch.randn_like(p)
    assert {found.ratio for found in lt.orthogonality(model, "l1", "l2").values()} == {0.0}
    assert set(lt.orthogonality(model, "l1", "s1")) == {"0", "2"}
    sparse = lt.orthogonality(model, "s1", "s2")
    assert set(sparse) == {"0"}
    assert sparse["0"].ratio > 0.95
    t1, t2 = (model[0].loratory[name] for name in ("s1", "s2"))
    with torch.no_grad():
        D = t1.method.delta(t1).T @ t2.method.delta(t2)
    assert sparse["0"].magnitude == pytest.approx(float(D.norm()))
    spectral = lt.orthogonality(model, "s1", "s2", norm="spectral")["0"].magnitude
    assert spectral == pytest.approx(float(torch.linalg.svdvals(D)[0]), rel=1e-5)


def test_bad_input():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lt.adapt(model, lt.SHiRA(fraction=0.1), "0", name="first")
    lt.adapt(model, lt.SHiRA(fraction=0.1), "1", name="second")
    with pytest.raises(ValueError, match="adapters 'first' and 'second' change no layer in common"):
        lt.orthogonality(model, "first", "second")
    with pytest.raises(ValueError, match="norm is 'nuclear'; it must be one of frobenius, spectral"):
        lt.orthogonality(model, "first", "second", norm="nuclear")
    with pytest.raises(ValueError, match="there is no adapter 'third'"):
        lt.orthogonality(model, "first", "third")
