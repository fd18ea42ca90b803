"""The head's loss without the logits of a batch: on supervised positions alone, in chunks, inside the model's own forward."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from loratory.runtime.mode import in_mode
from loratory.runtime.shards import is_sharded
from loratory.runtime.state import in_rows, unwrap

IGNORED = -100
HELD = "_loratory_lean"
# how models turn the head's product into logits: field of the configuration -> what it does with the field's value
FINISHES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": lambda logits, value: logits * value,  # Cohere
    "lm_head_multiplier": lambda logits, value: logits * value,  # Falcon-H1
    "logits_scaling": lambda logits, value: logits / value,  # Granite
    "final_logit_softcapping": lambda logits, value: value * torch.tanh(logits / value),  # Gemma 2 and 3
}
logger = logging.getLogger("loratory")


class Lean:
    """The hooks on one model. `aside` says why the model keeps its own loss; None: the loss is lean. `close` takes the hooks off."""

    def __init__(self, chunk: int, label_smoothing: float) -> None:
        self.chunk, self.label_smoothing = chunk, label_smoothing
        self.aside: str | None = None
        self.handles: list[Any] = []
        self.armed: dict[str, Any] | None = None  # of the forward that runs
        self.probing = False

    def close(self) -> None:
        """Give the model its own loss back."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model's forward: its head passes the hidden states on, and its loss is ours."""
        self._disarm(model)
        if torch.compiler.is_compiling() or not (self.probing or _is_training(model, kwargs)) or in_rows(model):
            return None
        if _argument(model, args, kwargs, "labels") is None and kwargs.get("shift_labels") is None:
            return None
        head = model.get_output_embeddings()
        armed = {"head": head, "each": bool(kwargs.get("fused_lm_head")), "shifted": kwargs.get("shift_labels") is None}
        armed |= {"loss": model.__dict__.get("_loss_function"), "forward": head.__dict__.get("forward")}
        self.armed = armed

        def passed(hidden: Tensor, *more: Any, **options: Any) -> Tensor:
            armed["hidden"] = hidden
            return hidden

        head.forward = armed["passed"] = passed
        model.__dict__["_loss_function"] = lambda *a, **k: self.loss(model, armed, *a, **k)
        if armed["each"]:  # TRL's forward with its fused head: the model's own with our loss gives it what it asks for
            kwargs = {key: value for key, value in kwargs.items() if key != "fused_lm_head"} | {"use_cache": False}
            return args, kwargs
        return None

    def after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After it everything is in its place, and what stands where the logits were goes."""
        armed = self.armed
        self._disarm(model)
        if armed is None or output is None:
            return None
        if "nll" not in armed:
            raise RuntimeError(
                f"the {type(model).__name__} made no loss of its own function in this forward, so the lean loss cannot stand in for it; "
                "call loratory.lean_loss(model).close()"
            )
        if armed["each"]:
            return _as_trl(armed, output)
        if isinstance(output, tuple):
            return (output[0], None, *output[2:])
        output["logits"] = None
        return output

    def _disarm(self, model: Any) -> None:
        """Everything in its place; after a forward that failed, the next one does it."""
        if self.armed is not None:
            _put_back(self.armed["head"], "forward", self.armed["forward"])
            _put_back(model, "_loss_function", self.armed["loss"])
            for own in ("passed", "hidden"):  # a cycle, and what it would keep alive
                self.armed.pop(own, None)
        self.armed = None

    def loss(
        self,
        model: Any,
        armed: dict[str, Any],
        logits: Any = None,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """transformers' loss of a causal language model, from the hidden states: sum / num_items_in_batch, or the mean."""
        hidden = armed["hidden"]
        if shift_labels is None:
            assert labels is not None
            shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.to(hidden.device).reshape(hidden.shape[:-1])
        mask = shift_labels != ignore_index
        if hidden.is_meta or isinstance(hidden, FakeTensor):  # a plan: as if all were supervised
            rows, y = hidden.flatten(0, -2), shift_labels.flatten()
        else:
            rows, y = hidden[mask], shift_labels[mask]
        text, head, each = model.config.get_text_config(), armed["head"], armed["each"]

        def scored(h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            z = finished(text, head(h)).float()
            nll = cross_entropy(z, y, reduction="none", label_smoothing=self.label_smoothing)
            if not each:
                return (nll,)
            with torch.no_grad():
                log_p = z.detach().log_softmax(-1)
                return nll, -(log_p.exp() * log_p).sum(-1), log_p.argmax(-1) == y

        _put_back(head, "forward", armed["forward"])  # now it is the head
        whole = is_sharded(head)  # its pieces are gathered once, for all positions
        again = not whole and len(y) > self.chunk and torch.is_grad_enabled()
        score = partial(checkpoint, scored, use_reentrant=False) if again else scored
        step = max(1, len(y)) if whole else self.chunk
        parts = [score(h, t) for h, t in zip(rows.split(step), y.split(step), strict=True)]
        head.forward = armed["passed"]  # a hook of others may run the model's forward once more (X-LoRA)
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        armed["mask"], armed["nll"] = mask, columns[0]
        if each:
            armed["entropy"], armed["top"] = columns[1:]
        total = columns[0].sum()
        if num_items_in_batch is None:
            return total / mask.sum()
        items = num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
        return total / items


def lean_loss(model: nn.Module, *, chunk: int = 512, label_smoothing: float = 0.0) -> Lean:
    """Let a causal language model compute its training loss without the logits of a batch; gives a handle with `close` and `aside`.

        loss = sum over supervised t of -log softmax(f(head(h_t)))[label_(t+1)] / count      f: the model's own scale or soft cap

    The head, adapted or tied or trained as it may be, sees the hidden states of supervised positions alone, `chunk` of them at a
    time; more than one chunk are computed again in the backward pass. Forward and gradients equal the plain path to rounding. It
    works inside model.forward, so that Trainer, DDP, FSDP and loops of one's own need nothing more; with TRL's SFTTrainer call it
    after the trainer is made. The outputs of a training forward have logits None. Evaluation, generation and `rows` are as before.
    Steps aside, with a warning and `aside` saying why, where the model has no head, makes its loss itself, or finishes its logits in an
    unknown way: a forward of four tokens tells. A second call replaces the first.
    Raises ValueError for a chunk < 1 or label_smoothing outside [0, 1).
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk is {chunk!r}; it must be at least 1, the positions that the head sees at a time")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1)")
    body: Any = unwrap(model)
    if hasattr(body, "get_base_model"):  # PEFT's
        body = body.get_base_model()
    if (before := body.__dict__.pop(HELD, None)) is not None:
        before.close()
    lean = Lean(chunk, label_smoothing)
    lean.aside = reason(body, lean)
    if lean.aside is not None:
        logger.warning(f"the loss of {type(body).__name__} stays as it is: {lean.aside}")
        return lean
    _hang(body, lean)
    body.__dict__[HELD] = lean
    return lean


def _hang(body: Any, lean: Lean) -> None:
    lean.handles = [
        body.register_forward_pre_hook(lean.before, with_kwargs=True),
        body.register_forward_hook(lean.after, with_kwargs=True),
    ]


def reason(body: Any, lean: Lean) -> str | None:
    """Why a model cannot have the lean loss; None: it can."""
    if not hasattr(type(body), "loss_function") or not hasattr(body, "get_output_embeddings"):
        return "it is no language model of transformers with a loss_function"
    if "labels" not in inspect.signature(type(body).forward).parameters or body.get_output_embeddings() is None:
        return "it has no output head that makes logits for labels"
    if getattr(body.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose labels are not shifted"
    if next(body.parameters()).is_meta or is_sharded(body):
        return None  # nothing can be run here; the configuration is taken at its word
    probe = torch.arange(4, device=body.get_input_embeddings().weight.device)[None]
    _hang(body, lean)
    try:
        with in_mode(body, training=False), torch.no_grad():
            lean.probing = True
            ours = body(input_ids=probe, labels=probe, use_cache=False).loss
            lean.close()
            theirs = body(input_ids=probe, labels=probe, use_cache=False).loss
            wanted = theirs
            if lean.label_smoothing:
                z = body(input_ids=probe, use_cache=False).logits[0, :-1].float()
                wanted = cross_entropy(z, probe[0, 1:], label_smoothing=lean.label_smoothing)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"a trial forward failed ({' '.join(str(error).split())[:120]})"
    finally:
        lean.close()
        lean._disarm(body)
        lean.probing = False
    close = 1e-4 if theirs.dtype == torch.float32 and next(body.parameters()).dtype == torch.float32 else 2e-2
    if not torch.isclose(ours.float(), wanted.float(), rtol=close, atol=close):
        return f"it makes another loss of the same hidden states ({float(theirs):.4g} and {float(ours):.4g} on four tokens)"
    return None


def finished(config: Any, logits: Tensor) -> Tensor:
    """The model's own scale and soft cap on what its head gives."""
    for field, finish in FINISHES.items():
        value = getattr(config, field, None)
        if value is not None and not isinstance(value, bool):
            logits = finish(logits, value)
    return logits


def _put_back(module: nn.Module, name: str, value: Any) -> None:
    """An attribute of the instance as it was; None: there was none."""
    if value is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value


def _is_training(model: Any, kwargs: dict[str, Any]) -> bool:
    return (model.training and torch.is_grad_enabled()) or bool(kwargs.get("fused_lm_head"))


def _argument(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of the forward, however it was passed."""
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


def _as_trl(armed: dict[str, Any], output: Any) -> Any:
    """The fields that TRL's trainers read, one number for each position; its own class stands beside its fused head."""
    made = sys.modules["trl.trainer.utils"].FusedCausalLMOutput
    mask = armed["mask"]
    if armed["shifted"]:  # here, so that the last position has no label
        mask = mask[:, :-1]

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    return made(
        loss=output.loss,
        log_probs=-spread(armed["nll"]),
        entropy=spread(armed["entropy"]),
        is_top1=spread(armed["top"]),
        label_mask=mask,
        log_sum_sq_probs=None,
        mean_logits=None,
        aux_loss=getattr(output, "aux_loss", None),
    )
