"""NF4 and int8 blocks: the table against its definition and bitsandbytes', errors within their bounds, rows alone."""

from statistics import NormalDist

import pytest
import torch

from loratory.ops import blockwise as b

KINDS = {"nf4": (b.pack_nf4, b.unpack_nf4, b.NF4_BLOCK), "int8": (b.pack_int8, b.unpack_int8, b.INT8_BLOCK)}
EACH = pytest.mark.parametrize("kind", KINDS)


def test_nf4_values_are_the_quantiles_of_the_paper():
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2  # the mean of the two outermost probabilities, as in the authors' code
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64).tolist()[:-1]]
    below = [-quantile(p) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64).tolist()[:-1]]
    values = sorted([*above, 0.0, *below])
    expected = torch.tensor(values) / max(values)
    torch.testing.assert_close(torch.tensor(b.NF4), expected, atol=2e-5, rtol=0)


def test_nf4_values_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    assert torch.equal(torch.tensor(b.NF4), functional.get_4bit_type("nf4", device="cpu"))


@EACH
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (4, 200), (300, 128)])
def test_errors_stay_within_half_a_step(kind: str, shape: tuple[int, int]):
    pack, unpack, block = KINDS[kind]
    W = torch.randn(shape) * torch.rand(shape[0], 1)
    W[0, 0] = 0
    found = unpack(pack(W), slice(None), shape[1])
    assert found.shape == shape
    gap = {"nf4": 0.5 * (1 - 0.6961928), "int8": 0.5 / 127}[kind]
    for start in range(0, shape[1], block):
        part, error = W[:, start : start + block], (found - W)[:, start : start + block].abs()
        largest = part.abs().amax(1, keepdim=True)
        scales = largest.max() / 127 if kind == "nf4" else 0  # the scale itself is rounded
        assert bool((error <= gap * (largest + scales) + scales + 1e-7).all())


def test_error_on_normal_weights():
    W = 0.02 * torch.randn(256, 512)
    relative = {k: float((u(p(W), slice(None), 512) - W).norm() / W.norm()) for k, (p, u, _) in KINDS.items()}
    assert 0.08 < relative["nf4"] < 0.1
    assert 0.005 < relative["int8"] < 0.008


@EACH
def test_chosen_rows_are_rows_of_the_whole(kind: str):
    pack, unpack, _ = KINDS[kind]
    stored = pack(torch.randn(40, 150))
    whole = unpack(stored, slice(None), 150)
    assert torch.equal(unpack(stored, slice(7, 19), 150), whole[7:19])
    at = torch.tensor([39, 0, 5, 5])
    assert torch.equal(unpack(stored, at, 150), whole[at])


@EACH
def test_zeros_stay_zeros(kind: str):
    pack, unpack, block = KINDS[kind]
    W = torch.randn(6, 3 * block)
    W[2], W[4, block : 2 * block] = 0, 0
    found = unpack(pack(W), slice(None), 3 * block)
    assert torch.equal(found == 0, W == 0) or bool((found[W == 0] == 0).all())
    assert bool((unpack(pack(torch.zeros(3, 10)), slice(None), 10) == 0).all())


@EACH
def test_bits_for_a_number_and_no_floating_tensor(kind: str):
    stored = KINDS[kind][0](torch.randn(256, 1024))
    assert not any(t.is_floating_point() for t in stored.values())
    bits = 8 * sum(t.numel() * t.element_size() for t in stored.values()) / (256 * 1024)
    assert bits == {"nf4": 4 + 8 / 64 + 64 / (64 * 256), "int8": 8 + 32 / 128}[kind]
