"""`make compare-results` in a fresh clone: the committed reports are there, the results they came from are not."""

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
FAKE = """#!/bin/sh
# loratory compare --preset NAME ... --out FOLDER: goes on where a results file is, and takes no folder with other things
set -e
while [ $# -gt 1 ]; do shift; done
if [ -d "$1" ] && [ ! -e "$1/results.sqlite" ]; then echo "holds other things" >&2; exit 2; fi
mkdir -p "$1/plots" "$1/runs"
echo run >> "$1/results.sqlite"
for name in index.html report.md runs.csv compare.yaml plots/scores.svg plots/scores.png runs/log.txt; do echo new > "$1/$name"; done
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_reports_are_made_again_in_a_fresh_clone_and_the_command_goes_on_after_a_stop(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("pyproject.toml", "constraints.txt", ".venv/bin/loratory", ".venv/ready", ".venv/weights"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".venv/bin/loratory").write_text(FAKE)
    (tmp_path / ".venv/bin/loratory").chmod(0o755)
    kept = tmp_path / "benchmarks" / "results" / "compare"
    (kept / "facts").mkdir(parents=True)
    (kept / "facts" / "report.md").write_text("committed")
    for _ in range(2):
        subprocess.run(["make", "compare-results"], cwd=tmp_path, check=True, capture_output=True)
    for preset in ("intents", "ner", "facts"):
        found = sorted(str(file.relative_to(kept / preset)) for file in (kept / preset).rglob("*") if file.is_file())
        assert found == ["index.html", "plots/scores.svg", "report.md", "runs.csv"]
        assert (kept / preset / "report.md").read_text() == "new\n"
    assert (tmp_path / ".cache/compare/facts/results.sqlite").read_text() == "run\n" * 2
