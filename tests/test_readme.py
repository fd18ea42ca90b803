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


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=lambda b: b.split("\n")[-2][:30]
)
def test_block_runs(block, tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # so that files written by a block land in a temporary folder
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def methods_table() -> str:
    """README's table of methods, from the registry and the docstrings."""
    rows = []
    for name, cls in sorted(METHODS.items()):
        text = " ".join((cls.__doc__ or "").split())
        papers = " ".join(dict.fromkeys(re.findall(r"\d{4}\.\d{5}", text))) or "-"
        count = re.search(r"Trains ((?:[^.;,()]|\((?:[^()]|\([^()]*\))*\))+)", text)
        assert count, f"{cls.__name__} does not say what it trains"
        numbers = count[1].replace(" numbers", "").replace(" a layer", "").replace("*", "").replace("  ", " ")
        rows.append(f"| `{name}` | {cls.description()} | {numbers} | {papers} |")
    return "\n".join(rows)


def test_methods_table_is_the_registry():
    assert methods_table() in README, "README's table is old; `make readme` writes it anew"


def test_sizes_of_the_demo_are_its_own():
    from loratory.demo.plan import JOBS

    text = " ".join(README.split())
    for job in JOBS:
        assert f"{job.steps} steps of {job.batch}" in text, job.name
        assert f" {job.test_rows} of " in text, job.name


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


if __name__ == "__main__":  # make readme
    own = re.compile(r"(?<=\|---\|---\|---\|---\|\n)(?:\|.*\n)+")
    (ROOT / "README.md").write_text(own.sub(lambda _: methods_table() + "\n", README, count=1), encoding="utf-8")
