"""PEFT's own tuners inside `loratory train`: method `peft:vera`, options `peft.r`.

PEFT builds, runs, saves and merges the adapter; the data, the trainer, its checkpoints and the verbs are Loratory's. A finished adapter is
a PEFT folder, which PeftModel.from_pretrained reads, with `loratory.json` beside it: the training record, and which base it belongs to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
import typing
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loratory.runtime.merge import TOLERANCES, MergeCheck, random_batch
from loratory.runtime.merge import run as run_probe
from loratory.runtime.norms import hold, with_statistics
from loratory.runtime.where import select
from loratory.store import atomic
from loratory.store.identity import check_identity, identity
from loratory.store.inspection import Inspection
from loratory.store.load import find_adapter
from loratory.store.peft_config import CONFIG, WEIGHTS
from loratory.store.pickles import refuse_pickles
from loratory.train import xlora

METHOD, OPTION = "peft:", "peft."
RECORD, STATE, FORMAT = "loratory.json", "peft_state.safetensors", "loratory-peft-bridge"
TASK_TYPES = {
    "chat": "CAUSAL_LM", "text": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS", "tagging": "TOKEN_CLS",
}  # fmt: skip
# PEFT chooses their places, or peft.target_modules
OWN_TARGETS = ("ADAPTION_PROMPT", "IA3", "LN_TUNING", "SHADOW", "TRAINABLE_TOKENS", "XLORA")
BY_TASK_NUMBER = (
    "MULTITASK_PROMPT_TUNING",
    "POLY",
)  # want to know which of several tasks a row is of: here there is one
ADALORA_STATE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


# -- names and options -------------------------------------------------------------------------------------------------


def require_peft(method: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"method {method} needs PEFT; run: pip install 'loratory[peft]'") from error
    return peft


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Without what PEFT itself should do otherwise: it asks transformers for names that are to go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class Tuner:
    """A PEFT tuner in the place of a method's class: its options are `peft.<name>`."""

    config: ClassVar[Any]
    kind: ClassVar[str]

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """Type of each option."""
        hints = typing.get_type_hints(cls.config)
        return {OPTION + f.name: hints[f.name] for f in dataclasses.fields(cls.config) if f.init}

    @classmethod
    def flags(cls) -> list[tuple[str, Any, Any, str]]:
        """Name, type, default and help of each option, as PEFT has them."""
        kinds, out = cls.kinds(), []
        for f in dataclasses.fields(cls.config):
            if OPTION + f.name in kinds:
                default = None if f.default is dataclasses.MISSING else f.default
                text = str(f.metadata.get("help", "")).strip()
                out.append((OPTION + f.name, kinds[OPTION + f.name], default, " ".join(text.split())[:160]))
        return out

    @classmethod
    def read(cls, key: str, value: Any) -> Any:
        """An option's value from a flag's text; `a,b` is a list where a list may stand."""
        import yaml

        if not isinstance(value, str):
            return value
        read = yaml.safe_load(value) if value.strip() else value
        lists = "list" in str(cls.kinds()[key]).lower()
        if lists and isinstance(read, str) and read != "all-linear" and re.fullmatch(r"[\w.,\s-]+", read):
            return [part.strip() for part in read.split(",") if part.strip()]
        return read


