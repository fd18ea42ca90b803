"""A hook of mkdocs: one page for each registered method, and a page that lists them.

A page is made from the docstring and the fields, a picture of what is trained (method_pictures.py), and `method_notes/NAME.md`.
"""

import dataclasses
import sys
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from loratory.methods.registry import registered
from loratory.train.settings import field_docs

NOTES = Path(__file__).parent / "method_notes"
sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads a hook by its file

from method_pictures import picture  # noqa: E402


def on_files(files: Files, config: MkDocsConfig) -> Files:
    methods = sorted(registered().items())
    for name, cls in methods:
        files.append(File.generated(config, f"methods/{name}.md", content=method_page(name, cls)))
        files.append(File.generated(config, f"methods/{name}.png", content=picture(cls)))
    rows = [f"| [`{name}`]({name}.md) | {cls.description()} |" for name, cls in methods]
    listing = ["# Methods", "", "| name | what it changes |", "|---|---|", *rows, ""]
    files.append(File.generated(config, "methods/index.md", content="\n".join(listing)))
    return files


def method_page(name: str, cls: type[Any]) -> str:
    """The docstring as Markdown (its indented lines are formulas), then the fields with the comments beside them."""
    text = textwrap.dedent("    " + (cls.__doc__ or "")).strip()
    first, _, rest = text.partition("\n")
    lines = [f"# {cls.__name__}", "", f"*{first.split(': ', 1)[-1]}*", "", rest.strip("\n"), ""]
    lines += ["```yaml", f"method: {name}", "```", ""]
    if fields := dataclasses.fields(cls):
        docs = {name: doc.replace("|", "\\|") for name, doc in field_docs(cls).items()}
        lines += ["| hyper-parameter | default | meaning |", "|---|---|---|"]
        lines += [f"| `{f.name}` | `{f.default!r}` | {docs[f.name]} |" for f in fields]
    if (NOTES / f"{name}.md").exists():
        lines += ["", (NOTES / f"{name}.md").read_text(encoding="utf-8").strip()]
    lines += ["", f"![Heat maps of the tensors that {cls.__name__} trains in a small network]({name}.png)"]
    return "\n".join([*lines, ""])
