"""A bar for long starts: nothing while they are short."""

import pytest

from loratory.runtime import progress


def test_short_starts_say_nothing(capsys: pytest.CaptureFixture):
    assert list(progress.shown("adapting", [1, 2, 3])) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_long_ones_say_how_far_they_are(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 0.5, 3.0, 5.0, 14.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.shown("adapting", "abcd")) == list("abcd")
    assert capsys.readouterr().err == "adapting: 1 of 4 after 3 s\nadapting: 3 of 4 after 14 s\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bars = []
    right = progress._bar
    monkeypatch.setattr(progress, "_bar", lambda *about: bars.append(right(*about)) or bars[-1])
    assert list(progress.shown("adapting", [1, 2])) == [1, 2]
    ((bar, task),) = bars
    assert bar.tasks[task].total == 2
    assert bar.finished is False
    assert not bar.live.is_started
