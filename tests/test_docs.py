"""The Python blocks of every page run, in order, as a reader would run them; each method has a page."""

import importlib.util
import re
from pathlib import Path

import pytest

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
