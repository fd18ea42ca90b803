"""The transforms against their matrices, and the taps against PyWavelets."""

import pytest
import torch

from loratory.ops.wavelet import MOST, analyse, high_pass, low_pass, matrix, synthesise

WAVELETS = ["haar", "db2", "db5", f"db{MOST}"]


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("n", [2, 8, 24])
def test_transforms_are_their_matrices_and_invert(wavelet, n):
    x = torch.randn(3, n, dtype=torch.float64)
    L, H = matrix(n, wavelet, "L"), matrix(n, wavelet, "H")
    E = torch.cat([L, H])
    torch.testing.assert_close(E @ E.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-10)
    low, high = analyse(x, wavelet, "L"), analyse(x, wavelet, "H")
    torch.testing.assert_close(low, x @ L.T)
    torch.testing.assert_close(high, x @ H.T)
    torch.testing.assert_close(synthesise(low, wavelet, "L") + synthesise(high, wavelet, "H"), x)


def test_haar_by_hand():
    x = torch.tensor([1.0, 3, 5, 2], dtype=torch.float64)
    root = 2**0.5
    torch.testing.assert_close(analyse(x, "haar", "L"), torch.tensor([4.0, 7]).double() / root)
    torch.testing.assert_close(analyse(x, "haar", "H"), torch.tensor([-2.0, 3]).double() / root)


@pytest.mark.parametrize("wavelet", [f"db{n}" for n in range(1, MOST + 1)])
def test_taps_are_those_of_pywavelets(wavelet):
    pywt = pytest.importorskip("pywt")
    known = pywt.Wavelet(wavelet)
    torch.testing.assert_close(torch.tensor(low_pass(wavelet)), torch.tensor(known.rec_lo), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.tensor(high_pass(wavelet)), torch.tensor(known.rec_hi), rtol=0, atol=1e-7)
