"""Figures and report of a search: there, labelled, self-contained, and safe with any name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.plots import plot
from mqadapt_rs.report import report
from mqadapt_rs.search import Options, conduct
from mqadapt_rs.search.journal import numbered
from mqadapt_rs.search.results import Results
from search_fakes import SPACE, FakeSpec

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'plot')")
FULL = SPACE.kv_bytes(SPACE.source)


@dataclass(frozen=True)
class Named(FakeSpec):
    """A model whose name is an attack on careless pages."""

    title: str = "<script>alert(1)</script> | `model` $x"
    merge: str = "mean"

    def fingerprints(self) -> dict[str, str]:
        return {**super().fingerprints(), "name": self.title, "method": self.merge}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    spec = Named("interacting", noise=0.5)
    conduct(spec, SPACE, "budget", Options(kv_budget=FULL * 0.5), folder, about={"command": "mqadapt search a 'b c'"})
    return folder


def test_figures_of_each_strategy(tmp_path: Path) -> None:
    for strategy, expected in (
        ("sensitivity", {"sensitivity", "pareto", "plan"}),
        ("from-end", {"from-end", "pareto", "plan"}),
        ("alternate", {"alternate", "pareto", "plan"}),
    ):
        folders = []
        for merge in ("mean", "first"):
            folders.append(tmp_path / strategy / merge)
            conduct(Named(merge=merge, noise=0.1, title="m"), SPACE, strategy, Options(), folders[-1])
        files = plot(*folders, out=tmp_path / "out" / strategy)
        assert {file.stem for file in files} == expected
        for file in files:
            assert file.read_bytes().startswith(b"\x89PNG")
            assert len(file.read_bytes()) > 10_000
            assert "<svg" in file.with_suffix(".svg").read_text()


def test_the_same_search_draws_the_same_bytes(searched: Path, tmp_path: Path) -> None:
    files = [plot(searched, out=tmp_path / name) for name in ("a", "b")]
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()
        assert first.with_suffix(".svg").read_bytes() == second.with_suffix(".svg").read_bytes()


def test_latency_against_groups(searched: Path, tmp_path: Path) -> None:
    rows = [{"depth": 64, "num_key_value_heads": g, "milliseconds_per_token": 5.0 + g} for g in (1, 2, 4)]
    (tmp_path / "bench.json").write_text(
        json.dumps({"model": "a/model", "dtype": "float32", "rounds": 1, "decode": rows})
    )
    assert "latency" in {file.stem for file in plot(searched, out=tmp_path, latency=tmp_path / "bench.json")}
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ArgumentError, match="bench --groups"):
        plot(searched, out=tmp_path, latency=tmp_path / "bench.json")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_self_contained(searched: Path) -> None:
    page, card = report(searched)
    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert "script" not in {tag for tag, _ in tags.seen}
    assert "&lt;script&gt;" in text
    assert {tag for tag, _ in tags.seen} >= {"svg", "table", "figure"}
    for _, attributes in tags.seen:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    ids = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    verdict = json.loads((searched / "summary.json").read_text())["verdict"]
    assert verdict.split(";")[0].replace("'", "&#x27;") in text
    assert "mqadapt convert" in text
    assert "mqadapt search a &#x27;b c&#x27;" in text
    markdown = card.read_text()
    assert markdown.startswith("---\nlibrary_name: transformers\ntags:\n- mqadapt\n")
    assert verdict in markdown
    assert f"| options | kv_budget: {FULL // 2} |" in markdown
    for name in re.findall(r"\]\((plots/[^)]+)\)", markdown):
        assert (searched / name).is_file()
    for line in markdown.splitlines():
        if line.startswith("| ") and "script" in line:
            assert line.count("|") - line.count("\\|") == 3


def test_options_are_told_in_words(tmp_path: Path) -> None:
    plans = (SPACE.single(1, 2), SPACE.last(3, 1))
    conduct(FakeSpec(), SPACE, "given", Options(plans=plans), tmp_path)
    assert "| options | plans: gqa2:1, mqa:5-7 |" in report(tmp_path)[1].read_text()


def test_a_running_search_can_be_looked_at(searched: Path, tmp_path: Path) -> None:
    lines = (searched / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines[:12]) + b'{"plan": [1')
    page, _ = report(tmp_path)
    assert "has not ended: 11 plans" in page.read_text()


def test_figures_and_report_replace_links(searched: Path, tmp_path: Path) -> None:
    folder, victim = tmp_path / "search", tmp_path / "victim"
    folder.mkdir()
    victim.mkdir()
    (victim / "thesis.txt").write_text("years of work")
    (folder / "journal.jsonl").write_bytes((searched / "journal.jsonl").read_bytes())
    (folder / "plots").symlink_to(victim)
    with pytest.raises(ArgumentError, match="plots is a symbolic link"):
        report(folder)
    (folder / "plots").unlink()
    (folder / "plots").mkdir()
    for name in ("report.html", "report.md", "plots/pareto.png", "plots/pareto.svg"):
        (folder / name).symlink_to(victim / "thesis.txt")
    pages = report(folder)
    assert [path.name for path in victim.iterdir()] == ["thesis.txt"]
    assert (victim / "thesis.txt").read_text() == "years of work"
    assert all(page.is_file() and not page.is_symlink() for page in pages)
    assert not (folder / "plots" / "pareto.png").is_symlink()


def test_folders_without_a_search(searched: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="holds no journal"):
        report(tmp_path)
    (tmp_path / "journal.jsonl").write_text('{"journal": 1}\n')
    with pytest.raises(ArgumentError, match="format 1, expected 2"):
        plot(tmp_path)
    (tmp_path / "journal.jsonl").write_bytes(numbered({"journal": 2}, 0))
    with pytest.raises(ArgumentError, match="not the journal of a search"):
        plot(tmp_path)
    with pytest.raises(ArgumentError, match="nothing to draw"):
        plot()
    header = (searched / "journal.jsonl").read_bytes().splitlines(keepends=True)[0]
    (tmp_path / "journal.jsonl").write_bytes(header)
    with pytest.raises(ArgumentError, match="no evaluation yet"):
        Results.load(tmp_path)
