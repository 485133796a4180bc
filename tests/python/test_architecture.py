"""What the documents say about the project's structure is so."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
from pathlib import Path

import pytest

import rust_modules

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "python"
PACKAGE = SOURCES / "mqadapt_rs"

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


def module_name(file: Path) -> str:
    """The dotted name of a module."""
    parts = file.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements that run when a module is imported: none of a function, none for type checkers only."""
    found: list[ast.stmt] = []
    for statement in body:
        found.append(statement)
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
            found += statements(statement.orelse)
        elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody"):
                found += statements(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                found += statements(handler.body)
    return found


def imports(module: str) -> set[tuple[str, str]]:
    """The modules of the package that a module imports when it is imported, each with the imported name."""
    found = set()
    for statement in statements(ast.parse(MODULES[module].read_text()).body):
        if isinstance(statement, ast.Import):
            found |= {(alias.name, "") for alias in statement.names if alias.name in MODULES}
        elif isinstance(statement, ast.ImportFrom):
            assert not statement.level, f"{module}: relative imports are not used in this package"
            for alias in statement.names:
                submodule = f"{statement.module}.{alias.name}"
                if submodule in MODULES:
                    found.add((submodule, ""))
                elif statement.module in MODULES:
                    found.add((statement.module, alias.name))
    return found


def test_no_python_module_imports_itself_through_others() -> None:
    assert len(MODULES) > 50
    graph = {module: {imported for imported, _ in imports(module)} for module in MODULES}
    assert "mqadapt_rs.search.core.space" in graph["mqadapt_rs.search.api"]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"circular import: {' -> '.join(error.args[1])}") from None


@pytest.mark.parametrize("crate", sorted(CRATES))
def test_no_rust_file_uses_itself_through_others(crate: str) -> None:
    graph = rust_modules.uses(ROOT / "crates" / crate / "src")
    # the trait of vectors and the macro that picks one of its implementations stand in one file
    graph = {file: {used for used in uses if used != ("simd",)} for file, uses in graph.items()}
    assert any(graph.values())
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join("/".join(file) for file in error.args[1])) from None


def test_private_names_stay_in_their_module() -> None:
    for module in MODULES:
        for imported, name in imports(module):
            assert not name.startswith("_") or name == "__version__", f"{module} imports {name} of {imported}"


def test_packages_declare_and_do_not_compute() -> None:
    for file in PACKAGE.rglob("__init__.py"):
        for statement in ast.parse(file.read_text()).body:
            declares = isinstance(statement, (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr))
            assert declares, f"{file}, line {statement.lineno}"


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
    files = [ROOT / "crates" / name for name in CRATES]
    files += [file for file in PACKAGE.iterdir() if not file.name.startswith("_") and file.suffix in ("", ".py")]
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        assert name in paths or f"{name}/" in paths, f"{name} is missing from the README's tree"


def test_documents_link_to_files_that_exist() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
