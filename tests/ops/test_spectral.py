"""Decompositions that are kept on disk: the same numbers from the file, and never an error because of it."""

import os
from pathlib import Path

import pytest
import torch

from loratory.ops import spectral


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORATORY_CACHE", str(tmp_path))
    monkeypatch.setattr(spectral, "WORTH", 1)
    return tmp_path / "spectral"


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    ranks = []
    right = spectral._decomposed
    monkeypatch.setattr(spectral, "_decomposed", lambda W, rank, kind: ranks.append(rank) or right(W, rank, kind))
    return ranks


def test_the_same_bits_come_from_the_file(cache: Path, decomposed: list[int]):
    W = torch.randn(3, 8, 6)
    first, second = spectral.leading(W, 2), spectral.leading(W.clone(), 2)
    assert decomposed == [2]
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert first.residual == second.residual
    assert len(list(cache.iterdir())) == 1
    spectral.leading(W, 3)
    spectral.leading(W, 2, "exact")
    spectral.leading(W + 1e-6, 2)
    spectral.leading(W.double(), 2)
    assert decomposed == [2, 3, 2, 2, 2]
    spectral.clear()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (2, 7, 9)])
def test_the_error_left_is_the_tail_of_the_spectrum(shape: tuple[int, ...]):
    W = torch.randn(*shape, dtype=torch.float64)
    U, s, Vh, residual = spectral.leading(W, 3)
    S = torch.linalg.svdvals(W)
    assert residual == pytest.approx(float(S[..., 3:].norm() / S.norm()), rel=1e-9)
    assert residual == pytest.approx(float((W - U * s.unsqueeze(-2) @ Vh).norm() / W.norm()), rel=1e-9)


@pytest.mark.parametrize("bits", ["truncated", "flipped", "another file"])
def test_a_damaged_file_is_made_anew(bits: str, cache: Path, decomposed: list[int]):
    W = torch.randn(8, 6)
    right = spectral.leading(W, 2)
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    data[-3] ^= 64
    file.write_bytes({"truncated": bytes(data[:-9]), "flipped": bytes(data), "another file": b"hello"}[bits])
    again = spectral.leading(W, 2)
    assert decomposed == [2, 2]
    assert torch.equal(again.U, right.U)
    spectral.leading(W, 2)
    assert decomposed == [2, 2]


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spectral, "WORTH", 1)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORATORY_CACHE", str(tmp_path / "file"))
    assert spectral.leading(torch.randn(8, 6), 2).U.shape == (8, 2)


def test_the_files_used_longest_ago_go_first(cache: Path, decomposed: list[int], monkeypatch: pytest.MonkeyPatch):
    weights = [torch.randn(8, 6) for _ in range(3)]
    for i, W in enumerate(weights[:2]):
        spectral.leading(W, 2)
        for file in cache.iterdir():
            os.utime(file, (i, file.stat().st_mtime - 100))
    spectral.leading(weights[0], 2)  # used again
    size = next(cache.iterdir()).stat().st_size
    monkeypatch.setattr(spectral, "MOST", 2 * size)
    spectral.leading(weights[2], 2)
    assert len(list(cache.iterdir())) == 2
    spectral.leading(weights[0], 2)
    assert len(decomposed) == 3
    spectral.leading(weights[1], 2)
    assert len(decomposed) == 4


def test_small_weights_and_the_meta_device_need_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORATORY_CACHE", str(tmp_path))
    spectral.leading(torch.randn(8, 6), 2)
    shapes = [tuple(t.shape) for t in spectral.leading(torch.empty(4, 800, 600, device="meta"), 9)[:3]]
    assert shapes == [(4, 800, 9), (4, 9), (4, 9, 600)]
    assert list(tmp_path.iterdir()) == []
