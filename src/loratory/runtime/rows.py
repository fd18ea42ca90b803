"""One adapter for each row of a batch.

Where every adapted layer sees the batch, the model runs once and each layer serves its rows (`row_route`). Where one cannot tell
them apart, the whole model runs once for each group of rows (`row_groups`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn

from loratory.runtime.row_groups import Plan
from loratory.runtime.row_route import Batch
from loratory.runtime.state import require_adapter, state_of, unwrap


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None], *, dim: int = 0) -> Iterator[None]:
    """Inside this block row i of every batch is served by the adapter names[i]; None: by the base alone.

    Any mix of methods, on any layers. Forward, training (gradients reach each adapter from its own rows) and `generate`, where the
    beams and sequences of a row keep its adapter. dim: the dimension of the model's inputs that holds the rows (1: time first).
    Blocks may be nested; `disabled` works inside.

    Where all adapted layers see the rows, the model runs once. Adapters with virtual tokens, with bare parameters (expert stacks,
    MultiheadAttention), or with layers and copies that cannot tell rows apart run in groups: the model runs once for each of them,
    and once for all other rows; outputs, losses and caches are put together again. Prompts may then have different lengths.
    A loss is that of the whole batch, from the model's own loss function over all logits.
    Raises ValueError for an unknown name, a batch of another length; and, in groups, for a number the model makes of all rows in its
    own forward (a loss without `loss_function`, an auxiliary loss: leave labels out), rows packed for flash attention, and
    quantised caches. RuntimeError on a merged model, for switching, adding, detaching or merging inside the block, and for a part
    of the model that is called on its own.
    """
    model = unwrap(model)
    state = state_of(model)
    _check(model, names, dim)
    batch = Batch(names, dim)
    plan = Plan(model, batch)
    before = (state.active, state.mix)
    with ExitStack() as stack:
        stack.enter_context(plan.block())
        stack.callback(lambda: _set_active(state, *before))
        _set_active(state, tuple(dict.fromkeys(n for n in names if n is not None)), None)
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: batch.enter(args, kwargs) if state.rows is batch else None, with_kwargs=True
        )
        stack.callback(hook.remove)
        stack.enter_context(_told_of_generate(model, batch, plan))
        yield


def _set_active(state: Any, active: tuple[str, ...], mix: tuple[float, ...] | None) -> None:
    state.active, state.mix = active, mix


def _check(model: nn.Module, names: Sequence[str | None], dim: int) -> None:
    state = state_of(model)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"names is a {type(names).__name__}; give a list with one adapter name (or None) for each row of the batch"
        )
    if not names:
        raise ValueError("names is empty; give one adapter name (or None) for each row of the batch")
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
        raise ValueError(f"dim is {dim!r}; it must be 0, or 1 for a model whose inputs have time first")
    if state.merged:
        raise RuntimeError(
            f"the model is merged with {', '.join(state.merged)}; call loratory.unmerge(model) before serving rows"
        )
    for name in dict.fromkeys(names):
        if name is not None:
            require_adapter(model, name)


@contextmanager
def _told_of_generate(model: Any, batch: Batch, plan: Plan) -> Iterator[None]:
    """While the model generates, `batch` knows how many sequences a row is expanded to."""
    if not hasattr(model, "generate"):
        yield
        return
    original, own = model.generate, model.__dict__.get("generate")

    @wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        batch.expected = _sequences(model, kwargs)
        if len(plan.parts) > 1:
            kwargs.setdefault("disable_compile", True)
        try:
            return original(*args, **kwargs)
        finally:
            batch.expected, batch.copies = None, 1

    model.__dict__["generate"] = generate
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["generate"]
        else:
            model.__dict__["generate"] = own


def _sequences(model: Any, kwargs: dict[str, Any]) -> int:
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    counts = []
    for field in ("num_beams", "num_return_sequences"):
        given = [kwargs.get(field), *(getattr(c, field, None) for c in configs)]
        counts.append(next((v for v in given if v is not None), 1))
    return max(counts)
