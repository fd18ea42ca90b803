"""A hook of mkdocs: one page for each registered method, made from its docstring and fields, and a page that lists them."""

import dataclasses
import inspect
import re
import textwrap
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from loratory.methods.registry import registered


def on_files(files: Files, config: MkDocsConfig) -> Files:
    methods = sorted(registered().items())
    for name, cls in methods:
        files.append(File.generated(config, f"methods/{name}.md", content=method_page(name, cls)))
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
        comments = field_comments(cls)
        lines += ["| hyper-parameter | default | meaning |", "|---|---|---|"]
        lines += [f"| `{f.name}` | `{f.default!r}` | {comments.get(f.name, '')} |" for f in fields]
    return "\n".join([*lines, ""])


def field_comments(cls: type[Any]) -> dict[str, str]:
    """The comment behind each field in the source."""
    found = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.MULTILINE)
    return {name: comment.replace("|", "\\|") for name, comment in found}
