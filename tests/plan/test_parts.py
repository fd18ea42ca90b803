"""Optimizers, devices, cards, the file and the clock, each against the real thing or its formula."""

import json

import pytest
import torch
import transformers
from torch import nn

import loratory as lt
from loratory.ops import recomputed
from loratory.plan.cards import CARDS, GIB, MIB, RESERVED, budget, shown
from loratory.plan.clock import Rates
from loratory.plan.depth import plan_deep
from loratory.plan.devices import Blocks, blocks_of, on_each
from loratory.plan.file import file_bytes, saved_tensors
from loratory.plan.kernels import workspace
from loratory.plan.memory import plan_job
from loratory.plan.optimizers import OPTIMIZERS, find_optimizer
from loratory.train.planned import job_of, planned_settings, rates_of
from tests.plan.measured import rise
from tests.plan.test_memory import keys_of


def stepped(name: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """An optimizer of that name as Trainer makes it, after its first step."""
    arguments = transformers.TrainingArguments(output_dir="unused", optim=name, report_to="none", use_cpu=True)
    cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    trained = [nn.Parameter(torch.randn(shape)) for shape in ((96, 256), (256, 64), (64,), (80, 256))]
    for p in trained:
        p.grad = torch.randn_like(p)
    optimizer = cls(trained, **options)
    optimizer.step()
    return trained, optimizer


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_optimizer_keeps_and_needs_what_the_table_says(name):
    trained, optimizer = stepped(name)
    states = [v for each in optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor) and v.dim()]
    known = OPTIMIZERS[name]
    assert known.states(trained) == sum(v.numel() * v.element_size() for v in states)
    came = rise(optimizer.step)
    assert came <= known.temporaries(trained) + 64
    assert known.temporaries(trained) <= 1.5 * came + 64
    assert known.temporaries(trained, on_gpu=True) == (
        sum(4 * p.numel() for p in trained) if known.together else known.temporaries(trained)
    )


def test_eight_bit_states_are_a_byte_a_number_with_a_scale_for_each_256():
    large, small = torch.empty(4096), torch.empty(4095)
    assert find_optimizer("adamw_8bit").states([large]) == 2 * (4096 + 16 * 4)
    assert find_optimizer("adamw_8bit").states([small]) == 8 * 4095
    assert find_optimizer("lion_8bit").states([large]) == 4096 + 16 * 4


def test_unknown_optimizer_names_the_nearest():
    with pytest.raises(
        ValueError, match="optim is 'adamw_tourch', whose memory is not known; nearest names: adamw_torch"
    ):
        find_optimizer("adamw_tourch")


@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", torch.float32), ("dora", torch.bfloat16), ("full", torch.bfloat16)]
)
def test_file_is_as_large_as_saved(method, dtype, tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    lt.adapt(model, method)
    lt.save(model, tmp_path / "adapter")
    assert file_bytes(saved_tensors(model)) == (tmp_path / "adapter" / "adapter.safetensors").stat().st_size


def test_a_plan_states_the_size_of_the_file(tmp_path):
    keys = keys_of("resnet", {"task": "image", "where": "conv", "method": "dora"}, tmp_path)
    plan = lt.plan(keys)
    model = transformers.AutoModelForImageClassification.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    lt.adapt(model, "dora", where="conv", also_train=["classifier"])
    lt.save(model, tmp_path / "adapter")
    written = (tmp_path / "adapter" / "adapter.safetensors").stat().st_size
    assert plan.adapter_bytes == pytest.approx(written, abs=64)


def test_each_device_holds_its_share():
    parts = {
        "weights": 1000,
        "adapters": 100,
        "gradients": 50,
        "optimizer": 200,
        "activations": 700,
        "logits": 30,
        "temporaries": 7,
    }
    blocks = Blocks(largest=120, outside=90, gradients=11, count=4)
    assert on_each(parts, 100, 1, "none", blocks) == parts
    assert on_each(parts, 100, 4, "ddp", blocks) == parts | {"gradients": 150}
    assert on_each(parts, 100, 4, "fsdp", blocks) == parts | {
        "weights": 250 + 90 + 240, "adapters": 25, "gradients": 13, "optimizer": 50, "temporaries": 18,
    }  # fmt: skip


def test_blocks_are_the_models_own():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, vocab_size=96
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    blocks = blocks_of(model.requires_grad_(False))
    whole = sum(4 * p.numel() for p in model.parameters())
    assert (blocks.count, blocks.gradients) == (3, 0)
    assert blocks.outside + 3 * blocks.largest == whole
    assert blocks_of(nn.Linear(4, 4, bias=False)) == Blocks(64, 0, 64, 1)


def test_several_devices_need_a_way_to_share(tmp_path):
    with pytest.raises(ValueError, match="devices is 2 and sharding is 'none'; it must be 'ddp'"):
        lt.plan(keys_of("llama", {}, tmp_path), devices=2)


@pytest.mark.parametrize(
    ("given", "bytes"),
    [
        ("RTX 4090", 24564 * MIB - RESERVED), ("nvidia geforce rtx 4090", 24564 * MIB - RESERVED), ("4090", 24564 * MIB - RESERVED),
        ("a100-80GB", 81920 * MIB - RESERVED), ("A100 40", 40960 * MIB - RESERVED), ("Tesla T4", 15360 * MIB - RESERVED),
        ("24GB", 24 * 10**9), ("24 GiB", 24 * GIB), ("1.5gib", 3 * GIB // 2), ("1000", 1000), (7, 7),
    ],
)  # fmt: skip
def test_budgets(given, bytes):
    assert budget(given) == bytes


def test_every_card_is_found_by_its_own_name():
    assert {name: budget(name) for name in CARDS} == {name: size * MIB - RESERVED for name, size in CARDS.items()}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("RTX 4099", ValueError, "card 'RTX 4099' is not known; nearest names: RTX 4090"),
        ("A100", ValueError, "card 'A100' is not known; nearest names: A10"),
        ("0GB", ValueError, "the budget is '0GB'; it must be more than 0 bytes"),
        (1.5, TypeError, "the budget is 1.5; it must be a card's name"),
    ],
)
def test_budgets_that_are_none(given, error, words):
    with pytest.raises(error, match=words):
        budget(given)


