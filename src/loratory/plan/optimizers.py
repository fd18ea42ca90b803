"""What optimizers keep for each trained tensor, and what they need for a moment while they step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor

States = Callable[[Tensor], int]  # bytes for one tensor
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256  # bitsandbytes: smaller tensors keep float32 states; numbers that share a scale


@dataclass(frozen=True)
class Optimizer:
    """An optimizer's memory. scratch: copies of a tensor that its step makes; together: on a GPU it steps all tensors at once."""

    name: str
    state: States
    scratch: float = 0.0
    together: bool = False

    def states(self, trained: Sequence[Tensor]) -> int:
        """Bytes kept from step to step."""
        return sum(self.state(t) for t in trained)

    def temporaries(self, trained: Sequence[Tensor], *, on_gpu: bool = False) -> int:
        """Bytes needed while it steps: one copy of all tensors where it takes them together; else those of the largest tensor, and a
        last one of the tensor before it.
        """
        sizes = sorted((t.numel() * t.element_size() for t in trained), reverse=True)
        if not self.scratch or not sizes:
            return 0
        if self.together and on_gpu:
            return sum(sizes)
        return int(self.scratch * sizes[0]) + sum(sizes[1:2])


def _copies(n: int) -> States:
    return lambda t: n * t.numel() * t.element_size()


def _factored(t: Tensor) -> int:
    """Adafactor: a mean square for each row and each column, in float32; for vectors one for each number."""
    if t.dim() < 2:
        return 4 * t.numel()
    return 4 * (t.numel() // t.shape[-1] + t.numel() // t.shape[-2])


def _eight_bit(n: int) -> States:
    def state(t: Tensor) -> int:
        if t.numel() < SMALLEST_8BIT:
            return 4 * n * t.numel()
        return n * (t.numel() + 4 * -(-t.numel() // BLOCK_8BIT))

    return state


def _float32(n: int) -> States:
    return lambda t: 4 * n * t.numel()


OPTIMIZERS = {
    each.name: each
    for each in (
        Optimizer("adamw_torch", _copies(2), scratch=2, together=True),
        Optimizer("adamw_torch_fused", _copies(2)),
        Optimizer("sgd", _copies(0)),
        Optimizer("adagrad", _copies(1), scratch=1, together=True),
        Optimizer("rmsprop", _copies(1), scratch=1, together=True),
        Optimizer("adafactor", _factored, scratch=2.02),
        *(Optimizer(f"{paged}{name}", state) for paged in ("", "paged_") for name, state in (
            ("adamw_32bit", _float32(2)), ("adamw_8bit", _eight_bit(2)), ("lion_32bit", _float32(1)), ("lion_8bit", _eight_bit(1)),
        )),
        Optimizer("adamw_bnb_8bit", _eight_bit(2)),
        Optimizer("rmsprop_bnb", _float32(1)),
        Optimizer("rmsprop_bnb_32bit", _float32(1)),
        Optimizer("rmsprop_bnb_8bit", _eight_bit(1)),
    )
}  # fmt: skip
ALIASES = {"adamw": "adamw_torch_fused", "adamw_hf": "adamw_torch", "adam": "adamw_torch"}


def find_optimizer(name: str) -> Optimizer:
    """Raises ValueError with the nearest names."""
    spelled = ALIASES.get(name.lower(), name.lower())
    if spelled not in OPTIMIZERS:
        near = ", ".join(get_close_matches(spelled, OPTIMIZERS, n=3, cutoff=0.0))
        raise ValueError(
            f"optim is '{name}', whose memory is not known; nearest names: {near}; all: {', '.join(OPTIMIZERS)}"
        )
    return OPTIMIZERS[spelled]
