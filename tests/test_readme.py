"""What README says runs: its Python blocks, its commands, and its table of methods."""

import os
import re
import shlex
from pathlib import Path

import pytest

import loratory as lt
from loratory.methods.registry import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

COUNTS = {  # the trained numbers of one layer, as the docstrings say them
    "dora": "rank (in + out) + out",
    "frozen": "none",
    "full": "all of the model",
    "head-only": "all of the head",
    "lora": "rank (in + out)",
    "merged-lora": "n rank (in + out / groups)",
    "prefix-tuning": "tokens blocks 2 heads head_dim (the model)",
    "prompt-tuning": "tokens width (the model)",
}


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=lambda b: b.split("\n")[-2][:30]
)
def test_block_runs(block, tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # so that files written by a block land in a temporary folder
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_methods_table_is_the_registry():
    rows = []
    for name, cls in sorted(METHODS.items()):
        papers = " ".join(dict.fromkeys(re.findall(r"\d{4}\.\d{5}", cls.__doc__ or ""))) or "-"
        rows.append(f"| `{name}` | {cls.description()} | {COUNTS[name]} | {papers} |")
    assert "\n".join(rows) in README, "README's table must hold:\n" + "\n".join(rows)


COMMANDS = re.findall(r"^    loratory (.+?)(?:\s+#.*)?$", README.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.split()[0])
def test_command_has_its_flags(command, capsys):
    from loratory.cli import main

    words = shlex.split(command)
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in [word for word in words if word.startswith("--")]:
        assert flag in shown, f"`loratory {words[0]} --help` does not show {flag}"


def test_every_name_of_the_public_surface_exists():
    for name in lt.__all__:
        assert getattr(lt, name) is not None
    assert not os.path.exists(ROOT / "src" / "loratory" / "utils.py")