@cache
def tuner(method: str) -> type[Tuner]:
    """The tuner of a name such as `peft:vera`. Raises ValueError with the nearest names, ImportError without PEFT."""
    require_peft(method)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {str(kind.value).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = method.removeprefix(METHOD).lower().replace("-", "_")
    if name not in known:
        near = ", ".join(METHOD + each for each in get_close_matches(name, known, n=3, cutoff=0.0))
        raise ValueError(f"PEFT has no tuner '{method}'; nearest names: {near}; all: {', '.join(sorted(known))}")
    cls = known[name]
    return type(cls.__name__, (Tuner,), {"config": cls, "kind": name.upper()})


# -- attaching ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BridgeSummary:
    method: str
    trained: int
    total: int
    shapes: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = list(self.shapes.items())
        lines = [f"  {name}  {' x '.join(map(str, shape))}" for name, shape in shown[:6]]
        lines += [f"  and {len(shown) - 6} more"] if len(shown) > 6 else []
        share = 100 * self.trained / self.total if self.total else 0.0
        return "\n".join(
            [
                f"{self.method}, {len(shown)} trained tensors:",
                *lines,
                f"trained {self.trained:,} of {self.total:,} numbers ({share:.3f} %)",
            ]
        )


def attach(model: Any, settings: Any, task: Any, rows: int) -> Bridged:
    """PEFT's get_peft_model with these settings. Raises ValueError where PEFT refuses them, or where one would be ignored."""
    peft, kind = require_peft(settings.method), tuner(settings.method)
    options = config_options(model, settings, task, rows, kind)
    base = identity(model, replaced := replaced_by(model, options.get("modules_to_save") or task.head_modules(model)))
    heads = task.head_modules(model)
    of_base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    total = sum(p.numel() for p in model.parameters())
    try:
        with peft_warnings():
            wrapped = peft.get_peft_model(model, kind.config(**options))
    except Exception as error:  # each tuner raises what it likes, down to KeyError for an unknown model
        raise ValueError(
            f"PEFT cannot attach {settings.method} with {shown(options)}: {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        ) from error
    for head in heads:
        if not any(p.requires_grad and f".{head}." in name for name, p in wrapped.named_parameters()):
            raise ValueError(
                f"{settings.method} trains nothing beside its own tensors, and this task's head '{head}' must be trained; take another tuner, such as peft:lora"
            )
    if kind.kind == "XLORA":
        xlora.check_experts(wrapped)
    for name, module in with_statistics(wrapped).items():
        if "modules_to_save" not in name.split("."):
            hold(module)
    prepare_forward(wrapped, kind.kind)
    return Bridged(wrapped, settings.method, of_base, total, {"base": base, "replaced": replaced})


def config_options(model: Any, settings: Any, task: Any, rows: int, kind: type[Tuner]) -> dict[str, Any]:
    """The arguments of the tuner's config."""
    options = {key.removeprefix(OPTION): value for key, value in settings.method_options.items()}
    names = {key.removeprefix(OPTION) for key in kind.kinds()}
    for key in ("bias", "per_layer"):
        if getattr(settings, key) not in ("none", None):
            raise ValueError(
                f"{key} is for Loratory's own methods; {settings.method} takes PEFT's own options ({OPTION}{key}, where it has one)"
            )
    if options.get("use_asa"):
        raise ValueError(
            "peft.use_asa keeps running sums that no checkpoint of PEFT holds, so a run could not be resumed; leave it out"
        )
    options.setdefault("task_type", TASK_TYPES.get(task.name))
    chooses = "target_modules" in names and kind.kind not in OWN_TARGETS
    if chooses and not options.get("target_modules"):
        options["target_modules"] = list(select(model, settings.where, exclude=settings.exclude))
    elif settings.exclude is not None or settings.where != "all-linear":
        why = (
            "peft.target_modules is given too"
            if chooses
            else "PEFT chooses its places (or peft.target_modules, where it has that)"
        )
        raise ValueError(f"where and exclude have no meaning for {settings.method}: {why}; leave them out")
    heads = [*task.head_modules(model), *settings.also_train]
    if "modules_to_save" in names and heads:
        options["modules_to_save"] = list(dict.fromkeys([*(options.get("modules_to_save") or ()), *heads]))
    elif settings.also_train:
        raise ValueError(f"{settings.method} trains no module in full beside its own tensors; leave also_train out")
    if kind.kind == "XLORA":
        options = xlora.options_for(model, options, settings.gradient_checkpointing)
    if kind.kind == "ADALORA" and options.get("total_step") is None:
        options["total_step"] = planned_steps(settings, rows)
    return options


def planned_steps(settings: Any, rows: int) -> int:
    """Optimizer steps of the run, as Trainer counts them."""
    if settings.max_steps > 0:
        return int(settings.max_steps)
    batches = math.ceil(rows / settings.per_device_train_batch_size)
    return math.ceil(settings.num_train_epochs * max(1, math.ceil(batches / settings.gradient_accumulation_steps)))


def replaced_by(model: nn.Module, modules: typing.Iterable[str]) -> list[str]:
    """Parameters of the base that the adapter brings itself."""
    return [
        name
        for name, _ in model.named_parameters()
        if any(re.search(rf"(^|\.){re.escape(m)}(\.|$)", name) for m in modules)
    ]


def shown(options: Mapping[str, Any]) -> str:
    given = {
        key: value for key, value in options.items() if key not in ("target_modules", "task_type") and value is not None
    }
    return ", ".join(f"{key}={value!r}" for key, value in given.items()) or "its defaults"


def prepare_forward(model: Any, kind: str) -> None:
    """What PEFT leaves to the caller: logits of the prompt's own positions go, rows without a task number are of task 0."""
    if model.active_peft_config.is_prompt_learning:
        model.register_forward_hook(without_prompt, with_kwargs=True)
    if kind in BY_TASK_NUMBER:
        model.register_forward_pre_hook(with_task_number, with_kwargs=True)
        generate = model.generate

        def numbered(*args: Any, **kwargs: Any) -> Any:
            return generate(*args, **with_task_number(model, args, kwargs)[1])

        model.generate = numbered


def without_prompt(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    logits, labels = getattr(output, "logits", None), kwargs.get("labels")
    seen = labels if labels is not None and labels.dim() == 2 else kwargs.get("input_ids")
    if logits is not None and logits.dim() == 3 and seen is not None and logits.shape[1] > seen.shape[1]:
        output.logits = logits[:, -seen.shape[1] :]
    return output


def with_task_number(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return args, {"task_ids": torch.zeros(len(first), dtype=torch.long, device=first.device)} | kwargs


# -- a run's adapter ---------------------------------------------------------------------------------------------------


class Bridged:
    """A PEFT model in training: see `loratory.train.attached.Attached`."""

    def __init__(self, model: Any, method: str, of_base: set[int], total: int, about: dict[str, Any]) -> None:
        self.model, self.method, self.of_base, self.total, self.about = model, method, of_base, total, about

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        groups: dict[float, list[nn.Parameter]] = {}
        for p in self.trained().values():
            groups.setdefault(weight_decay if p.dim() > 1 else 0.0, []).append(p)
        return [{"params": each, "lr": lr, "weight_decay": decay} for decay, each in groups.items()]

    def summary(self) -> BridgeSummary:
        shapes = {name: tuple(p.shape) for name, p in self.trained().items()}
        return BridgeSummary(self.method, sum(math.prod(shape) for shape in shapes.values()), self.total, shapes)

    def penalty(self) -> Tensor | None:
        return None  # a tuner of PEFT adds its own inside the model's forward

    def after_step(self, step: int) -> None:
        if hasattr(self.model.base_model, "rankallocator"):
            self.model.base_model.update_and_allocate(step)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that PEFT has brought or trains, and AdaLoRA's running sums."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        own = {name: t.detach() for name, t in named if id(t) not in self.of_base or t.requires_grad}
        allocator = getattr(self.model.base_model, "rankallocator", None)
        for key in ADALORA_STATE if allocator is not None else ():
            own |= {f"{key}/{name}": value.detach() for name, value in getattr(allocator, key).items()}
        return own

    def write(self, folder: Path | None) -> None:
        if folder is None:  # every process holds the same; the first one writes
            return
        from safetensors.torch import save_file

        tensors = self.tensors()
        bad = next((n for n, p in self.trained().items() if not bool(torch.isfinite(p).all())), None)
        if bad is not None:
            raise ValueError(
                f"tensor '{bad}' holds NaN or infinity, so it was not saved; go back to the last good checkpoint"
            )
        self._save_peft(folder)
        save_file(
            {name: t.cpu().contiguous().clone() for name, t in tensors.items()},
            folder / STATE,
            metadata={"format": "pt"},
        )

    def restore(self, folder: Path) -> None:
        from safetensors.torch import load_file

        stored = load_file(folder / STATE)
        allocator = getattr(self.model.base_model, "rankallocator", None)
        if allocator is not None:
            sums = {
                key: {n.split("/", 1)[1]: stored.pop(n) for n in list(stored) if n.startswith(key + "/")}
                for key in ADALORA_STATE
            }
            device = next(iter(self.trained().values())).device
            for key, values in sums.items():
                setattr(allocator, key, {name: value.to(device) for name, value in values.items()})
            pattern = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("rank_pattern")
            self.model.active_peft_config.rank_pattern = pattern
        own = {name: t for name, t in self.tensors().items() if name.split("/", 1)[0] not in ADALORA_STATE}
        if strange := sorted(set(own) ^ set(stored)):
            raise ValueError(
                f"{folder / STATE} does not hold the tensors of this run (first difference: '{strange[0]}'); resume with its own settings"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored[name])

    def save(self, folder: Path, training: dict[str, Any]) -> None:
        with atomic.new_folder(folder, overwrite=True) as temporary:
            self._save_peft(Path(temporary))
            digest = checksum(Path(temporary))
            record = {"format": FORMAT, "method": self.method, **self.about, "sha256": digest, "training": training}
            (Path(temporary) / RECORD).write_bytes(atomic.to_json(record))

    def _save_peft(self, folder: Path) -> None:
        if tuner(self.method).kind == "XLORA":
            xlora.write(self.model, folder)
        else:
            self.model.save_pretrained(str(folder), safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # a form with nothing filled in


# -- finished adapters -------------------------------------------------------------------------------------------------


def find_bridged(folder: str | Path) -> Path | None:
    """The folder of a finished bridged adapter, or None if the folder holds another one."""
    path = find_adapter(folder)
    return path if (path / RECORD).is_file() and (path / CONFIG).is_file() else None


def read_record(path: Path) -> dict[str, Any]:
    """`loratory.json`, after checking that PEFT's file beside it is the one it was written with."""
    refuse_pickles(path)
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        known = record["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path / RECORD}' cannot be read ({error}); it is damaged: take another copy") from None
    if not known or not (path / WEIGHTS).is_file():
        raise ValueError(
            f"'{path}' is no whole adapter of method peft:...: {WEIGHTS} or the right {RECORD} is missing; take another copy"
        )
    if checksum(path) != record["sha256"]:
        raise ValueError(
            f"'{path / WEIGHTS}' is not the file that {RECORD} was written with (its checksum differs); take another copy"
        )
    return record


def checksum(path: Path) -> str:
    """Of PEFT's file, and of X-LoRA's experts."""
    digest = hashlib.sha256()
    for file in (path / WEIGHTS, *xlora.expert_files(path)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def inspect_bridged(path: Path) -> Inspection:
    """What the folder holds, without its base."""
    from safetensors import safe_open

    record = read_record(path)
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    with safe_open(str(path / WEIGHTS), "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        tensors = {key: (tuple(each.get_shape()), str(each.get_dtype())) for key, each in slices.items()}
    given = {key: value for key, value in record["training"].get("settings", {}).items() if key.startswith(OPTION)}
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    layers: dict[str, dict[str, Any]] = {name: {} for name in config.get("target_modules") or ()}
    also = list(config.get("modules_to_save") or ())
    return Inspection(
        str(path), "PEFT", record["method"], given, layers, tensors, also, record["base"], record["training"], size
    )


def load_bridged(model: Any, path: Path, *, other_precision: bool = False) -> Any:
    """The base with the folder's adapter, as PEFT loads it. Raises ValueError for a damaged file or another base."""
    record = read_record(path)
    peft = require_peft(record["method"])
    check_identity(model, record["base"], record["replaced"], other_precision=other_precision)
    kind = tuner(record["method"]).kind
    config = xlora.config_of(model, path) if kind == "XLORA" else None
    with peft_warnings():
        wrapped = peft.PeftModel.from_pretrained(model, str(path), config=config)
    prepare_forward(wrapped, kind)
    return wrapped


def write_merged(
    model: Any, source: str, folder: str | Path, *, tokenizer: Any, tolerance: float | None, overwrite: bool
) -> MergeCheck:
    """A plain model with the adapter merged in by PEFT, checked on a probe. Raises ValueError where PEFT cannot merge the tuner."""
    atomic.check_free(folder, overwrite=overwrite)
    batch = random_batch(model.get_base_model())
    if batch is None:
        raise ValueError(
            f"the input of a {type(model.get_base_model()).__name__} is not known, so its merge could not be checked; merge with PEFT"
        )
    if model.active_peft_config.peft_type == "XLORA":  # PEFT would merge the experts at full weight
        raise ValueError(
            f"PEFT cannot merge the XLora adapter of '{source}' into its base: it weighs its experts anew for every token; use the adapter beside its base"
        )
    model.eval()
    with torch.no_grad():
        before = run_probe(model, batch).double()
        try:
            merged = model.merge_and_unload()
        except Exception as error:  # AttributeError for prompts, NotImplementedError, ValueError, ...
            raise ValueError(
                f"PEFT cannot merge the {type(model.active_peft_config).__name__.removesuffix('Config')} adapter of '{source}' into its base ({type(error).__name__}: {' '.join(str(error).split())}); use the adapter beside its base"
            ) from error
        after = run_probe(merged, batch).double()
    dtype = next(merged.parameters()).dtype
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    worst = float((after - before).abs().max())
    spread = float(before.max() - before.min())
    check = MergeCheck(worst, worst / spread if spread else worst, allowed, str(dtype).removeprefix("torch."), "model")
    if not check.relative <= allowed:
        raise RuntimeError(
            f"{check}: the merged model is another one, so nothing was written; raise tolerance to accept it, or use the adapter as it is"
        )
    with atomic.new_folder(folder, overwrite=overwrite) as temporary:
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return check


def copy_peft(path: Path, folder: str | Path, *, overwrite: bool) -> None:
    """PEFT's two files alone, and X-LoRA's experts."""
    with atomic.new_folder(folder, overwrite=overwrite) as temporary:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(path / name, Path(temporary) / name)
        if xlora.expert_files(path):
            xlora.copy_experts(path, Path(temporary), Path(folder))
