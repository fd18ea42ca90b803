"""The block formats of GGUF against the package gguf, bit for bit."""

import numpy as np
import pytest
import torch

from loratory.ops import ggml

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
WRITABLE = [name for name, form in ggml.FORMATS.items() if form.pack is not None]
READ_ONLY = [name for name in ggml.FORMATS if name not in WRITABLE]


def numbers() -> np.ndarray:
    W = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    W[2, :256] = 0
    W[3] *= 1e-3
    return W


def theirs(name: str, rows: np.ndarray) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[name]
    return gguf.quants.dequantize(rows.view(np.float16) if name == "F16" else rows, kind)


@pytest.mark.parametrize("name", WRITABLE)
def test_packed_and_unpacked_as_gguf_does(name: str):
    W = numbers()
    expected = gguf.quants.quantize(W, gguf.GGMLQuantizationType[name]).view(np.uint8)
    packed = ggml.pack(name, torch.from_numpy(W))
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(ggml.unpack(name, packed).numpy(), theirs(name, expected))
    assert packed.shape == (6, 512 // ggml.FORMATS[name].numbers * ggml.FORMATS[name].bytes)


@pytest.mark.parametrize("name", READ_ONLY)
def test_any_block_is_unpacked_as_gguf_does(name: str):
    generator = np.random.default_rng(1)
    size = ggml.FORMATS[name].bytes
    blocks = generator.integers(0, 256, (24, size), dtype=np.uint8)
    halves = generator.standard_normal((24, 2)).astype(np.float16).view(np.uint8)
    if name == "Q6_K":
        blocks[:, -2:] = halves[:, :2]
    else:
        blocks[:, :4] = halves
    rows = blocks.reshape(8, -1)
    assert np.array_equal(ggml.unpack(name, torch.from_numpy(rows)).numpy(), theirs(name, rows))
    assert set(READ_ONLY) == {"Q4_K", "Q5_K", "Q6_K"}
