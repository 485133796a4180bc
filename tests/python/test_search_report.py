"""Figures and report of a search: there, labelled, self-contained, and safe with any name."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.plots import plot
from mqadapt_rs.readable import as_markdown
from mqadapt_rs.report import report
from mqadapt_rs.search import JournalError, Options, conduct
from mqadapt_rs.search.core.journal import numbered
from mqadapt_rs.search.evaluators.latency import measured
from mqadapt_rs.search.results import Results
from search_fakes import ONE, SPACE, TWO, FakeSpec

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
    assert as_markdown(verdict) in markdown
    assert f"| options | kv\\_budget: {FULL // 2} |" in markdown
    for name in re.findall(r"\]\((plots/[^)]+)\)", markdown):
        assert (searched / name).is_file()
    for line in markdown.splitlines():
        if line.startswith("| ") and "script" in line:
            assert line.count("|") - line.count("\\|") == 3


def test_options_are_told_in_words(tmp_path: Path) -> None:
    plans = (SPACE.single(1, TWO), SPACE.last(3, ONE))
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
    with pytest.raises(ArgumentError, match="nothing to plot"):
        plot()
    header = (searched / "journal.jsonl").read_bytes().splitlines(keepends=True)[0]
    (tmp_path / "journal.jsonl").write_bytes(header)
    with pytest.raises(ArgumentError, match="no evaluation yet"):
        Results.load(tmp_path)


ATTACK = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>\n```\n# [a](javascript:b) | `c` $x$ \x1b]0;owned\x07\u202e"
)


@pytest.mark.parametrize("title", [ATTACK, "x" * (1 << 20)], ids=["attack", "long"])
def test_names_are_no_markup_of_a_page(title: str, tmp_path: Path) -> None:
    """Names come from paths, texts and journals; whatever they hold is text."""
    command = "mqadapt search " + shlex.quote(title)
    about = {"command": command, "source_argument": title, "calibration_arguments": f" --stats {shlex.quote(title)}"}
    place = tmp_path / (title[:150].replace("/", " ") if title is ATTACK else "folder")
    conduct(Named("interacting", title=title), SPACE, "sensitivity", Options(), place, about=about)
    summary = json.loads((place / "summary.json").read_text())
    assert summary["source_argument"] == title  # JSON is exact
    (place / "summary.json").write_text(json.dumps({**summary, "base_model": title, "verdict": title}))
    page, card = (file.read_text() for file in report(place))
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert not {tag for tag, _ in tags.seen} & {"script", "img", "a"}
    for text in (page, card):
        assert "<script" not in text and "<img" not in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    prose = card.split("\n---\n", 1)[1].split("## How to reproduce this")[0]
    assert not re.search(r"(?<!\\)\]\(javascript:", prose) and "\n# [a]" not in prose and "```" not in prose
    # front matter is YAML in which a name is a name
    front = card.split("---\n")[1]
    assert [
        line for line in front.splitlines() if line.startswith("base_model: ")
    ] and '\nbase_model: "' in "\n" + front
    if title is ATTACK:
        block = html.unescape(card[card.index("<pre><code>") + len("<pre><code>") : card.index("</code></pre>")])
        pasted = subprocess.run(
            ["bash", "-c", block.replace("mqadapt", "printf '%s\\0'", 1)], capture_output=True, check=True
        )
        assert pasted.stdout.split(b"\0")[1].decode() == title
    else:
        assert len(page) < 20 * len(title)


HEADERS: list[dict[str, Any]] = [
    {"source": [10**12] * 8}, {"source": "4444"}, {"source": [4.5] * 8}, {"source": [True] * 8}, {"source": []}, {"source": None},
    {"head_bytes": [64]}, {"head_bytes": ["64"] * 8}, {"metric": 5}, {"metric": None}, {"scale": []}, {"unit": {}},
    {"method": ["mean"]}, {"strategy": None}, {"name": 7}, {"documents": "24"}, {"documents": -1}, {"documents": 1.5},
    {"options": []}, {"options": {"unknown": 1}}, {"options": {"plans": [[1]]}}, {"options": {"kv_budget": "half"}},
    {"options": {"max_damage": float("nan")}}, {"error_rate": "small"}, {"error_rate": float("inf")},
    {"layer_seconds": 5}, {"layer_seconds": [[[1]]] * 8}, {"layer_seconds": [[["a", "b"]]] * 8}, {"layer_seconds": "x" * 8},
]  # fmt: skip


def written(content: dict[str, Any], number: int) -> bytes:
    """A line whose checksum is right, whatever it says."""
    content = {key: value for key, value in content.items() if key not in {"line", "line_blake2b"}}
    return numbered(content, number, allow_nan=True)


@pytest.mark.parametrize("change", HEADERS, ids=str)
def test_malformed_headers(change: dict[str, Any], searched: Path, tmp_path: Path) -> None:
    first, *rest = (searched / "journal.jsonl").read_bytes().splitlines(keepends=True)
    header = written({**json.loads(first), **change}, 0)
    (tmp_path / "journal.jsonl").write_bytes(header + b"".join(rest))
    for call in (report, plot, Results.load):
        with pytest.raises(JournalError, match="not the journal of a search"):
            call(tmp_path)


RECORDS: list[dict[str, Any]] = [
    {"plan": [4] * 7}, {"plan": [10**12] * 8}, {"plan": [3] * 8}, {"plan": [0] * 8}, {"plan": None},
    {"losses": []}, {"losses": [float("nan")] * 24}, {"losses": [1e999]}, {"losses": None}, {"losses": {}}, {"losses": [[1]]},
    {"losses": [10**400]}, {"seconds": "soon"}, {"seconds": float("inf")}, {"seconds": None}, {"plan": [float("inf")] * 8},
]  # fmt: skip


@pytest.mark.parametrize("change", RECORDS, ids=str)
def test_malformed_records(change: dict[str, Any], searched: Path, tmp_path: Path) -> None:
    lines = (searched / "journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = written({**json.loads(lines[2]), **change}, 2)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines))
    for call in (report, plot, Results.load):
        with pytest.raises(JournalError):
            call(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"{}",
        b'{"verdict": 1, "winner": null}',
        b"[" * 100_000,
        b'{"verdict": "", "winner": 3}',
    ],
)
def test_malformed_summaries(content: bytes, searched: Path, tmp_path: Path) -> None:
    shutil.copytree(searched, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(JournalError, match="not the summary of a search"):
        report(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"\xff", b"null", b'{"decode": [{"depth": 1e999, "num_key_value_heads": 1}]}', b'{"decode": 5}'],
)
def test_malformed_times(content: bytes, searched: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_bytes(content)
    with pytest.raises(ArgumentError, match="not what 'mqadapt bench"):
        plot(searched, out=tmp_path, latency=tmp_path / "bench.json")
    (tmp_path / "latency.json").write_bytes(content)
    with pytest.raises(JournalError, match="remove the file to measure them again"):
        measured(tmp_path, None, SPACE, 64, resume=True)  # type: ignore[arg-type] # no model is needed
