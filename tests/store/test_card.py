"""The model card says what the folder says, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import loratory as lt
from loratory.cli import main
from loratory.store.card import card, hub_name
from tests.oracle.pairs import randomised
from tests.runtime.models import IDS, Tiny, tiny_bert
from tests.store.test_round_trip import logits

RECORD = {
    "settings": {"method": "lora", "rank": 2, "train": "ann/recipes", "learning_rate": 2e-4, "output_dir": "/home/ann/out", "dev": None},
    "data": {"train": {"rows": 12, "sha256": "00"}},
    "versions": {"torch": "2.13.0"},
    "base": "ann/stories",
    "result": {"before": {"perplexity": 101.39}, "after": {"perplexity": 50.5}, "test_before": {}, "test_after": {"f1": 0.25},
               "trained": 1280, "total": 260032, "steps": 9, "seconds": 12.0},
}  # fmt: skip


def header(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


def saved(model: Any, folder: Path, **options: Any) -> str:
    lt.save(model, folder, card=True, **options)
    return (folder / "README.md").read_text()


def test_header_and_body_come_from_the_record(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = stories()
    lt.adapt(
        model,
        lt.LoRA(rank=2),
        ["q_proj"],
        per_layer={"layers.0.self_attn.q_proj": {"rank": 1}},
        also_train=["model.norm"],
    )
    text = saved(model, tmp_path, training=RECORD)
    assert header(text) == {
        "base_model": "ann/stories",
        "base_model_relation": "adapter",
        "library_name": "loratory",
        "datasets": ["ann/recipes"],
        "tags": ["lora", "loratory"],
    }
    for line in (
        "| rank | 2 |",
        "- `model.layers.*.self_attn.q_proj` (5 layers)",
        "- `model.norm.weight`: in full",
        "| `model.layers.0.self_attn.q_proj` | rank 1 |",
        "1,280 of the 260,032 numbers of the model were trained.",
        "| learning_rate | 0.0002 |",
        "| train rows | 12 |",
        "| dev perplexity | 101.3900 | 50.5000 |",
        "| test f1 |  | 0.2500 |",
        "| torch version | 2.13.0 |",
    ):
        assert line in text
    assert "/home/ann" not in text
    assert str(Path(__file__).parents[1]) not in text  # where the base lies on this machine


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    model = Tiny()
    lt.adapt(model, lt.DoRA(rank=2), ["q_proj"])
    text = saved(model, tmp_path)
    assert header(text) == {"library_name": "loratory", "tags": ["dora", "loratory"]}
    assert "## Training" not in text
    assert "were trained" not in text
    assert "model = ...  # the base: Tiny" in text


def test_its_code_runs(stories: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stories()
    lt.adapt(model, lt.LoRA(rank=2), ["q_proj"])
    randomised(model)
    text = saved(model, tmp_path / "out").replace("PATH/OF/THIS/FOLDER", "out")
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    place: dict[str, Any] = {}
    exec(code.replace("PATH/OF/stories260k", model.config._name_or_path), place)
    assert torch.equal(logits(place["model"]), logits(model))


def test_the_head_has_as_many_labels_as_the_task(tmp_path: Path) -> None:
    model = tiny_bert()
    model.config._name_or_path = "ann/bert"
    lt.adapt(model, lt.LoRA(rank=2), ["query"], also_train=["classifier"])
    text = saved(model, tmp_path, training={"task": {"name": "classification", "labels": ["a", "b", "c"]}})
    assert 'AutoModelForSequenceClassification.from_pretrained("ann/bert", num_labels=3)' in text


def test_an_export_keeps_the_record(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = stories()
    lt.adapt(model, lt.MergedLoRA(groups=(True, False), rank=2), ["gate_proj"])
    lt.save(model, tmp_path / "a", training=RECORD | {"settings": {"method": "merged-lora"}})
    lt.detach(model)
    lt.load(model, tmp_path / "a")
    lt.export(model, tmp_path / "out", to="peft", card=True)
    text = (tmp_path / "out" / "README.md").read_text()
    assert (header(text)["library_name"], header(text)["base_model"]) == ("peft", "ann/stories")
    assert "| method | merged-lora |" in text
    assert "| dev perplexity | 101.3900 | 50.5000 |" in text
    assert "PeftModel.from_pretrained(model, " in text
    with pytest.raises(ValueError, match=r"card=True describes an adapter, but to='merged' writes a whole model"):
        lt.export(model, tmp_path / "merged", card=True)
    assert not (tmp_path / "merged").exists()


def test_printed_by_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Tiny()
    lt.adapt(model, lt.LoRA(rank=2), ["q_proj"])
    lt.save(model, tmp_path)
    assert main(["inspect", str(tmp_path), "--card"]) == 0
    assert capsys.readouterr().out == card(lt.inspect(tmp_path))
    assert not (tmp_path / "README.md").exists()
    assert model(IDS).shape == (2, 4, 11)


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "base").mkdir(parents=True)
    for name in ("ann/stories", "Qwen/Qwen2.5-0.5B", "openai/whisper-tiny.en"):
        assert hub_name(name) == name
    for name in (
        None,
        "",
        "gpt2",
        "smollm2-135m",
        "/data/llama",
        "a/b/c",
        "mine/base",
        "data/train.jsonl",
        "./a/b",
        "~/llama",
    ):
        assert hub_name(name) is None, name
