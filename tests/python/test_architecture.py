"""What the documents say about the project's structure is so."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# who may import whom
CRATES = {
    "mqadapt-core": set(),
    "mqadapt-checkpoint": {"core"},
    "mqadapt-compress": {"core"},
    "mqadapt-kernels": set(),
    "mqadapt-model": {"core", "checkpoint", "compress", "kernels"},
    "mqadapt-calibrate": {"core", "checkpoint", "compress", "model"},
    "mqadapt-convert": {"core", "checkpoint", "compress"},
    "mqadapt-py": {"core", "checkpoint", "compress", "kernels", "model", "calibrate", "convert"},
}


def test_crates_import_only_what_they_may() -> None:
    command = ["cargo", "metadata", "--no-deps", "--format-version", "1", "--offline"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    packages = {package["name"]: package for package in json.loads(done.stdout)["packages"]}
    assert set(packages) == set(CRATES)
    for name, package in packages.items():
        used = {
            d["name"].removeprefix("mqadapt-")
            for d in package["dependencies"]
            if d["name"] in packages and not d["kind"]
        }
        assert used <= CRATES[name], f"{name} imports {used - CRATES[name]}"
    for name in ("mqadapt-core", "mqadapt-kernels"):
        assert not any(d["name"].startswith("candle") for d in packages[name]["dependencies"]), name


def test_the_documented_rules_are_the_tested_ones() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(mqadapt-\w+)` \|.*\|([\w, ]*)\|$", text, re.MULTILINE)
    assert {name: set(filter(None, may.replace(" ", "").split(","))) for name, may in rows} == CRATES


def readme_tree() -> list[str]:
    """Paths of the README's annotated tree."""
    block = re.search(r"## What is where\n\n```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    paths, folders = [], [""]
    for line in block[1].splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = [*folders[: indent + 1], name]
        paths.append("".join(folders[: indent + 2]))
    return paths


def test_the_readme_tree_is_on_the_disk() -> None:
    paths = readme_tree()
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), path
        assert (ROOT / path).is_dir() == path.endswith("/"), path


def test_the_readme_tree_leaves_nothing_out() -> None:
    paths = set(readme_tree())
    package = ROOT / "python" / "mqadapt_rs"
    files = [ROOT / "crates" / name for name in CRATES]
    files += [file for file in package.iterdir() if not file.name.startswith("_") and file.suffix in ("", ".py")]
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        assert name in paths or f"{name}/" in paths, f"{name} is missing from the README's tree"


def test_documents_link_to_files_that_exist() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
