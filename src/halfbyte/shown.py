"""How results show themselves: as text, as tables in a notebook, as plain data. One mixin for all of them; without torch."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

Row = Mapping[str, Any]


class Shown:
    """A frozen dataclass (with ``repr=False``) that prints what its command prints.

    ``facts`` is what is shown: single facts and, under their names, tables as lists of rows. ``to_dict`` is all there is.
    """

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return text(self.facts())

    def _repr_html_(self) -> str:
        return tables(self.facts())

    def facts(self) -> dict[str, Any]:
        """What people are shown, in order."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: plain(value) for name, value in vars(self).items()}


def plain(value: Any) -> Any:
    """Any value as JSON knows it: data classes are mappings, what is not finite is None, what is unknown is its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(v) for v in value), key=str)
    if isinstance(value, Shown):
        return value.to_dict()
    if is_dataclass(value):
        return {name: plain(v) for name, v in vars(value).items()}
    return str(value)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines of text with columns under each other; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def text(facts: Mapping[str, Any]) -> str:
    """A line for each fact, and the tables."""
    parts = []
    for name, value in facts.items():
        rows = _rows(value)
        parts.append(f"{name}: {cell(value)}" if rows is None else f"{name}\n{aligned(_table(rows))}")
    return "\n".join(parts)


def tables(facts: Mapping[str, Any]) -> str:
    """HTML: one table of the single facts, and one for each list of rows. Everything is escaped."""
    single = [[name, cell(value)] for name, value in facts.items() if _rows(value) is None]
    parts = [_html(single, head=False)] if single else []
    for name, value in facts.items():
        rows = _rows(value)
        if rows is not None:
            parts.append(f"<p>{html.escape(name)}</p>{_html(_table(rows), head=True)}")
    return "".join(parts)


def cell(value: Any) -> str:
    """One value as people read it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        numbers = any(isinstance(v, int) for v in value) or (len(value) > 0 and value[0] == "batch")
        return "x".join(map(str, value)) if numbers else ", ".join(map(cell, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {cell(v)}" for k, v in value.items())
    return str(value)


def _rows(value: Any) -> list[Row] | None:
    """The rows of what is a table: a list of mappings, or a mapping of them by name."""
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        return value
    if isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values()):
        return [{"": name, **row} for name, row in value.items()]
    return None


def _table(rows: Sequence[Row]) -> list[list[str]]:
    """Head and cells; columns in which nothing stands are left out."""
    known = [
        name for name in dict.fromkeys(n for row in rows for n in row) if any(row.get(name) is not None for row in rows)
    ]
    return [known, *([cell(row.get(name)) for name in known] for row in rows)]


def _html(rows: Sequence[Sequence[str]], *, head: bool) -> str:
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if head and i == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def scaled(number: float, unit: str = "") -> str:
    """``number`` with a decimal prefix: 4.9 MB, 385 M."""
    prefix = ""
    for larger in ("k", "M", "G", "T", "P"):
        if abs(number) < 999.5:
            break
        number, prefix = number / 1000, larger
    digits = 0 if not prefix or abs(number) >= 99.95 else 1
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()
