"""transformers' Trainer with our optimizer groups, checkpoints without pickle, exact resume and a watch on nan."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loratory.runtime.drive import Drive, drive
from loratory.runtime.shards import (
    is_main_process,
    is_sharded,
    mean_of_processes,
    own_piece,
    processes,
    reshard,
    wait,
)
from loratory.store.atomic import new_folder
from loratory.train import checkpoint as ckpt
from loratory.train.attached import Attached, Own
from loratory.train.even import EvenSampler, uncounted, weigh
from loratory.train.result import figures

ROW = "row"  # key of the row numbers in a training batch


class Numbered(Dataset):
    """A dataset whose examples carry their number, so that a bad batch can be named."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index] if index < len(self.rows) else uncounted(self.rows[index % len(self.rows)])
        return {**row, ROW: index}


Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


class CollateNumbered:
    """A collator that passes the row numbers through; numbered rows are those of training, and may be packed."""

    def __init__(self, collator: Collate, packed: Collate | None = None) -> None:
        self.collator, self.packed = collator, packed or collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        numbers = [example[ROW] for example in examples if ROW in example]
        collate = self.packed if numbers else self.collator
        batch = collate([{key: value for key, value in example.items() if key != ROW} for example in examples])
        return {**batch, ROW: torch.tensor(numbers)} if numbers else batch


