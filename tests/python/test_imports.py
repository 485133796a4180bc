"""What is loaded when: nothing heavy before it is needed, PyTorch and transformers never by the base package."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "lm_eval", "datasets", "pandas", "scipy", "matplotlib"}


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded after running `code` in a fresh interpreter."""
    code += "\nimport sys; print('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def run_cli(*arguments: str) -> str:
    """Code that runs the command line and survives its exit."""
    return f"""
import sys
from mqadapt_rs.cli import main
sys.argv = ["mqadapt", *{list(arguments)!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def test_the_package_loads_only_itself() -> None:
    loaded = modules_after("import mqadapt_rs")
    assert not loaded & (HEAVY | {"typer", "rich", "huggingface_hub", "tokenizers", "numpy", "safetensors"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert", "--help"], ["eval", "--help"]])
def test_help_loads_no_library(arguments: list[str]) -> None:
    loaded = modules_after(run_cli(*arguments))
    assert not loaded & (HEAVY | {"huggingface_hub", "tokenizers", "numpy"})


def test_using_a_model_loads_neither_torch_nor_transformers(lookalike: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One day, a little girl went out. " * 10)
    dst = tmp_path / "converted"
    for arguments in (
        ["inspect", str(lookalike)],
        ["convert", str(lookalike), str(dst), "--plan", "mqa:last2"],
        ["perplexity", str(dst), "--text", str(text), "--context", "16"],
        ["generate", str(dst), "--prompt", "One", "--max-new-tokens", "2"],
    ):
        assert not modules_after(run_cli(*arguments)) & HEAVY, arguments[0]


def test_the_base_install_asks_for_nothing_heavy() -> None:
    needed = [r for r in metadata.requires("mqadapt-rs") or [] if "extra ==" not in r]
    names = {r.split(">")[0].split("=")[0].strip().lower().replace("_", "-") for r in needed}
    assert names == {"huggingface-hub", "numpy", "rich", "safetensors", "tokenizers", "typer"}
