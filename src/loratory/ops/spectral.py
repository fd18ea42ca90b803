"""The leading singular triplets of a weight: computed once, and kept on disk under the checksum of its numbers.

    <cache>/spectral/<digest>.safetensors        <cache>: LORATORY_CACHE, or ~/.cache/loratory

A file that is damaged counts as absent. A folder that cannot be written to costs time at the next start, and nothing else.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loratory.ops.svd import MORE, is_iterated, truncated_svd

Kind = Literal["truncated", "exact"]

WORTH = 1 << 16  # numbers of a weight from which on a file is faster than the decomposition
MOST = 4 << 30  # bytes of all files; the ones used longest ago go first
_VERSION = 1  # of what is computed


class Leading(NamedTuple):
    """W ~ U diag(s) Vh."""

    U: Float[Tensor, "*stack out rank"]
    s: Float[Tensor, "*stack rank"]
    Vh: Float[Tensor, "*stack rank in"]
    residual: float  # |W - U diag(s) Vh| / |W|, Frobenius


def leading(W: Float[Tensor, "*stack out in"], rank: int, kind: Kind = "truncated", *, keep: bool = True) -> Leading:
    """The `rank` largest singular values of W (at most min(out, in)) with their vectors, in float32 or wider, and the error left.

    kind="truncated": the full decomposition of small matrices, subspace iteration of large ones (`truncated_svd`); "exact": always
    the full one. keep=False: nothing is read from the disk or written to it.
    """
    W = W.detach() if W.dtype == torch.float64 else W.detach().float()
    rank = min(rank, *W.shape[-2:])
    if W.is_meta:
        *stack, out, inputs = W.shape
        return Leading(
            W.new_empty(*stack, out, rank), W.new_empty(*stack, rank), W.new_empty(*stack, rank, inputs), float("nan")
        )
    place = _place(W, rank, kind) if keep and W.numel() >= WORTH else None
    triplet = _kept(place, W, rank) if place is not None else None
    if triplet is None:
        triplet = _decomposed(W, rank, kind)
        if place is not None:
            _keep(place, triplet)
    U, s, Vh = triplet
    return Leading(U, s, Vh, _residual(W, s))


def workspace(outputs: int, inputs: int, rank: int, kind: Kind = "truncated") -> int:
    """Numbers that `leading` holds for a moment: a copy of W, vectors on both sides, and what LAPACK's decomposition asks for."""
    least = min(outputs, inputs)
    if kind == "truncated" and is_iterated(least, rank):
        return outputs * inputs + 4 * (rank + MORE) * (outputs + inputs)
    return outputs * inputs + least * (outputs + inputs) + 4 * least * least


def clear() -> None:
    """Delete what is kept on disk."""
    for file in _files():
        file.unlink(missing_ok=True)


def folder() -> Path:
    """Where decompositions are kept."""
    return Path(os.environ.get("LORATORY_CACHE") or Path.home() / ".cache" / "loratory").expanduser() / "spectral"


def _decomposed(W: Tensor, rank: int, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    if kind == "truncated":
        U, s, Vh = truncated_svd(W, rank)
    else:
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[..., :rank].contiguous(), s[..., :rank].contiguous(), Vh[..., :rank, :].contiguous()


def _residual(W: Tensor, s: Tensor) -> float:
    """U and Vh are orthonormal and U^T W = diag(s) Vh, so what is left has the square |W|^2 - |s|^2."""
    whole = float(W.double().square().sum())
    return max(0.0, 1 - float(s.double().square().sum()) / whole) ** 0.5 if whole else 0.0


def _place(W: Tensor, rank: int, kind: Kind) -> Path:
    numbers = W.cpu().contiguous()
    about = f"{_VERSION} {kind} {rank} {tuple(W.shape)} {W.dtype} {torch.__version__.split('+')[0]}"
    digest = hashlib.sha256(about.encode())
    digest.update(numbers.view(torch.uint8).numpy().data)
    return folder() / f"{digest.hexdigest()}.safetensors"


def _kept(place: Path, W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    from safetensors import SafetensorError, safe_open

    *stack, out, inputs = W.shape
    try:
        with safe_open(place, "pt") as file:
            tensors = [file.get_tensor(name) for name in ("U", "s", "Vh")]
            told = (file.metadata() or {}).get("sha256")
        os.utime(place)  # the ones used longest ago go first
    except (OSError, SafetensorError):
        return None
    shapes = [(*stack, out, rank), (*stack, rank), (*stack, rank, inputs)]
    if told != _digest(tensors) or [tuple(t.shape) for t in tensors] != shapes:
        return None
    U, s, Vh = (t.to(W) for t in tensors)
    return U, s, Vh


def _keep(place: Path, triplet: tuple[Tensor, Tensor, Tensor]) -> None:
    from safetensors.torch import save

    tensors = [t.cpu().contiguous() for t in triplet]
    data = save(dict(zip(("U", "s", "Vh"), tensors, strict=True)), metadata={"sha256": _digest(tensors)})
    temporary = ""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(data)
        os.replace(temporary, place)
        _trim()
    except OSError:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files() -> list[Path]:
    return sorted(folder().glob("*.safetensors")) if folder().is_dir() else []


def _trim() -> None:
    found = sorted(((file.stat().st_mtime, file.stat().st_size, file) for file in _files()), reverse=True)
    total = 0
    for _, size, file in found:
        total += size
        if total > MOST:
            file.unlink(missing_ok=True)
