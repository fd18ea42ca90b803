"""What a plan says of memory, against what torch's allocator reports of the same step on real tensors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import loratory as lt
from loratory.ops import recomputed
from loratory.plan import memory
from loratory.plan.bound import SPECIAL, places
from loratory.plan.job import Job
from loratory.plan.ledger import PARTS
from loratory.plan.memory import Plan, largest_batch, plan_job
from loratory.tasks import make_task
from loratory.train.base import DTYPES
from loratory.train.planned import inputs_of, job_of, planned_settings, read_config
from loratory.train.run import adapt, silent
from tests.laws.table import TABLE
from tests.plan.measured import held, live, rise

CASES = json.loads((Path(__file__).parents[2] / "benchmarks" / "plan_cases.json").read_text())
SMALL = {
    "hidden_size": 64, "n_embd": 64, "intermediate_size": 160, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "image_size": 32, "patch_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2],
    "embedding_size": 16,
}  # fmt: skip
QUICK = [
    ("llama", {"method": "lora", "dtype": "bfloat16"}),
    ("llama", {"method": "full", "gradient_accumulation_steps": 2}),
    ("llama", {"method": "dora", "quantize": "nf4"}),
    ("qwen", {"method": "lora", "gradient_checkpointing": True, "bias": "all"}),
    ("gpt2", {"method": "lora", "dropout": 0.1}),
    ("bert", {"method": "dora", "task": "classification"}),
    ("vit", {"method": "full", "task": "image"}),
    ("resnet", {"method": "lora", "task": "image", "where": "conv"}),
]


def keys_of(base: str, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of a small model of a family, whose config lies in a folder."""
    config = {key: SMALL.get(key, value) for key, value in CASES["bases"][base].items()}
    (folder / "config.json").write_text(json.dumps(config))
    length = {} if changes.get("task") == "image" else {"max_length": 48}
    return {"base": str(folder), "task": "text", "per_device_train_batch_size": 3, "device": "cpu", **length, **changes}


def real(keys: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor], torch.optim.Optimizer]:
    """The model of these settings with weights, a batch, and its optimizer."""
    settings = planned_settings(keys, {})
    task, config = make_task(settings.task, **settings.task_options), read_config(settings)
    model = getattr(transformers, task.auto_class).from_config(config, dtype=DTYPES[settings.dtype])
    if settings.quantize:
        lt.quantize(model, settings.quantize)
    adapt(model, settings, task, 1, silent)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    shapes = inputs_of(settings, config, task)(settings.per_device_train_batch_size)
    batch = {n: torch.ones(shape, dtype=dtype) for n, (shape, dtype) in shapes.items()}
    if "attention_mask" in batch:
        batch["attention_mask"][:, -1] = 0  # padded, as most batches are
    return model.train(), batch, torch.optim.AdamW(lt.param_groups(model, lr=1e-4), fused=True)


