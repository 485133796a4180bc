"""The pages of docs/: the index lists each of them, and they state figures and limits, not targets of the project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import families_table

ROOT = Path(__file__).resolve().parents[2]
INDEX = ROOT / "docs" / "README.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_the_index_lists_every_page_once_with_a_line() -> None:
    rows = re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\) \| \S.* \|$", INDEX.read_text(), re.MULTILINE)
    assert all(name == target for name, target in rows)
    listed = [target for _, target in rows]
    pages = [path.relative_to(INDEX.parent).as_posix() for path in INDEX.parent.glob("**/*.md") if path != INDEX]
    assert sorted(listed) == sorted(pages)


def test_the_readme_links_to_the_index() -> None:
    assert "](docs/README.md)" in (ROOT / "README.md").read_text()


def headers(text: str) -> list[str]:
    """The column titles of all tables."""
    rows = re.findall(r"^\|(.*)\|\n\|[-|: ]+\|$", text, re.MULTILINE)
    return [column.strip().lower() for row in rows for column in row.split("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_speak_to_users(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"(was|were|is) asked\s+for", text)
    assert not re.search(r"\bnot met\b", text)
    assert not {"must", "goal"} & set(headers(text))


def test_headers_are_found() -> None:
    assert headers("| a | Must |\n|---|---:|\n| 1 | 2 |\n") == ["a", "must"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_sections_exist(page: Path) -> None:
    for target, section in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert section in anchors, f"{page.name}: {target}#{section}"


def test_the_table_of_families_is_that_of_the_registry() -> None:
    assert families_table.table() in (ROOT / "README.md").read_text()
