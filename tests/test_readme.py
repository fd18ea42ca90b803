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
}


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=lambda b: b.split("\n")[-2][:30])
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


def test_commands_exist():
    from loratory.cli import main

    commands = re.findall(r"^    loratory (.+?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as done:
            main([shlex.split(command)[0], "--help"])
        assert done.value.code == 0, command


def test_every_name_of_the_public_surface_exists():
    for name in lt.__all__:
        assert getattr(lt, name) is not None
    assert not os.path.exists(ROOT / "src" / "loratory" / "utils.py")
