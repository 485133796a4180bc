"""The README's code blocks run, in their order, in an empty folder, with a small stand-in for the model they name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fake_hub import FakeHub

ROOT = Path(__file__).resolve().parents[2]


def blocks() -> list[tuple[str, str]]:
    """Language and code of the blocks that are to be run."""
    text = (ROOT / "README.md").read_text()
    found = re.finditer(r"^(<!-- not run: [^\n]*-->\n)?```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(block[2], block[3]) for block in found if not block[1]]


@pytest.mark.timeout(600)
def test_the_code_blocks_run(hub: FakeHub, lookalike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("HuggingFaceTB/SmolLM2-135M-Instruct", lookalike)
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("README.md", "LICENSE"):  # the texts that the examples read
        (folder / name).write_text((ROOT / name).read_text())
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env |= {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    # Python blocks continue each other, as a reader would have it
    python = "\n".join(code for language, code in blocks() if language == "python")
    shell = [code for language, code in blocks() if language == "sh"]
    assert len(shell) >= 2
    for command in [*(["bash", "-euc", code] for code in shell), [sys.executable, "-c", python]]:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