class LoraTrainer(Trainer):
    """Trainer for an adapted model (or a PEFT one: `attached`). `record` is written into every checkpoint; `limit` is save_total_limit.

    packed: makes the training batches in the collator's place.
    mean_loss: the model's loss is the mean over its own batch, whatever it is told of the other batches of a step.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        data_collator: Any,
        packed: Collate | None = None,
        record: Mapping[str, Any],
        attached: Attached | None = None,
        limit: int | None = None,
        mean_loss: bool = False,
        why_stopped: Callable[[], str | None] = lambda: None,
        **kwargs: Any,
    ) -> None:
        self.record, self.limit, self.why_stopped = record, limit, why_stopped
        self.attached: Attached = attached if attached is not None else Own(model)
        self.output = Path(str(args.output_dir))
        self.batch_rows: list[int] = []
        self.tokens_seen = 0
        self.rows = train_dataset
        self.origins: Sequence[str] = getattr(train_dataset, "origins", ())
        super().__init__(
            model=model,
            args=args,
            train_dataset=Numbered(train_dataset),
            data_collator=CollateNumbered(data_collator, packed),
            **kwargs,
        )
        if mean_loss:  # Trainer takes a forward with **kwargs for one that counts over the step, and would not average
            self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.add_callback(GradientWatch(self))
        self.add_callback(Driving(self))
        self.drive: Drive | None = None
        self.restored_drive: dict[str, Any] = {}

    # -- steps ---------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            chosen: tuple[Any, dict[str, Any]] = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, self.model))
            cls, options = chosen
            if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or {
                "params",
                "model",
                "optimizer_dict",
            } & set(options):
                raise ValueError(
                    f"optim '{self.args.optim}' chooses its own tensors, so it cannot train an adapter; use optim adamw_torch"
                )
            options.pop("lr", None)
            groups = self.attached.param_groups(self.args.learning_rate, self.args.weight_decay)
            self.optimizer = cast(Any, cls)(groups, lr=self.args.learning_rate, **options)
        return cast(torch.optim.Optimizer, self.optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        usual = super()._get_train_sampler(train_dataset)
        if processes() == 1 or not isinstance(usual, RandomSampler):
            return usual
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EvenSampler(self.rows, seed, self.args.per_device_train_batch_size * processes())

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.get("labels")  # label smoothing takes them out
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            if processes() > 1 and not self.model_accepts_loss_kwargs:
                loss = weigh(loss, cast(Tensor, labels))
            added = self.attached.penalty()
            if added is not None:  # once a step: Trainer divides a loss that does not count over the step, and no other
                divided = not self.model_accepts_loss_kwargs or num_items_in_batch is None
                loss = loss + (added if divided else added / self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        rows = [row for row in inputs[ROW].tolist() if row < len(self.rows)]
        self.batch_rows = rows if self.first_of_step() else self.batch_rows + rows
        inputs = {key: value for key, value in inputs.items() if key != ROW}
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(self.diverged(f"the loss is {loss.item()}"))
        self.tokens_seen += processes() * sum(self.rows.size(row) for row in rows)
        return loss

    def _prepare_input(self, data: Any) -> Any:
        ready = super()._prepare_input(data)
        if isinstance(ready, Tensor) and ready.is_floating_point():  # pixels: in the model's own number format
            return ready.to(next(self.attached.model.parameters()).dtype)
        return ready

    def first_of_step(self) -> bool:
        """Whether this is the first forward pass of an optimizer step."""
        first, self._last_step = getattr(self, "_last_step", -1) != self.state.global_step, self.state.global_step
        return first

    def diverged(self, what: str) -> str:
        """The message for a loss or gradient that is nan or inf."""
        names = [self.origins[row] if row < len(self.origins) else f"row {row + 1}" for row in self.batch_rows]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        good = ckpt.checkpoints(self.output)
        return (
            f"{what} at step {self.state.global_step + 1} (training rows: {shown}); "
            f"{f'the last good checkpoint is {good[-1]}' if good else 'there is no checkpoint yet'}; "
            "lower learning_rate, raise warmup_steps, use dtype float32, or look at these rows"
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.shard()
        with kept_generators():  # measuring must not change what is trained
            found = super().evaluate(*args, **kwargs)
        reshard(self.attached.model)  # accelerate looks for the optimizer's tensors among the sharded ones
        if self.model_wrapped is self.attached.model and not is_sharded(self.attached.model):
            # accelerate takes a model that was evaluated for prepared, and would train it without averaging the gradients
            self.attached.model.__dict__.pop("_is_accelerate_prepared", None)
            self.accelerator._models.clear()
        return found

    def shard(self) -> None:
        """Shard the model before its first use, where FSDP is asked for; accelerate does it only together with the optimizer."""
        if self.is_fsdp_enabled and not is_sharded(self.attached.model):
            self.create_optimizer()
            self.optimizer = self.accelerator.prepare(self.attached.model, self.optimizer)[1]

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        wanted = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if wanted not in metrics:
            raise ValueError(
                f"metric_for_best_model is '{self.args.metric_for_best_model}', but an evaluation measures {', '.join(figures(metrics))}"
            )
        better = super()._determine_best_metric(metrics=metrics, trial=trial)
        if better:  # the best checkpoint exists, also where save_steps is no multiple of eval_steps
            self.control.should_save = True
        return better

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        place = self.output / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(place.with_name(f"checkpoint-{self.state.best_global_step}"))
        try:
            if is_main_process():
                with new_folder(
                    place, overwrite=True
                ) as folder:  # the same step again has an evaluation more in its history
                    self.write(folder)
                ckpt.rotate(self.output, self.limit, self.best_checkpoint())
            else:
                self.write(None)
            wait()
        except Exception as e:
            if no_space(e):
                raise OSError(errno.ENOSPC, self.disk_full(place)) from e
            raise

    def write(self, folder: Path | None) -> None:
        """All files of a checkpoint. A process without a folder only gives its part of what is gathered."""
        self.attached.write(folder)
        if folder is not None:
            self.state.save_to_json(str(folder / ckpt.TRAINER_STATE))
        running = mean_of_processes(self._tr_loss)
        ckpt.write_state(
            folder,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            names=self.names(),
            scaler=self.accelerator.scaler,
            more={
                "run": dict(self.record),
                "stopped": self.why_stopped() if self.state.global_step < self.state.max_steps else "done",
                "drive": {} if self.drive is None else self.drive.state(),
                "loss": [running, self._total_loss_scalar, self._globalstep_last_logged, self.tokens_seen],
            },
        )

    def names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.attached.trained().items()}

    def best_checkpoint(self) -> Path | None:
        """The folder of the best step so far."""
        step = self.state.best_global_step
        return self.output / f"checkpoint-{step}" if step else None

    def disk_full(self, place: Path) -> str:
        good = ckpt.checkpoints(self.output)
        return (
            f"the disk is full, so {place.name} could not be written; "
            + (f"nothing is lost up to {good[-1]}" if good else "no checkpoint had been written before")
            + "; free some space (a lower save_total_limit needs less) and run the same command with --resume"
        )

    def save_final(self, folder: Path, training: dict[str, Any]) -> None:
        """The finished adapter with its training record."""
        try:
            self.attached.save(folder, training)
        except Exception as e:
            if no_space(e):
                raise OSError(errno.ENOSPC, self.disk_full(folder)) from e
            raise

    def take_up(self, checkpoint: Path) -> None:
        """State and adapter of a checkpoint that ended its run."""
        self.state = TrainerState.load_from_json(str(checkpoint / ckpt.TRAINER_STATE))
        self.attached.restore(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.attached.restore(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state, tensors = ckpt.read_state(Path(checkpoint))
        ckpt.restore_optimizer(self.optimizer, self.names(), state["optimizer"], tensors)
        ckpt.restore_scheduler(self.lr_scheduler, state["scheduler"])
        self.restored_loss, self.restored_drive = state["loss"], state.get("drive", {})

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(ckpt.read_state(Path(checkpoint))[0]["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state, tensors = ckpt.read_state(Path(checkpoint))
            ckpt.restore_process(tensors, state["generators"])

    def restore_loss(self) -> None:
        """The running sums behind the next logged loss."""
        if (kept := getattr(self, "restored_loss", None)) is not None:
            running, total, self._globalstep_last_logged, self.tokens_seen = kept
            self._tr_loss += running
            self._total_loss_scalar, self.restored_loss = total, None


class Driving(TrainerCallback):
    """Lets methods that act during training do so."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if isinstance(trainer.attached, Own):
            epoch = max(1, len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps)
            trainer.drive = drive(
                trainer.attached.model,
                trainer.optimizer,
                state.max_steps,
                epoch,
                step=state.global_step,
                seed=args.seed,
            )
            trainer.drive.restore(trainer.restored_drive)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.drive is not None:
            self.trainer.drive.close()


class GradientWatch(TrainerCallback):
    """Stops on a gradient that is nan or inf (unless a loss scaler is there to skip such steps)."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.restore_loss()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.accelerator.scaler is not None:
            return
        gradients = {name: p.grad for name, p in self.trainer.attached.trained().items() if p.grad is not None}
        norms = torch._foreach_norm([own_piece(gradient) for gradient in gradients.values()])
        if norms and not torch.isfinite(torch.stack([norm.float().cpu() for norm in norms]).sum()):
            bad = next(name for name, norm in zip(gradients, norms, strict=True) if not torch.isfinite(norm))
            raise FloatingPointError(self.trainer.diverged(f"the gradient of '{bad}' is nan or inf"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.attached.after_step(state.global_step + 1)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Generators leave the block as they came."""
    tensors, rest = ckpt.generator_state()
    try:
        yield
    finally:
        ckpt.restore_generators(tensors, rest)


def no_space(error: BaseException) -> bool:
    """Whether an error, also safetensors' own kind, means that the disk is full."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(f"os error {code}" in str(error) for code in codes)
