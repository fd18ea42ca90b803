"""A quantised base exported as a plain full-precision model, merged without rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratory as lt
from tests.store.gguf_files import tiny_model, write_gguf

IDS = torch.arange(2, 34).view(2, 16)


def nf4(tmp_path: Path) -> Any:
    model = tiny_model()
    lt.quantize(model, "nf4")
    return model


def gguf(tmp_path: Path) -> Any:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    return lt.load_gguf(write_gguf(tmp_path / "m.gguf", tiny_model(), "llama", "Q4_1"))


def bitsandbytes(bits: int) -> Callable[[Path], Any]:
    def make(tmp_path: Path) -> Any:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        tiny_model().save_pretrained(tmp_path / "plain")
        config: dict[str, Any] = {"load_in_8bit": True}
        if bits == 4:
            config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", quantization_config=BitsAndBytesConfig(**config), dtype=torch.float32
        ).eval()

    return make


@pytest.mark.parametrize("method", [lt.LoRA(rank=2), lt.DoRA(rank=2)], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("make", "limit"),
    [(nf4, 1e-5), (gguf, 1e-5), (bitsandbytes(4), 1e-5), (bitsandbytes(8), 5e-2)],
    ids=["nf4", "gguf", "bnb4", "bnb8"],
)
def test_the_folder_is_the_adapted_model_in_full_precision(
    tmp_path: Path, make: Callable[[Path], Any], limit: float, method: lt.Method
):
    from transformers import AutoModelForCausalLM

    model = make(tmp_path)
    lt.adapt(model, method)
    with torch.no_grad():
        for p in lt.trained(model).values():
            p += 0.05 * torch.randn_like(p)
        adapted = model(IDS).logits
    check = lt.export(model, tmp_path / "out", dequantize=True, probe=IDS, tolerance=None if limit < 1e-2 else limit)
    assert check is not None
    assert check.relative <= limit
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not getattr(plain.config, "quantization_config", None)
    with torch.no_grad():
        error = (plain(IDS).logits - adapted).abs().max() / (adapted.max() - adapted.min())
        assert float(error) <= limit
        assert torch.equal(model(IDS).logits, adapted)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}


def test_a_plain_folder_of_packed_layers_is_refused(tmp_path: Path):
    model = nf4(tmp_path)
    lt.adapt(model, lt.LoRA(rank=2))
    with pytest.raises(
        ValueError, match=r"layer 'model.layers.0.self_attn.q_proj' and 13 more are stored packed.*dequantize=True"
    ):
        lt.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_difference_above_the_limit_writes_nothing(tmp_path: Path):
    model = nf4(tmp_path)
    lt.adapt(model, lt.LoRA(rank=2))
    with pytest.raises(RuntimeError, match="nothing was written"):
        lt.export(model, tmp_path / "out", dequantize=True, tolerance=-1.0)
    assert not (tmp_path / "out").exists()


def test_peft_format_is_written_and_runs_on_the_full_base(tmp_path: Path):
    model = nf4(tmp_path)
    lt.adapt(model, lt.LoRA(rank=2))
    with pytest.warns(UserWarning, match="trained on a quantised base"):
        lt.export(model, tmp_path / "peft", to="peft")
    plain = tiny_model()
    lt.load(plain, tmp_path / "peft")
    assert lt.active(plain) == ("default",)


def test_trainer_accepts_a_bitsandbytes_base_with_adapters(tmp_path: Path):
    from transformers import Trainer, TrainingArguments

    model = bitsandbytes(4)(tmp_path)
    lt.adapt(model, lt.LoRA(rank=2))
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    trainer = Trainer(model, arguments, train_dataset=rows)
    assert trainer.train().global_step == 2
    trainer.save_model(tmp_path / "saved")
    assert lt.inspect(tmp_path / "saved").method == "lora"
    lt.detach(model)
    assert not model._hf_peft_config_loaded
