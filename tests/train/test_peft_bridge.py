"""PEFT's tuners in `loratory train`: every type of PEFT 0.21 trains, is saved as PEFT's folder and opened again."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loratory as lt
from loratory.cli import main
from loratory.tasks.data import read_rows
from loratory.train import read_settings, train
from loratory.train.opened import open_adapter
from loratory.train.peft_bridge import STATE, write_merged

peft = pytest.importorskip("peft")

STORIES = Path(__file__).parents[1] / "models" / "stories260k"
RESNET = Path(__file__).parents[1] / "models" / "resnet20"
DRAWN = Path(__file__).parents[2] / "data" / "omniglot"
TEXT: dict[str, Any] = {"num_virtual_tokens": 3}
OPTIONS: dict[str, dict[str, Any]] = {  # what a tuner needs on a base of width 64
    "adalora": {"init_r": 4, "target_r": 2, "deltaT": 1},
    "adaption_prompt": {"adapter_len": 3, "adapter_layers": 2},
    "adamss": {"target_modules": ["q_proj"]},
    "c3a": {"block_size": 4},
    "cartridge": {"num_virtual_tokens": 3},
    "cpt": {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "fourierft": {"n_frequency": 20},
    "gralora": {"r": 4, "gralora_k": 2},
    "multitask_prompt_tuning": TEXT | {"num_tasks": 1},
    "p_tuning": TEXT | {"encoder_hidden_size": 8},
    "poly": {"r": 2, "n_tasks": 1, "n_skills": 2},
    "prefix_tuning": TEXT,
    "prompt_tuning": TEXT,
    "road": {"group_size": 4},
    "shadow": {"target_modules": r"model\.layers\.\d+"},
    "shira": {"r": 2},
    "trainable_tokens": {"token_indices": [5, 6, 7], "target_modules": ["embed_tokens"]},
    "vblora": {"vector_length": 4, "num_vectors": 16, "topk": 2},
    "waveft": {"n_frequency": 20},
}
NOT_MERGED = {
    "adaption_prompt", "beft", "cartridge", "cpt", "lily", "multitask_prompt_tuning", "p_tuning", "poly", "prefix_tuning", "prompt_tuning",
    "shadow", "xlora",
}  # fmt: skip


def tuners() -> list[str]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return sorted(str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def quietly(**settings: Any) -> Any:
    return train(say=lambda line: None, **settings)


def bits(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", tuners())
def test_every_tuner_trains_and_is_opened_again(name, keys, tmp_path):
    where = {"where": None, "rank": None}
    options = {"adapters": experts(tmp_path)} if name == "xlora" else OPTIONS.get(name, {})
    quietly(**keys(method=f"peft:{name}", peft=options, max_steps=2, learning_rate=1e-2, **where))
    assert {path.name for path in (tmp_path / "out" / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "loratory.json",
    }
    assert not list((tmp_path / "out").rglob("*.bin"))
    opened = open_adapter(tmp_path / "out", device="cpu")
    ids = torch.randint(5, 500, (2, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = opened.model(**batch).logits
        with opened.without():
            plain = opened.model(**batch).logits
    assert logits.shape == (2, 7, 512)
    assert torch.isfinite(logits).all()
    base = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    assert not torch.equal(logits, plain)
    if name not in ("ln_tuning", "osf"):
        assert torch.allclose(plain, base(**batch).logits, atol=1e-4)
    logged = json.loads((tmp_path / "out" / "result.json").read_text())["after"]["token_loss"]
    rows = [json.loads(line) for line in (tmp_path / "data" / "dev.jsonl").read_text().splitlines()]
    again = opened.task.evaluate(opened.model, opened.tokenizer, rows)["token_loss"]
    assert again == pytest.approx(logged, rel=1e-4)  # what is opened is what was trained
    options = {"tokenizer": opened.tokenizer, "tolerance": 1e-4, "overwrite": False}
    if name in NOT_MERGED:
        with pytest.raises(ValueError, match="PEFT cannot merge"):
            write_merged(opened.model, "x", tmp_path / "merged", **options)
        return
    write_merged(opened.model, "x", tmp_path / "merged", **options)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(**batch).logits, logits, atol=5e-3)


@pytest.mark.parametrize(
    ("method", "options"), [("vera", {"r": 4}), ("adalora", OPTIONS["adalora"] | {"tinit": 1, "tfinal": 1})]
)
def test_a_resumed_run_ends_with_the_same_bits(keys, tmp_path, method, options):
    usual = {"where": "q_proj", "rank": None, "max_steps": 6, "save_total_limit": None, "learning_rate": 1e-2}
    settings = keys(method=f"peft:{method}", peft=options, **usual)
    quietly(**settings)
    out = tmp_path / "out"
    wanted = bits(out)
    for gone in ("adapter", "checkpoint-4", "checkpoint-6"):
        shutil.rmtree(out / gone)
    quietly(**settings, resume=True)
    assert bits(out) == wanted


def test_the_verbs_work_on_it(keys, tmp_path, capsys):
    flags = ["--peft.target_modules", "q_proj,v_proj", "--peft.r", "4", "--learning_rate", "0.02"]
    given = keys(method="peft:vera", where=None, rank=None)
    words = [word for key, value in given.items() if key != "eval_before" for word in (f"--{key}", str(value))]
    assert main(["train", *words, *flags, "--no-eval_before", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    out = str(tmp_path / "out")
    assert main(["inspect", out]) == 0
    assert "method   peft:vera (peft.target_modules=['q_proj', 'v_proj'], peft.r=4)" in capsys.readouterr().out
    assert main(["eval", out, "--data", given["dev"], "--without", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"]["token_loss"] == pytest.approx(result["after"]["token_loss"], rel=1e-4)
    assert found["adapter"]["token_loss"] < found["base"]["token_loss"]
    assert main(["generate", out, "dev place 1", "--max_new_tokens", "3", "--json"]) == 0
    assert "answer" in json.loads(capsys.readouterr().out)
    assert main(["export", out, str(tmp_path / "exported")]) == 0
    assert main(["merge", out, str(tmp_path / "merged")]) == 0
    ids = torch.randint(5, 500, (2, 7))
    base = AutoModelForCausalLM.from_pretrained(STORIES)
    beside = peft.PeftModel.from_pretrained(base, str(tmp_path / "exported")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(beside(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4)


def test_prompts_are_trained_measured_and_not_merged(keys, tmp_path, capsys):
    quietly(**keys(method="peft:prompt_tuning", peft=TEXT, where=None, rank=None, learning_rate=0.1))
    assert main(["generate", str(tmp_path / "out"), "dev place 1", "--max_new_tokens", "3", "--json"]) == 0
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "merged")]) == 2
    assert "PEFT cannot merge the PromptTuning adapter" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_convolutions_heads_and_batch_norms_of_an_image_classifier(tmp_path):
    given = {
        "task": "image",
        "base": str(RESNET),
        "trust_remote_code": True,
        "train": str(DRAWN),
        "where": "conv",
        "device": "cpu",
    }
    given |= {"method": "peft:lora", "peft": {"r": 2}, "max_steps": 2, "train_rows": 30, "dev_rows": 4, "test_rows": 4}
    result = quietly(**given, output_dir=str(tmp_path / "out"), eval_before=False)
    opened = open_adapter(tmp_path / "out", device="cpu")
    assert opened.task.name == "image"
    scored = opened.task.evaluate(
        opened.model,
        opened.tokenizer,
        read_rows(DRAWN, split="test")[:4],
    )
    assert scored["accuracy"] == result.test_after["accuracy"]
    stored = opened.model.get_base_model().net.bn1.running_mean
    assert torch.equal(stored, load_file(RESNET / "model.safetensors")["net.bn1.running_mean"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "peft:vrea"}, "PEFT has no tuner 'peft:vrea'; nearest names: peft:vera"),
        ({"peft": {"rr": 4}}, r"there is no setting 'peft\.rr'; nearest names: peft\.r"),
        ({"rank": 4}, "there is no setting 'rank'"),
        ({"peft": {"r": "eight"}}, "PEFT cannot attach peft:vera with r='eight'"),
        ({"bias": "all"}, "bias is for Loratory's own methods"),
        ({"method": "peft:prompt_tuning", "peft": TEXT, "where": "mlp"}, "where and exclude have no meaning for peft:prompt_tuning"),
        ({"peft": {"target_modules": ["q_proj"]}, "where": "mlp"}, r"peft\.target_modules is given too"),
        ({"method": "peft:adaption_prompt", "peft": OPTIONS["adaption_prompt"], "also_train": ["norm"]}, "trains no module in full"),
        ({"method": "peft:adamss", "peft": {"use_asa": True}}, r"peft\.use_asa keeps running sums"),
        ({"where": "nothing_so_called"}, "where names 'nothing_so_called'"),
    ],
)  # fmt: skip
def test_mistakes(keys, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        quietly(**keys(**{"method": "peft:vera", "where": None, "rank": None} | changes))
    assert not (tmp_path / "out").exists()


def test_settings_come_back_from_their_file(keys):
    settings = read_settings(
        keys(method="peft:vera", where=None, rank=None, **{"peft.r": "4", "peft.target_modules": "q_proj"})
    )
    assert settings.method_options == {"peft.r": 4, "peft.target_modules": ["q_proj"]}
    assert read_settings(settings.flat()) == settings
    nested = keys(method="peft:vera", where=None, rank=None, peft={"r": 4, "target_modules": ["q_proj"]})
    assert read_settings(nested) == settings
    mixed = read_settings(keys(method="peft:xlora", rank=None, **{"peft.adapters": "{a: one/folder, b: two}"}))
    assert mixed.method_options == {"peft.adapters": {"a": "one/folder", "b": "two"}}
    assert read_settings(mixed.flat()) == mixed


def test_help_shows_the_tuner_s_options(capsys):
    assert main(["train", "--method", "peft:vera", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Method VeraConfig of PEFT" in shown
    assert "--peft.save_projection" in shown


def test_damage_and_another_base_are_refused(keys, tmp_path):
    quietly(**keys(method="peft:vera", where=None, rank=None, max_steps=2))
    folder = tmp_path / "out" / "adapter"
    other = AutoModelForCausalLM.from_pretrained(STORIES)
    other.model.layers[0].mlp.up_proj.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    shutil.copy(STORIES / "tokenizer.json", tmp_path / "other")
    shutil.copy(STORIES / "tokenizer_config.json", tmp_path / "other")
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj.weight' holds other numbers"):
        open_adapter(folder, str(tmp_path / "other"))
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="its checksum differs"):
        open_adapter(folder)
    (folder / "loratory.json").write_text("{}")
    with pytest.raises(ValueError, match=r"loratory\.json' cannot be read"):
        open_adapter(folder)
    (tmp_path / "out" / "checkpoint-2" / STATE).unlink()
    with pytest.raises(ValueError, match=f"{STATE} is missing"):
        quietly(**keys(method="peft:vera", where=None, rank=None, max_steps=2), resume=True)


def test_without_peft_the_error_says_how_to_get_it(keys, monkeypatch):
    from loratory.train.peft_bridge import tuner

    tuner.cache_clear()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"method peft:vera needs PEFT; run: pip install 'loratory\[peft\]'"):
        read_settings(keys(method="peft:vera", where=None, rank=None))


def test_a_merge_that_changes_the_function_is_not_written(keys, tmp_path):
    quietly(**keys(method="peft:lora", peft={"r": 2}, where=None, rank=None, max_steps=2))
    opened = open_adapter(tmp_path / "out", device="cpu")
    unload = opened.model.base_model.merge_and_unload

    def wrong() -> Any:
        merged = unload()
        merged.model.layers[0].mlp.up_proj.weight.data += 0.1
        return merged

    opened.model.merge_and_unload = wrong
    with pytest.raises(RuntimeError, match="the merged model is another one, so nothing was written"):
        write_merged(
            opened.model, "x", tmp_path / "merged", tokenizer=opened.tokenizer, tolerance=None, overwrite=False
        )
    assert not (tmp_path / "merged").exists()


def experts(folder: Path, **options: Any) -> dict[str, str]:
    """Two LoRA folders as PEFT writes them."""
    out = {}
    for seed, name in enumerate(("left", "right")):
        torch.manual_seed(seed)
        config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
        lora = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(STORIES), peft.LoraConfig(**config))
        lora.save_pretrained(folder / name)
        out[name] = str(folder / name)
    return out


@pytest.mark.parametrize("trained", [False, True])
def test_xlora_trains_its_classifier_and_is_saved_whole(keys, tmp_path, capsys, trained):
    """PEFT's own save_pretrained leaves the classifier's tensors out."""
    folders = experts(tmp_path)
    options = {"adapters": folders, "xlora_depth": 2, "xlora_size": 8, "use_trainable_adapters": trained}
    given = keys(method="peft:xlora", peft=options, where=None, rank=None, learning_rate=1e-2, save_total_limit=None)
    result = quietly(**given)
    out = tmp_path / "out"
    held = load_file(out / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.internal_xlora_classifier.layers."
    assert set(held) == {prefix + name for name in ("0.weight", "0.bias", "3.weight", "3.bias")}
    for number, folder in zip("01", folders.values(), strict=True):
        wanted = load_file(Path(folder) / "adapter_model.safetensors")
        found = load_file(out / "adapter" / "experts" / number / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted) is not trained
    first = bits(out)
    for gone in ("adapter", "checkpoint-4"):
        shutil.rmtree(out / gone)
    quietly(**given, resume=True)
    assert bits(out) == first
    for folder in folders.values():  # the adapter holds its experts
        shutil.rmtree(folder)
    opened = open_adapter(out, device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "data" / "dev.jsonl").read_text().splitlines()]
    again = opened.task.evaluate(opened.model, opened.tokenizer, rows)["token_loss"]
    assert again == pytest.approx(result.after["token_loss"], rel=1e-4)
    assert main(["inspect", str(out)]) == 0
    assert main(["generate", str(out), "dev place 1", "--max_new_tokens", "3"]) == 0
    assert main(["export", str(out), str(tmp_path / "exported")]) == 0
    assert main(["merge", str(out), str(tmp_path / "merged")]) == 2
    assert "weighs its experts anew for every token" in capsys.readouterr().err
    base = AutoModelForCausalLM.from_pretrained(STORIES)
    base.config.use_cache = False
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "exported")).eval()
    ids = torch.randint(5, 500, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = opened.model(input_ids=ids).logits
        assert torch.equal(theirs(input_ids=ids).logits, logits)
        with opened.without():
            plain = opened.model(input_ids=ids).logits
        assert torch.equal(plain, AutoModelForCausalLM.from_pretrained(STORIES)(input_ids=ids).logits)
        assert not torch.equal(plain, logits)
    with (out / "adapter" / "experts" / "1" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ValueError, match="its checksum differs"):
        open_adapter(out, device="cpu")


def test_mistakes_about_xlora_s_experts(keys, tmp_path):
    def refused(message: str, **options: Any) -> None:
        more = {"gradient_checkpointing": options.pop("gradient_checkpointing", False)}
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            quietly(**keys(method="peft:xlora", peft=options, where=None, rank=None, **more))
        assert not (tmp_path / "out").exists()

    folders = experts(tmp_path)
    refused("peft.adapters is None; peft:xlora mixes finished LoRA adapters, so name at least two")
    refused("name at least two", adapters={"left": folders["left"]})
    refused("there is no folder", adapters=folders | {"left": str(tmp_path / "nowhere")})
    file = tmp_path / "classes.jsonl"
    file.write_text("".join(json.dumps({"text": f"dog {i}", "label": "ab"[i % 2]}) + "\n" for i in range(8)))
    task = {"task": "classification", "train": str(file), "dev": str(file), "where": None, "rank": None}
    with pytest.raises(ValueError, match="trains nothing beside its own tensors, and this task's head 'score'"):
        quietly(**keys(method="peft:xlora", peft={"adapters": folders}, **task))
    refused("gradient_checkpointing runs layers again", adapters=folders, gradient_checkpointing=True)
    full = experts(tmp_path / "full", modules_to_save=["norm"])
    refused(
        r"expert 'right' in '.*' must be a plain LoRA .*modules_to_save \['norm'\]",
        adapters=folders | {"right": full["right"]},
    )
    file = tmp_path / "left" / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = next(key for key in tensors if "layers.1." in key)
    save_file({key: t for key, t in tensors.items() if key != gone}, file)
    refused(f"adapter_model.safetensors' lacks '{gone}'", adapters=folders)
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    lt.adapt(model, lt.LoRA(rank=2))
    lt.save(model, tmp_path / "ours")
    refused(
        "expert 'left' in '.*' must be in PEFT's format; write it with",
        adapters=folders | {"left": str(tmp_path / "ours")},
    )
