"""Orthogonal wavelet transforms of the last axis, with periodic extension.

    L, H: (n/2, n)   low and high pass; row j holds the filter's taps at 2j + N .. 2j + N + 1 - 2N, counted round the end
    [L; H] is orthogonal: [L; H]^T [L; H] = I

The matrices are never built: a transform is one shift and one multiplication for each tap. `matrix` is the definition.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

BANDS = ("LL", "LH", "HL", "HH")  # along the rows' axis (of a weight the output side), along the columns' axis
MOST = 10  # dbN up to which the taps are computed here; beyond, the roots lose digits


def low_pass(wavelet: str) -> tuple[float, ...]:
    """The 2N taps of an orthogonal wavelet's low-pass filter, which have the sum sqrt(2).

    haar and db1 .. db10 are computed here; the other orthogonal ones (sym4, coif1, ...) are PyWavelets'.
    Raises ValueError for a name that is unknown or no orthogonal wavelet, ImportError if PyWavelets is needed and not installed.
    """
    if wavelet not in _LOW:
        _LOW[wavelet] = _from_pywavelets(wavelet)
    return _LOW[wavelet]


def _from_pywavelets(wavelet: str) -> tuple[float, ...]:
    try:
        import pywt  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError(
            f"wavelet is {wavelet!r}; haar and db1 to db{MOST} need nothing more, for other orthogonal ones run pip install PyWavelets"
        ) from None
    known = pywt.wavelist(kind="discrete")
    if wavelet not in known:
        raise ValueError(f"wavelet is {wavelet!r}; it must be an orthogonal one: haar, db2, ..., sym4, ..., coif1, ...")
    found = pywt.Wavelet(wavelet)
    if not found.orthogonal:
        raise ValueError(
            f"wavelet is {wavelet!r}, which is biorthogonal: its inverse is not its transpose; take haar, db2, ..., sym4, ..., coif1, ..."
        )
    return tuple(found.rec_lo)


def high_pass(wavelet: str) -> tuple[float, ...]:
    """The taps of the high-pass filter: those of the low-pass one backwards, with alternating signs."""
    return tuple((-1) ** k * h for k, h in enumerate(reversed(low_pass(wavelet))))


def analyse(x: Float[Tensor, "*batch n"], wavelet: str, band: str) -> Float[Tensor, "*batch half"]:
    """x L^T (band "L") or x H^T (band "H"); n is even."""
    phases = x.unflatten(-1, (-1, 2))
    shift, taps = _taps(wavelet, band)
    return sum(h * torch.roll(phases[..., (k + shift) % 2], -((k + shift) // 2), -1) for k, h in enumerate(taps))  # type: ignore[return-value]


def synthesise(c: Float[Tensor, "*batch half"], wavelet: str, band: str) -> Float[Tensor, "*batch n"]:
    """c L (band "L") or c H (band "H"): the transpose of `analyse`."""
    phases: list[Tensor] = [torch.zeros_like(c), torch.zeros_like(c)]
    shift, taps = _taps(wavelet, band)
    for k, h in enumerate(taps):
        phases[(k + shift) % 2] = phases[(k + shift) % 2] + h * torch.roll(c, (k + shift) // 2, -1)
    return torch.stack(phases, -1).flatten(-2)


def from_band(c: Float[Tensor, "*batch part"], wavelet: str, band: str, level: int) -> Float[Tensor, "*batch n"]:
    """c times the filter of a band of this level, "L" or "H", whose rows are as long as the signal: n = 2^level part."""
    for i in range(level):
        c = synthesise(c, wavelet, band if i == 0 else "L")
    return c


def on_bands(
    x: Float[Tensor, "*batch h w"], wavelet: str, change: Callable[[int, Tensor], Tensor]
) -> Float[Tensor, "*batch h w"]:
    """The two-dimensional transform taken back, with change(i, c) in the place of band i of BANDS; h and w are even."""
    y = torch.zeros_like(x)
    for i, band in enumerate(BANDS):
        rows, columns = band[0], band[1]
        c = change(i, analyse(analyse(x, wavelet, columns).mT, wavelet, rows).mT)
        y = y + synthesise(synthesise(c, wavelet, columns).mT, wavelet, rows).mT
    return y


def matrix(n: int, wavelet: str, band: str, dtype: torch.dtype = torch.float64) -> Float[Tensor, "half n"]:
    """L or H itself."""
    shift, taps = _taps(wavelet, band)
    M = torch.zeros(n // 2, n, dtype=dtype)
    for j in range(n // 2):
        for k, h in enumerate(taps):
            M[j, (2 * j + k + shift) % n] += h
    return M


def _taps(wavelet: str, band: str) -> tuple[int, tuple[float, ...]]:
    taps = low_pass(wavelet) if band == "L" else high_pass(wavelet)
    return 1 - len(taps) // 2, taps


def _daubechies(N: int) -> tuple[float, ...]:
    """The shortest filter with N vanishing moments, of minimal phase, by the roots of its power spectrum.

    |h(w)|^2 = 2 cos(w/2)^2N P(sin(w/2)^2),  P(y) = sum_k binom(N-1+k, k) y^k;  a root y of P is the pair of roots z, 1/z of
    z^2 - (2 - 4 y) z + 1, of which the one inside the unit circle is kept.
    """
    P = [float(math.comb(N - 1 + k, k)) for k in range(N)]
    poly = torch.ones(1, dtype=torch.complex128)
    for root in _roots(P):
        half = 1 - 2 * root
        z = half + torch.sqrt(half * half - 1)
        z = 1 / z if z.abs() > 1 else z
        poly = _times(poly, torch.stack([torch.ones_like(z), -z]))
    for _ in range(N):
        poly = _times(poly, torch.ones(2, dtype=torch.complex128))
    taps = poly.real
    return tuple((taps * math.sqrt(2) / taps.sum()).tolist())


def _roots(coefficients: list[float]) -> Tensor:
    """Roots of a polynomial (lowest power first): eigenvalues of its companion matrix, polished by Newton's steps."""
    n = len(coefficients) - 1
    companion = torch.zeros(n, n, dtype=torch.float64)
    companion[range(1, n), range(n - 1)] = 1.0
    companion[:, -1:] = -torch.tensor(coefficients[:-1], dtype=torch.float64)[:, None] / coefficients[-1]
    roots = torch.linalg.eigvals(companion) if n else torch.zeros(0, dtype=torch.complex128)
    for _ in range(3):
        value, slope = torch.zeros_like(roots), torch.zeros_like(roots)
        for c in reversed(coefficients):
            slope, value = slope * roots + value, value * roots + c
        roots = roots - value / slope
    return roots


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product of two polynomials."""
    out = a.new_zeros(len(a) + len(b) - 1)
    for i in range(len(b)):
        out[i : i + len(a)] += a * b[i]
    return out


_LOW = {f"db{N}": _daubechies(N) for N in range(1, MOST + 1)}  # known before a compiler traces a transform
_LOW["haar"] = _LOW["db1"]
