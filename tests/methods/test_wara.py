"""WaRA: its equivalences, ranks and padding."""

import pytest
import torch
from torch import nn

import loratory as lt
from loratory.ops.wavelet import matrix
from tests.laws.kinds import Row, stacked
from tests.methods.test_lora import adapted

ROW = Row(
    made=lambda rank: {
        "WaRA": lt.WaRA(rank=max(1, (rank or 2) // 2), odd="pad"),
        "WaRA shared": lt.WaRA(bands="shared", rank=1, alpha=3, odd="pad"),
        "WaRA tiny": lt.WaRA(bands="tiny", rank=1, alpha=6, odd="pad"),
    },
    count=lambda site, rank: stacked(site) * 4 * (-(-site.inputs // 2) + -(-site.outputs // 2)),
)

PLANTED = [
    ("scale left out", "scale(self.alpha, low.shape[-2], False) * getattr", "getattr"),
    ("bands of the two sides exchanged", "for a, b in (", "for b, a in ("),
    ("one band of two", '("LL", "HH") if', '("LL",) if'),
    ("high pass at every level", 'c = synthesise(c, self.wavelet, band if i == 0 else "L")', "c = synthesise(c, self.wavelet, band)"),
    ("core transposed", "s * t.R,", "s * t.R.mT,"),
]  # fmt: skip


def delta(n_out, n_in, method, **fixed):
    model, t = adapted(nn.Linear(n_in, n_out, bias=False), method)
    W = model[0].weight.detach().clone()
    with torch.no_grad():
        for name, value in fixed.items():
            model[0].loratory["default"].tensors()[name].copy_(value)
            t[name] = value
    lt.merge(model, probe=torch.randn(2, n_in).double())
    return model[0].weight.detach() - W, t


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db3"])
def test_separate_is_the_sum_over_bands(wavelet, levels):
    D, t = delta(8, 12, lt.WaRA(rank=2, alpha=6, wavelet=wavelet, levels=levels))

    def side(n, band, level):
        M = matrix(n, wavelet, band if level == 1 else "L")
        return M if level == 1 else side(n // 2, band, level - 1) @ M

    expected = torch.zeros(8, 12).double()
    names = [f"LL{levels}", *[f"{b}{level}" for level in range(1, levels + 1) for b in ("LH", "HL", "HH")]]
    assert set(t) == {f"{f}_{n}" for n in names for f in "AB"}
    for name in names:
        a, b, level = name[0], name[1], int(name[2])
        expected += 3 * side(8, a, level).T @ t[f"B_{name}"] @ t[f"A_{name}"] @ side(12, b, level)
    torch.testing.assert_close(D, expected)


def test_ranks_reach_four_and_two_times_the_rank():
    assert torch.linalg.matrix_rank(delta(16, 12, lt.WaRA(rank=2))[0]) == 8
    assert torch.linalg.matrix_rank(delta(16, 12, lt.WaRA(rank=2, bands="shared"))[0]) == 4
    D, t = delta(16, 12, lt.WaRA(ranks=(3, 0, 1, 0)))
    assert set(t) == {"A_LL1", "B_LL1", "A_HL1", "B_HL1"}
    assert torch.linalg.matrix_rank(D) == 4


def test_shared_haar_is_a_kronecker_product():
    M = torch.tensor([[1.0, 2], [3, 4]]).double()
    D, _ = delta(4, 4, lt.WaRA(rank=2, bands="shared", wavelet="haar"), B_all1=M, A_all1=torch.eye(2).double())
    expected = torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 2], [3, 0, 4, 0], [0, 3, 0, 4]]).double()
    torch.testing.assert_close(D, expected)


def test_tiny_trains_a_core_on_the_low_band_of_the_weight():
    layer = nn.Linear(12, 8, bias=False).double()
    L_out, L_in = matrix(8, "db2", "L"), matrix(12, "db2", "L")
    U, _, Vh = torch.linalg.svd(L_out @ layer.weight.detach() @ L_in.T)
    W, model = layer.weight.detach().clone(), nn.Sequential(layer)
    lt.adapt(model, lt.WaRA(bands="tiny", rank=2, alpha=4), "0")
    t = layer.loratory["default"]
    assert lt.summary(model).trained == 4
    with torch.no_grad():
        t.R.copy_(torch.tensor([[1.0, 2], [-3, 4]]))
    torch.testing.assert_close(t.U @ t.U.T, U[:, :2] @ U[:, :2].T)
    lt.merge(model, probe=torch.randn(2, 12).double())
    torch.testing.assert_close(layer.weight - W, 2 * L_out.T @ t.U @ t.R.detach() @ t.V @ L_in)
    torch.testing.assert_close(t.V.T @ t.V, Vh[:2].T @ Vh[:2])


def test_odd_sides_are_padded_with_zeros():
    D, t = delta(7, 9, lt.WaRA(rank=2, odd="pad"))
    whole = sum(
        matrix(8, "db2", a).T @ t[f"B_{a}{b}1"] @ t[f"A_{a}{b}1"] @ matrix(10, "db2", b) for a in "LH" for b in "LH"
    )
    torch.testing.assert_close(D, whole[:7, :9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"ranks": (0, 0, 0, 0)}, "ranks is .*not all of them 0"),
        ({"ranks": (1, 2)}, "it must hold the ranks of LL, LH, HL and HH"),
        ({"ranks": (1, 1, 1, 1), "rank": 2}, "leave one of them out"),
        ({"bands": "tokens"}, "bands is 'tokens'; it must be one of separate, shared, tiny"),
        ({"bands": "shared", "levels": 2}, "levels is 2, but bands='shared'"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lt.WaRA(**options)


def test_names_of_wavelets():
    pytest.importorskip("pywt")
    with pytest.raises(ValueError, match="which is biorthogonal: its inverse is not its transpose"):
        lt.WaRA(wavelet="bior2.2")
    with pytest.raises(ValueError, match="wavelet is 'ricker'; it must be an orthogonal one"):
        lt.WaRA(wavelet="ricker")


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"layer '0': wavelet rank needs even in/out features \(got 51865 x 576\)"):
        lt.adapt(nn.Sequential(nn.Linear(51865, 576, device="meta")), lt.WaRA(), "0")
    with pytest.raises(ValueError, match=r"bands of 4 inputs and 3 outputs, so rank 4 is too large \(at most 3\)"):
        lt.adapt(nn.Sequential(nn.Linear(8, 6)), lt.WaRA(rank=4), "0")
