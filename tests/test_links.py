"""Links of the README, the docs and the notebooks lead somewhere, on the site and on GitHub."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCES = re.compile(r"^(`{3,}).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[([^\]\n]*(?:\n[^\]\n]*)?)\]\(([^)\s]+)\)")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")])


def text_of(page: Path) -> str:
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#{1,3} (.*)$", FENCES.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def faults(page: Path) -> list[str]:
    text = re.sub(r"(`+).*?\1", "", FENCES.sub("", text_of(page)))
    found = []
    for words, target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if re.match(r"[a-z]+:", target):
            continue
        if not words.strip():
            found.append(f"{target} has no words, and is not seen on GitHub")
        if not there.exists():
            found.append(f"{target} leads nowhere")
        elif anchor and anchor not in anchors(there):
            found.append(f"{target} has no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    assert not faults(page)


def test_a_bad_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# One: two\n\n```\n# three\n```\n")
    bad = ["[](b.md)", "[c](c.md)", "[b](b.md#three)", "![no picture](no.png)"]
    good = ["[b](b.md)", "[b](b.md#one-two)", "`[c](c.md)`", "[far](https://example.com/c.md)"]
    (tmp_path / "a.md").write_text("\n\n".join([*good, *bad]))
    assert [fault.split(" ")[0] for fault in faults(tmp_path / "a.md")] == ["b.md", "c.md", "b.md#three", "no.png"]
