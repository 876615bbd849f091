"""README and documentation run as they stand: the Python blocks of each page, in order, in an empty folder."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """The line before each Python block of a page, and the block."""
    text = page.read_text(encoding="utf-8")
    found = [(text.count("\n", 0, match.start(1)), match[1]) for match in _BLOCK.finditer(text)]
    return [(line, block) for line, block in found if not block.startswith("# not run")]


def test_there_is_a_page_for_each_concept() -> None:
    concepts = (
        "values-and-names",
        "formats-and-grids",
        "targets-and-placement",
        "calibration-and-ranges",
        "integers-and-proof",
        "preprocessing-and-data",
        "exit-codes-and-errors",
    )
    assert set(concepts) <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page)
    assert found, f"{page.name} has no example"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # restores sys.path, which loading a file extends
    names: dict[str, Any] = {"__name__": page.stem}
    for line, block in found:
        # As many empty lines as stand before the block, so that a failure names the line of the page.
        exec(compile("\n" * line + block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_to_files(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
