"""The command line, run inside this process."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratory.cli import VERBS, main
from loratory.cli.arguments import read_flags
from loratory.cli.init import recipe
from loratory.methods.registry import METHODS
from loratory.tasks import TASKS
from loratory.train.settings import read_settings

STORIES = Path(__file__).parents[1] / "models" / "stories260k"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short run, started from the command line with a YAML file."""
    folder = tmp_path_factory.mktemp("cli")
    for split, count in (("train", 12), ("dev", 3)):
        rows = [{"prompt": f"{split} {i}", "completion": "Yes, it is."} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "base": str(STORIES), "train": str(folder), "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "max_steps": 9,
        "eval_before": False, "output_dir": str(folder / "out"),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert (
        main(
            [
                "train",
                "--config",
                str(folder / "recipe.yaml"),
                "--lora-rank",
                "2",
                "--max_steps",
                "2",
                "--max-new-tokens=8",
                "--where",
                "q_proj",
                "o_proj",
            ]
        )
        == 0
    )
    return folder / "out"


def test_flags_win_over_the_yaml_file(trained: Path) -> None:
    settings = yaml.safe_load((trained / "settings.yaml").read_text())
    assert (settings["rank"], settings["alpha"], settings["max_steps"], settings["where"]) == (
        2,
        8.0,
        2,
        ["q_proj", "o_proj"],
    )


def test_overview_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)
    for verb in set(VERBS) - {"demo"}:
        assert main([verb, "--help"]) == 0
        assert f"usage: loratory {verb}" in capsys.readouterr().out
    assert main(["train", "--method", "dora", "--task", "tagging", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Method DoRA:" in shown
    assert "--tags_column TEXT" in shown
    assert "--lr_ratio" not in shown  # LoRA's
    assert "default: None" not in shown


def test_help_does_not_import_transformers() -> None:
    code = (
        "import sys; from loratory.cli import main; main(['train', '--help']); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("task", sorted(TASKS))
def test_recipes_are_valid_settings(method: str, task: str) -> None:
    text = recipe(method, task)
    settings = read_settings(yaml.safe_load(text))
    assert (settings.method, settings.task) == (method, task)
    uncommented = "\n".join(
        line[2:] if line.startswith("# ") and ": " in line and not line.startswith(("# --", "# A ")) else line
        for line in text.splitlines()
    )
    every = yaml.safe_load(uncommented)
    assert read_settings({key: value for key, value in every.items() if value is not None}).learning_rate == 2e-4


def test_init_writes_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    assert main(["init", str(file), "--task", "classification"]) == 0
    assert "loratory train --config" in capsys.readouterr().out
    assert main(["init", str(file)]) == 2
    assert "exists; name another file, or give --overwrite" in capsys.readouterr().err


def test_flags_are_read() -> None:
    kinds = {"rank": int, "where": str | list[str], "resume": bool, "dry_run": bool, "max_steps": int}
    flags, others = read_flags(
        ["--rank", "3", "--where", "a", "b", "--resume", "--max-steps", "-1", "--new=x=y", "--no-dry-run", "--other"],
        kinds,
    )
    assert flags == {
        "rank": "3",
        "where": ["a", "b"],
        "resume": True,
        "max-steps": "-1",
        "new": "x=y",
        "dry_run": False,
        "other": True,
    }
    assert others == []
    assert read_flags(["out", "--resume", "false", "words"], kinds) == ({"resume": "false"}, ["out", "words"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["trian"], 2, "there is no verb 'trian'; nearest: train"),
        (["train"], 2, "base is missing"),
        (["train", "recipe.yaml"], 2, "did you mean --config recipe.yaml?"),
        (
            ["train", "--config", "nowhere.yaml"],
            2,
            "there is no file 'nowhere.yaml'; `loratory init nowhere.yaml` writes one",
        ),
        (["train", "--base", "x", "--train", "y", "--rang", "3"], 2, "there is no setting 'rang'; nearest names: rank"),
        (["train", "--base", "x", "--train", "y", "--r", "3", "--rank", "4"], 2, "'r' and 'rank' are the same setting"),
        (["train", "--base", "x", "--train", "y", "--rank", "few"], 2, "rank is 'few'; it must be a whole number"),
        (["train", "--base", "x", "--train"], 2, "--train needs a value"),
        (["train", "-r", "3"], 2, "'-r' is no flag; flags are written out"),
        (["train", "--base", str(STORIES), "--train", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (
            ["train", "--base", "x", "--train", "y", "--method", "lorra"],
            2,
            "there is no method 'lorra'; nearest names: lora",
        ),
        (["eval"], 2, "adapter is missing"),
        (["eval", "nowhere"], 2, "there is no folder 'nowhere'"),
        (["eval", "nowhere", "--dat", "x"], 2, "there is no flag '--dat'; nearest: --data"),
        (["eval", str(STORIES)], 2, "holds no adapter"),
        (["merge", "somewhere"], 2, "output is missing"),
        (["merge", "somewhere", "there", "more"], 2, "'more' is not expected here"),
        (["inspect", "nowhere"], 2, "there is no folder 'nowhere'"),
        (["generate", "nowhere", "--temperature", "warm", "hello"], 2, "temperature is 'warm'; it must be a number"),
        (["export", "a", "b", "--to", "onnx"], 2, "to is 'onnx'; it must be one of peft, gguf, merged"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") <= 1
    assert "Traceback" not in shown


def test_traceback_on_request_and_for_bugs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["inspect", "nowhere", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
    import loratory.cli.methods as verb

    for error, code, traceback in (
        (KeyError("bug"), 1, True),
        (MemoryError("full"), 1, False),
        (KeyboardInterrupt(), 130, False),
        (OSError(28, "No space"), 1, False),
    ):

        def fail(arguments: object, error: BaseException = error) -> int:
            raise error

        monkeypatch.setattr(verb, "run", fail)
        assert main(["methods"]) == code
        assert ("Traceback" in capsys.readouterr().err) is traceback


def test_bad_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    for text, message in (
        ("base: [", "is not valid YAML"),
        ("- base", "must hold lines `key: value`"),
        ("base: b\ntrain: t\nr: 1\nrank: 2", "'r' and 'rank' are the same"),
    ):
        file.write_text(text)
        assert main(["train", "--config", str(file)]) == 2
        assert message in capsys.readouterr().err


def test_train_json_keeps_stdout_clean(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(trained.parent / "recipe.yaml")
    assert (
        main(
            [
                "train",
                "--config",
                config,
                "--json",
                "--max_steps",
                "1",
                "--output-dir",
                str(tmp_path / "o"),
                "--bf16",
                "false",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 1
    assert Path(result["adapter"]).is_dir()


def test_eval(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--without", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 3
    assert found["adapter"]["token_loss"] != found["base"]["token_loss"]
    assert main(["eval", str(trained / "adapter"), "--data", str(trained.parent / "train.jsonl"), "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2 rows" in shown
    assert "perplexity" in shown


def test_generate(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    alone = []
    for prompt in ("One day", "A big dog ran"):
        assert main(["generate", str(trained), prompt, "--max_new_tokens", "12"]) == 0
        alone.append(capsys.readouterr().out.strip())
    assert main(["generate", str(trained), "One day", "A big dog ran", "--max_new_tokens", "12", "--json"]) == 0
    together = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
    assert together == alone  # left padding changes nothing
    (tmp_path / "prompts.txt").write_text("One day\n\nA big dog ran\n")
    assert main(["generate", str(trained), "--file", str(tmp_path / "prompts.txt"), "--max_new_tokens", "12"]) == 0
    assert alone[0] in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("One day\n"))
    assert main(["generate", str(trained), "--max_new_tokens", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == alone[0]
    assert (
        main(
            [
                "generate",
                str(trained),
                "--data",
                str(trained.parent / "dev.jsonl"),
                "--rows",
                "1",
                "--max_new_tokens",
                "4",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.strip()
    assert main(["generate", str(trained)]) == 2
    assert "there is no prompt" in capsys.readouterr().err
    assert main(["generate", str(trained), "x", "--file", "y"]) == 2
    assert "prompts come from one place" in capsys.readouterr().err
    assert main(["generate", str(trained), "x", "--max_new_tokens", "9999"]) == 2
    assert "the model has 512 positions" in capsys.readouterr().err


def test_chat(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(*lines: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", str(trained), "--max_new_tokens", "10"]) == 0
        return capsys.readouterr().out.splitlines()[1:]

    first = talk("One day")
    assert first[0].strip()
    followed = talk("One day", "And then")
    assert followed[: len(first)] == first
    fresh = talk("One day", "/reset", "One day", "/what", "/exit", "never read")
    assert fresh == [*first, "(forgotten)", *first, "(commands: /reset, /exit)"]
    assert talk("One day", "And then", "x " * 300)[-1].startswith("(the prompt has ")


def test_merge_export_inspect(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(trained), str(tmp_path / "merged")]) == 0
    assert "merge check" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.generate(**tokenizer("One day", return_tensors="pt"), max_new_tokens=2).shape[0] == 1
    assert main(["merge", str(trained), str(tmp_path / "merged")]) == 2
    assert "is not empty; give another one, or pass --overwrite" in capsys.readouterr().err
    assert main(["export", str(trained), str(tmp_path / "peft")]) == 0
    capsys.readouterr()
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    assert main(["inspect", str(trained), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours["hyperparameters"]["rank"] == 2
    assert main(["inspect", str(tmp_path / "peft")]) == 0
    capsys.readouterr()
    losses = []
    for folder in (str(trained), str(tmp_path / "peft")):
        assert (
            main(
                [
                    "eval",
                    folder,
                    "--base",
                    str(STORIES),
                    "--task",
                    "chat",
                    "--data",
                    str(trained.parent / "dev.jsonl"),
                    "--json",
                ]
            )
            == 0
        )
        losses.append(json.loads(capsys.readouterr().out)["adapter"]["token_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_export_as_a_lora_of_a_rank(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = ["export", str(trained), str(tmp_path / "one"), "--rank", "1"]
    assert main(export) == 2
    assert "adapter 'default' as LoRA: 10 layers of rank 1, relative error" in (shown := capsys.readouterr().err)
    assert "above limit=0.05, so nothing was written: give a higher rank=" in shown
    assert not (tmp_path / "one").exists()
    assert main([*export, "--limit", "1"]) == 0
    assert "relative error" in capsys.readouterr().out
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["r"] == 1
    assert main([*export, "--limit", "1", "--overwrite", "--json"]) == 0
    error = json.loads(capsys.readouterr().out)["error"]
    assert 0.05 < error["total"] < 1
    assert len(error["layers"]) == 10
    assert main(["export", str(trained), str(tmp_path / "two"), "--rank", "2", "--limit", "0"]) == 0
    capsys.readouterr()
    assert main(["export", str(trained), str(tmp_path / "served"), "--for", "vllm"]) == 0
    assert "serve it with: vllm serve" in (shown := capsys.readouterr().out)
    assert "--max-lora-rank 8" in shown
    assert main(["export", str(trained), str(tmp_path / "gguf"), "--to", "gguf", "--for=lorax"]) == 2
    assert "which checks PEFT folders" in capsys.readouterr().err
    assert main(["export", str(trained), str(tmp_path / "gguf"), "--to", "gguf"]) == 0
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["adapter.gguf"]
    assert main(["export", "--help"]) == 0
    assert "--for {vllm,lorax}" in capsys.readouterr().out


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} >= set(METHODS)
    assert main(["methods"]) == 0
    assert "a trained low-rank update" in capsys.readouterr().out


def test_a_prompt_of_a_pipe_that_closes(trained: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = f"{sys.executable} -m loratory methods | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=environment
    )
    assert "Traceback" not in done.stderr
