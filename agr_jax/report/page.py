"""A page of text, tables and pictures, as Markdown and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
import html
import re


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells below a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: of its files.
        caption: what it shows.
        svg: the drawing.
        png: the same in pixels.
    """

    name: str
    caption: str
    svg: bytes
    png: bytes


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in order; text may hold `code` and **bold**."""

    title: str
    blocks: tuple[str | Table | Picture, ...]


def markdown(title: str, sections: list[Section]) -> str:
    """The page as Markdown; pictures are files beside it."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                lines = ["| " + " | ".join(block.header) + " |", "|" + "---|" * len(block.header)]
                lines += ["| " + " | ".join(row) + " |" for row in block.rows]
                parts.append("\n".join(lines))
            elif isinstance(block, Picture):
                parts.append(f"![{block.caption}]({block.name}.svg)\n\n*{block.caption}*")
            else:
                parts.append(block)
    return "\n\n".join(parts) + "\n"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .75rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
code { background: #f2f2f2; padding: 0 .2rem; }
"""


def as_html(title: str, sections: list[Section]) -> str:
    """The page as one HTML file, drawings included."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(_html_table(block))
            elif isinstance(block, Picture):
                caption = html.escape(block.caption)
                source = base64.b64encode(block.svg).decode()
                parts.append(
                    f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{source}">'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
            else:
                parts.append(f"<p>{_inline(block)}</p>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in table.header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _inline(text: str) -> str:
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
