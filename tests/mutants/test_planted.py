"""The table of planted formulas stays true to the source."""

import ast
from pathlib import Path

import pytest

from loratory.methods import METHODS
from tests.mutants import run
from tests.mutants.planted import PLANTED, Mutant


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda m: f"{m.file}: {m.wrong}")
def test_every_text_is_there_once_and_the_wrong_one_is_python(mutant: Mutant):
    text = run.mutated(mutant)
    assert text != (run.SOURCE / "loratory" / mutant.file).read_text(encoding="utf-8")
    ast.parse(text)
    assert all((run.ROOT / test.split("::")[0]).exists() for test in mutant.tests)


def test_every_method_file_has_two():
    for cls in METHODS.values():
        file = "/".join(Path(*cls.__module__.split(".")[1:]).parts) + ".py"
        assert sum(m.file == file for m in PLANTED) >= 2, file


def test_a_text_that_is_not_there_once_is_refused():
    with pytest.raises(ValueError, match=r"mutant 'odd': methods/lora.py holds 'no such text' 0 times, not once"):
        run.mutated(Mutant("odd", "methods/lora.py", (("no such text", ""),), ()))
    with pytest.raises(ValueError, match=r"holds 'rank' \d+ times, not once"):
        run.mutated(Mutant("odd", "methods/lora.py", (("rank", ""),), ()))


class Inline:
    """A pool that runs its tasks here."""

    imap = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def test_the_driver_reports_survivors(monkeypatch, capsys):
    mutants = [
        Mutant(name, "methods/lora.py", (("t.B, scale(", "-t.B, scale("),), ("tests/ops/",)) for name in ("a", "b")
    ]
    outcomes = {"a": (run.CAUGHT, "test_x"), "b": (run.PASSED, "")}
    monkeypatch.setattr(run, "PLANTED", mutants)
    monkeypatch.setattr(run, "fresh_processes", Inline)
    monkeypatch.setattr(run, "run_plain", lambda test: (run.PASSED, ""))
    monkeypatch.setattr(run, "try_mutant", lambda m: (m, *outcomes[m.wrong], 0.1))
    assert run.main([]) == 1
    out = capsys.readouterr().out
    assert "SURVIVED" in out
    assert "1 of 2 caught" in out
    assert run.main(["lora.py a"]) == 0
    monkeypatch.setattr(run, "run_plain", lambda test: (run.CAUGHT, "test_y"))
    assert run.main([]) == 1
    assert "tests/ops/ fails without any mutant (test_y); repair it first" in capsys.readouterr().out