@pytest.mark.parametrize(
    ("base", "changes"), QUICK, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_peak_is_what_the_allocator_reports(base, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(recomputed, "MOST", 64 * 24)  # packed layers are unpacked in several pieces
    keys = keys_of(base, changes, tmp_path)
    plan = lt.plan(keys)
    assert plan.exact
    assert sum(plan.parts.values()) == plan.peak
    assert set(plan.parts) == set(PARTS)
    model, batch, optimizer = real(keys)
    assert plan.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.parts["weights"] + plan.parts["adapters"] == held(model)
    came = live(model, batch, optimizer, keys.get("gradient_accumulation_steps", 1))
    assert plan.peak == pytest.approx(came, rel=0.05)
    states = [v for each in optimizer.state.values() for v in each.values() if v.dim()]
    assert plan.parts["optimizer"] == sum(v.numel() * v.element_size() for v in states)


def test_packing_holds_what_it_holds(tmp_path):
    keys = keys_of("llama", {"quantize": "nf4"}, tmp_path)
    plan, config = lt.plan(keys), read_config(planned_settings(keys, {}))

    def load_and_pack() -> None:
        lt.quantize(transformers.AutoModelForCausalLM.from_config(config), "nf4")

    assert plan.startup_peak == pytest.approx(rise(load_and_pack), rel=0.05)
    assert plan.startup["load"] == held(transformers.AutoModelForCausalLM.from_config(config))


def test_what_a_method_keeps_beside_the_moments_is_planned(tmp_path):
    keys = keys_of("llama", {"method": "snella", "rank": 4}, tmp_path)
    competing, still, points = (lt.plan(keys, **more) for more in ({}, {"target": None}, {"kernel": "distance"}))
    assert competing.parts["optimizer"] - still.parts["optimizer"] == 2 * 4 * points.trained


def test_a_start_holds_what_it_holds(tmp_path):
    keys = keys_of("llama", {"method": "full", "dtype": "bfloat16"}, tmp_path)
    stages = lt.plan(keys).startup
    model = transformers.AutoModelForCausalLM.from_config(read_config(planned_settings(keys, {})), dtype=torch.bfloat16)
    before = held(model)
    assert stages["attach"] == pytest.approx(before + rise(lambda: lt.adapt(model, "full")), rel=0.05)


def test_weights_stored_in_another_format_are_held_twice_while_they_load(tmp_path):
    keys = keys_of("llama", {}, tmp_path)
    transformers.AutoModelForCausalLM.from_config(read_config(planned_settings(keys, {}))).save_pretrained(tmp_path)
    as_stored, narrower = lt.plan(keys), lt.plan(keys, dtype="bfloat16")
    weights = sum(p.numel() for p in job_of(planned_settings(keys, {})).build().parameters())
    assert as_stored.startup["load"] == as_stored.parts["weights"]
    assert narrower.startup["load"] == narrower.parts["weights"] + 4 * weights


class Routed(nn.Module):
    """Sends only some rows through a layer: how many, only the numbers say."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(16, 1), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.gate(x).squeeze(-1).gt(0).nonzero().squeeze(-1)
        return x.index_add(0, chosen, self.expert(x[chosen])).square().mean()


def routed_job() -> Job:
    def build() -> nn.Module:
        with torch.device("meta"):
            return Routed()

    def attach(model: nn.Module) -> nn.Module:
        lt.adapt(model, lt.LoRA(rank=2), where=["expert"])
        return model

    return Job(
        build=build, attach=attach, inputs=lambda batch: {"x": ((batch, 16), torch.float32)}, loss=lambda model, batch: model(batch["x"]), batch=64
    )  # fmt: skip


def test_code_that_must_see_numbers_gets_an_upper_bound():
    plan = plan_job(routed_job())
    assert not plan.exact
    assert plan.untraced
    assert f"({plan.untraced}), so activations are an upper bound" in str(plan)
    assert plan.to_json()["untraced"] == plan.untraced
    model = Routed()
    lt.adapt(model, lt.LoRA(rank=2), where=["expert"])
    x = torch.randn(64, 16)
    came = held(model) + rise(lambda: model(x).backward())
    assert came <= plan.peak
    assert plan.parts["weights"] + plan.parts["adapters"] == held(model)


@pytest.mark.parametrize("method", [name for name, row in TABLE.items() if "Linear" in row.served])
def test_what_a_method_declares_bounds_what_it_holds(method, tmp_path, monkeypatch):
    changes = {"where": ["up_proj"], "method": method} | (
        {"groups": "[true, false]"} if method == "merged-lora" else {}
    )
    keys = keys_of("llama", changes, tmp_path)
    exact = lt.plan(keys)
    monkeypatch.setattr(memory, "trace_step", refuse)
    bound = lt.plan(keys)
    assert not bound.exact
    assert exact.peak <= bound.peak


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("vit", {"method": "lora"}), ("vit", {"method": "full"}), ("vit", {"method": "vpt", "tokens": 40}),
        ("resnet", {"method": "lora", "where": "conv"}), ("resnet", {"method": "full"}),
    ],
    ids=lambda v: v if isinstance(v, str) else v["method"] if isinstance(v, dict) else None,
)  # fmt: skip
def test_the_bound_holds_for_models_of_images(base, changes, batch, tmp_path, monkeypatch):
    keys = keys_of(base, {"task": "image", "per_device_train_batch_size": batch, **changes}, tmp_path)
    exact = lt.plan(keys)
    monkeypatch.setattr(memory, "trace_step", refuse)
    bound = lt.plan(keys)
    assert exact.exact
    assert bound.untraced == "NotImplementedError"  # it has no message
    assert exact.peak <= bound.peak
    assert exact.parts["activations"] + exact.parts["logits"] <= bound.parts["activations"] + bound.parts["logits"]


def experts(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A run on a Mixtral of the small Llama's sizes."""
    keys = keys_of(
        "llama", {"where": "experts", "max_length": 4, "per_device_train_batch_size": 1, **changes}, tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return keys


def test_experts_in_float32_have_a_plan_although_the_rule_of_shapes_knows_bfloat16_alone(tmp_path):
    assert lt.plan(experts(tmp_path, method="lora", dtype="float32")).peak > 0


@pytest.mark.parametrize("method", ["lora", "dora", "lora-xs"])
def test_the_bound_holds_for_experts(method, tmp_path, monkeypatch):
    keys = experts(tmp_path, method=method, dtype="bfloat16")
    exact = lt.plan(keys)
    monkeypatch.setattr(memory, "trace_step", refuse)
    assert exact.exact
    assert exact.peak <= lt.plan(keys).peak


def test_a_picture_counts_in_patches_where_a_layer_makes_them_and_else_in_points():
    shape = (2, 3, 224, 200)
    assert places(nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Conv2d(8, 8, 2, 2)), shape) == 14 * 13 + SPECIAL
    assert places(nn.Linear(768, 8), shape) == 224 * 200 + SPECIAL
    assert places(nn.Linear(768, 8), (2, 48)) == 48


def refuse(*args: Any, **keys: Any) -> Any:
    raise NotImplementedError


def test_the_largest_batch_fits_and_the_next_does_not(tmp_path):
    job = job_of(planned_settings(keys_of("llama", {}, tmp_path), {}))
    limit = plan_job(replace(job, batch=11)).peak + 1
    assert plan_job(job).largest_batch(limit) == 11
    assert largest_batch(job, plan_job(replace(job, batch=1)).peak - 1) == 0


def test_rows_are_for_a_dataframe(tmp_path):
    plan = lt.plan(keys_of("llama", {}, tmp_path))
    assert isinstance(plan, Plan)
    rows = {row["what"]: row["bytes"] for row in plan.rows()}
    assert sum(rows[part] for part in PARTS) == rows["peak"] == plan.peak
    assert rows["adapter file"] == plan.adapter_bytes
    assert json.loads(json.dumps(plan.to_json()))["peak"] == plan.peak


def test_a_model_that_cannot_recompute_says_so():
    with pytest.raises(ValueError, match="a Routed cannot recompute its activations; leave gradient_checkpointing out"):
        plan_job(replace(routed_job(), checkpointing=True))
