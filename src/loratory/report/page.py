"""A report as one HTML file: its style, tables and pictures, with everything inside."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

STYLE = """
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1c1c1c; background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.25rem; margin-top: 2.4rem; border-top: 1px solid #ddd; padding-top: 1rem; }
.warning { background: #fff1cc; border-left: 5px solid #d99a00; padding: .6rem 1rem; }
.about, figcaption { color: #555; } figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; } th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #e3e3e3; }
th { background: #f4f4f4; } td.number, th.number { text-align: right; } td.number, td.whole { white-space: nowrap; } code { font-size: .85rem; }
"""
SORTED_STYLE = """
table.sortable th { cursor: pointer; } table.sortable th::after { content: " \\2195"; color: #999; } table.sortable th[aria-sort=ascending]::after { content: " \\2191"; color: #000; }
table.sortable th[aria-sort=descending]::after { content: " \\2193"; color: #000; }
"""
SORT = """
for (const table of document.querySelectorAll("table.sortable")) table.querySelectorAll("th").forEach((head, column) => {
  head.tabIndex = 0;
  const sort = () => {
    const down = head.getAttribute("aria-sort") === "ascending", body = table.tBodies[0];
    const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what is not known stays last
      const d = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -d : d;
    };
    [...body.rows].sort(order).forEach(row => body.append(row));
    table.querySelectorAll("th").forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
});
"""


class Cell(NamedTuple):
    """A cell that is sorted by something else than its text; None: by nothing, it stays last."""

    text: str
    key: float | str | None


def document(title: str, parts: Sequence[str], *, sortable: bool = False) -> str:
    """The whole file."""
    style = STYLE + (SORTED_STYLE if sortable else "")
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style></head><body>'
    script = [f"<script>{SORT}</script>"] if sortable else []
    return "\n".join([head, *parts, *script, "</body></html>\n"])


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str | Cell]],
    numbers: Sequence[int] | range = (),
    whole: Sequence[int] = (),
    *,
    sortable: bool = False,
) -> str:
    """A table; a number, and what is in a column of `whole`, stays on one line."""

    def line(cells: Sequence[Any], tag: str) -> str:
        inner = ""
        for i, cell in enumerate(cells):
            kind = " class=number" if i in numbers else " class=whole" if i in whole else ""
            text, key = (cell.text, cell.key) if isinstance(cell, Cell) else (str(cell), None)
            data = (
                f' data-key="{escape("" if key is None else str(key), quote=True)}"' if isinstance(cell, Cell) else ""
            )
            inner += f"<{tag}{kind}{data}>{escape(text).replace(chr(10), '<br>')}</{tag}>"
        return f"<tr>{inner}</tr>"

    kind = ' class="sortable"' if sortable else ""
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table{kind}><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def picture(source: str, what: str, caption: str) -> str:
    return f'<figure><img src="{source}" alt="{escape(what, quote=True)}"><figcaption>{escape(caption)}</figcaption></figure>'


def warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>'