def test_sizes_for_people():
    assert [shown(n) for n in (2048, 3 * MIB, 539 * MIB, 12 * GIB)] == ["2 KiB", "3.0 MiB", "539 MiB", "12.0 GiB"]


def test_a_step_takes_its_products_its_traffic_and_its_calls():
    rates = Rates("this", {"float32": 100.0, "bfloat16": 50.0}, 10.0, 0.5)
    assert rates.seconds({torch.float32: 200, torch.bfloat16: 100}, 30, 4) == 2 + 2 + 3 + 2
    assert rates.seconds({torch.float16: 100}, 0, 0) == 2  # a format that was not measured counts as the slowest


def test_products_are_counted(tmp_path):
    keys = keys_of("llama", {"method": "full", "max_length": 16}, tmp_path)
    job = job_of(planned_settings(keys, {"per_device_train_batch_size": 2}))
    plan = plan_job(job)
    matrices = sum(p.numel() for n, p in job.build().named_parameters() if p.dim() == 2 and "embed" not in n)
    attention = 2 * 2 * 2 * 4 * 16 * 16 * 16  # blocks, products, batch, heads, length, length, head_dim
    assert sum(plan.trace.flops.values()) >= 3 * 2 * 32 * matrices - 2 * 32 * 64 * 64 * 4
    assert sum(plan.trace.flops.values()) <= 3 * 2 * 32 * matrices + 8 * 2 * attention


def test_a_machine_is_timed_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("LORATORY_CACHE", str(tmp_path))
    assert rates_of("cpu") is None
    rates = rates_of("cpu", calibrate=True)
    assert rates is not None
    assert min(rates.flops.values()) > 0
    assert rates.bytes > 0
    assert rates_of("cpu") == rates
    assert list(json.loads((tmp_path / "calibration.json").read_text())) == [rates.machine]
    plan = lt.plan(keys_of("llama", {"device": "cpu"}, tmp_path))
    assert plan.step_seconds == rates.seconds(plan.trace.flops, plan.trace.moved, plan.trace.operations)


@pytest.mark.parametrize("changes", [{"method": "lora"}, {"method": "full", "gradient_checkpointing": True}])
def test_a_deep_model_is_planned_from_shallow_ones(changes, tmp_path):
    keys = keys_of("llama", changes, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    job = job_of(planned_settings(keys, {}))
    line, whole = plan_deep(job), plan_job(job)
    assert job.depth == 6
    assert line.peak == pytest.approx(whole.peak, rel=1e-3)
    assert (line.trained, line.total, line.startup) == (whole.trained, whole.total, whole.startup)
    assert line.adapter_bytes == pytest.approx(whole.adapter_bytes, rel=0.02)


def test_blocks_of_several_kinds_are_not_cut(tmp_path):
    keys = keys_of("llama", {"per_layer": {"q_proj": {"rank": 2}}}, tmp_path)
    assert job_of(planned_settings(keys, {})).depth is None


@pytest.mark.parametrize(("channels", "outputs", "kernel"), [(16, 32, 3), (32, 16, 3), (16, 48, 5), (64, 32, 1)])
def test_a_convolution_copies_what_it_copies(channels, outputs, kernel):
    conv = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=False)
    x = torch.randn(2, channels, 24, 24)
    with torch.no_grad():
        y = conv(x)
        inside = workspace(torch.ops.aten.convolution.default, (x, conv.weight), y)
        assert rise(lambda: conv(x)) == y.numel() * 4 + inside


def test_pieces_that_are_left_out_are_counted(tmp_path, monkeypatch):
    keys = keys_of("llama", {"quantize": "int8", "max_length": 16}, tmp_path)
    whole = lt.plan(keys).trace
    monkeypatch.setattr(recomputed, "MOST", 64 * 8)  # rows of 64 numbers, 8 at a time
    pieces = lt.plan(keys).trace
    assert pieces.flops == whole.flops
    assert pieces.operations > whole.operations
