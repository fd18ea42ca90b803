"""Merged models that plain transformers loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratory as lt
from tests.oracle.pairs import randomised

X = torch.arange(5, 25).reshape(2, 10)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X).logits


def adapted(model: Any, **options: Any) -> Any:
    lt.adapt(model, options.pop("method", lt.LoRA(rank=2)), **options)
    randomised(model)
    return model


CASES: dict[str, tuple[dict[str, Any], bool]] = {  # options, still tied
    "lora": ({"where": ["q_proj", "down_proj"]}, True),
    "dora": ({"method": lt.DoRA(rank=2), "where": "attention"}, True),
    "also trained, tied": ({"where": ["q_proj"], "also_train": ["embed_tokens"]}, True),
    "also trained, parted": ({"where": ["q_proj"], "also_train": ["lm_head"], "untie": True}, False),
    "full": ({"method": lt.Full()}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merged_folder_is_a_plain_model(case: str, stories: Callable[[], Any], tmp_path: Path) -> None:
    options, tied = CASES[case]
    model = stories()
    tokenizer = model.tokenizer
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted(model, **options)
    wanted = logits(model)
    check = lt.export(model, tmp_path / "out", tokenizer=tokenizer)
    assert check is not None
    assert check.relative <= check.tolerance == 1e-5
    assert torch.equal(logits(model), wanted)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert float((logits(plain) - wanted).abs().max()) <= 1e-5 * float(wanted.max() - wanted.min())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is tied
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Once")["input_ids"] == tokenizer("Once")["input_ids"]
    lt.detach(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_weight_is_not_merged_without_a_word(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted(stories(), where=["lm_head", "q_proj"])
    with pytest.raises(
        ValueError,
        match=r"layer 'lm_head' shares its weight with 'model.embed_tokens', so merging would change both; pass untie=True",
    ):
        lt.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wanted = logits(model)
    lt.merge(model, untie=True)
    lt.export(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.tie_word_embeddings is False
    assert float((logits(plain) - wanted).abs().max()) <= 1e-5 * float(wanted.max() - wanted.min())
    lt.unmerge(model)
    assert torch.equal(logits(model), wanted)


def test_a_folder_with_something_in_it_is_left_alone(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted(stories(), where=["q_proj"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for to in ("merged", "peft"):
        with pytest.raises(
            FileExistsError, match=r"the folder '.*out' is not empty; give another one, or pass overwrite=True"
        ):
            lt.export(model, tmp_path / "out", to=to)  # type: ignore[arg-type]
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match=r"file' is a file; give a folder"):
        lt.export(model, tmp_path / "file")
    lt.export(model, tmp_path / "out", to="peft", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_failed_export_leaves_the_model_and_nothing_on_disk(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted(stories(), where=["q_proj"])
    wanted = logits(model)
    with pytest.raises(RuntimeError, match=r"merge check on .*\(allowed 1e-12\); the merge was undone"):
        lt.export(model, tmp_path / "out", tolerance=1e-12)

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        lt.export(model, tmp_path / "out", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(model), wanted)
    lt.detach(model)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lt.adapt(model, lt.LoRA(rank=1))
    with pytest.raises(TypeError, match=r"a Sequential is no transformers model, so it has no save_pretrained folder"):
        lt.export(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"to is 'onnx'; it must be merged, peft or gguf"):
        lt.export(model, tmp_path / "out", to="onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_save_pretrained_merged(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted(stories(), where=["q_proj"])
    model.save_pretrained(tmp_path / "out", merged=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(plain), logits(model), atol=1e-4)


def test_ties_are_those_of_the_base_whatever_adapter_is_active(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = adapted(stories(), name="parted", where=["q_proj"], also_train=["lm_head"], untie=True)
    with pytest.raises(ValueError, match=r"the head's weight 'lm_head.weight' is also 'model.embed_tokens.weight'"):
        lt.adapt(model, lt.HeadOnly(), name="head")
    adapted(model, name="tied", where=["q_proj"], also_train=["lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name in ("parted", "tied"):
        lt.use(model, name)
        wanted = logits(model)
        lt.export(model, tmp_path / name)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert plain.config.tie_word_embeddings is (name == "tied")
        assert float((logits(plain) - wanted).abs().max()) <= 1e-5 * float(wanted.max() - wanted.min())


def test_a_merged_model_is_cut_into_files_of_a_size(stories: Callable[[], Any], tmp_path: Path) -> None:
    model = stories()
    lt.adapt(model, lt.LoRA(rank=2), seed=1)
    lt.export(model, tmp_path / "one")
    lt.export(model, tmp_path / "many", max_shard_size="300KB")
    model.save_pretrained(tmp_path / "others", merged=True, max_shard_size="300KB")
    assert [p.name for p in (tmp_path / "one").glob("model*.safetensors")] == ["model.safetensors"]
    for cut in ("many", "others"):
        assert len(list((tmp_path / cut).glob("model-*-of-*.safetensors"))) > 2
        mine, theirs = (type(model).__mro__[1].from_pretrained(tmp_path / each).state_dict() for each in ("one", cut))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
