"""How results show themselves: every one as text, as tables, as plain data, from one mixin."""

import json
import math
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.shown import Shown, aligned, plain


@dataclass(frozen=True)
class Part:
    """A row."""

    name: str
    loss: float
    width: int | None = None


@dataclass(frozen=True, repr=False)
class Whole(Shown):
    """A result with all kinds of fields."""

    title: str
    path: Path
    infinite: float
    parts: tuple[Part, ...]
    kinds: frozenset[str]
    by_way: dict[str, dict[str, float]]


EVIL = '<script>"&'


@pytest.fixture
def whole() -> Whole:
    parts = (Part(EVIL, 0.123456), Part("last", math.nan))
    return Whole(EVIL, Path("out") / "x", math.inf, parts, frozenset("ba"), {"top-1": {"float": 0.5, "file": 0.25}})


class Tables(HTMLParser):
    """The cells of every table, and every tag there is."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tables and self.tables[-1] and self.get_starttag_text() in ("<td>", "<th>"):
            self.tables[-1][-1][-1] += data


def test_plain_data(whole: Whole) -> None:
    told = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert told["infinite"] is None and told["parts"][1]["loss"] is None
    assert told["kinds"] == ["a", "b"]
    assert told["parts"][0] == {"name": EVIL, "loss": 0.123456, "width": None}
    assert plain(np.float32(0.5)) == "0.5"  # unknown kinds are text, never an error


def test_tables_of_a_notebook(whole: Whole) -> None:
    page = Tables(whole._repr_html_())
    assert page.tags == {"table", "tr", "td", "th", "p"}  # nothing of the result's own text became a tag
    facts, parts, ways = page.tables
    assert ["title", EVIL] in facts
    assert parts == [["name", "loss"], [EVIL, "0.1235"], ["last", ""]]  # nothing is known about widths
    assert ways == [["", "float", "file"], ["top-1", "0.5", "0.25"]]


def test_text(whole: Whole) -> None:
    assert repr(whole) == str(whole)
    lines = str(whole).splitlines()
    assert lines[0] == f"title: {EVIL}"
    assert "last" in lines[lines.index("parts") + 3]
    assert aligned([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d"


def test_a_model_shows_its_formats_and_no_tensors() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(8, 3, 6, 6)
    captured = hb.capture(net, x[:1])
    assert "formats" not in str(captured)
    m = hb.quantize(captured, x)
    assert "tensor(" not in repr(m)
    assert "calibrated on: 8 samples" in str(m)
    rows = Tables(m._repr_html_()).tables[1]
    assert {row[0] for row in rows[1:]} == {name for name, form in m.plan.items() if form is not None}
    told = json.loads(json.dumps(m.to_dict(), allow_nan=False))
    shown = {row["name"]: row for row in told["values"]}
    grid = m.grid("0.weight")
    assert grid is not None and shown["0.weight"]["minimum"] == float(grid.minimum.min())
    assert [e["message"] for e in told["log"]] == [e.message for e in m.log]
