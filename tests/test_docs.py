"""The Python blocks of every page run, in order, as a reader would run them; each method has a page."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

from loratory.methods.registry import METHODS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_runs(page, tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page.name, "exec"), names)


def test_every_method_has_a_page_with_all_its_fields():
    pytest.importorskip("mkdocs", reason="mkdocs (extra docs) is not installed")
    spec = importlib.util.spec_from_file_location("method_pages", ROOT / "docs" / "method_pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    for name, cls in METHODS.items():
        page = pages.method_page(name, cls)
        assert page.startswith(f"# {cls.__name__}\n")
        for field in cls.__dataclass_fields__:
            if field in cls().hyperparameters():
                assert f"| `{field}` |" in page, (name, field)
        wrapped = re.findall(r"^    \w+: [^\n]* = \(\n[^\n]*  # ([^\n]+)$", inspect.getsource(cls), re.MULTILINE)
        assert all(comment.replace("|", "\\|") in page for comment in wrapped), name
        notes = ROOT / "docs" / "method_notes" / f"{name}.md"
        if notes.exists():
            assert notes.read_text(encoding="utf-8").strip() in page
            parts = notes.read_text(encoding="utf-8").strip().split("\n\n")
            assert parts[::2] == ["## When to choose it", "## When not"], name
            assert len(parts) == 4, name


def test_every_method_has_a_picture_of_what_it_trains():
    pytest.importorskip("matplotlib", reason="matplotlib (extra report) is not installed")
    spec = importlib.util.spec_from_file_location("method_pictures", ROOT / "docs" / "method_pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    for name, cls in METHODS.items():
        shown = pictures.panels(cls)
        assert shown, name
        if cls.trains != "nothing":
            assert all(bool(torch.isfinite(t).all()) and bool(t.any()) for t in shown.values()), name
    png = pictures.drawn("LoRA", pictures.panels(METHODS["lora"]))
    assert png.startswith(b"\x89PNG")
