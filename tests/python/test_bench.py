"""`mqadapt bench` and `mqadapt_rs.bench`: what is reported, not how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mqadapt_rs import ArgumentError
from mqadapt_rs.bench import bench


def test_every_plan_and_depth_is_measured(lookalike: Path) -> None:
    rounds: list[tuple[str, int, int]] = []
    report = bench(
        lookalike,
        ["mqa:last8"],
        groups=[1, 3],
        depths=[4, 20],
        prompts=[8],
        steps=2,
        rounds=2,
        progress=lambda *a: rounds.append(a),
    )
    assert [one["plan"] for one in report["plans"]] == ["keep", "mqa:last8", "mqa:all", "gqa3:all"]
    # head_dim 8, keys and values, f32
    assert [one["kv_bytes_per_token"] for one in report["plans"]] == [n * 8 * 2 * 4 for n in (90, 74, 30, 90)]
    assert [row["num_key_value_heads"] for row in report["decode"][:4]] == pytest.approx([3, 74 / 30, 1, 3])
    assert len(report["decode"]) == 8 and len(report["prefill"]) == 4
    assert all(row["tokens_per_second"] > 0 for row in report["decode"] + report["prefill"])
    assert [row["speedup"] for row in report["decode"] if row["plan"] == "keep"] == [1, 1]
    assert rounds == [("rounds", 1, 2), ("rounds", 2, 2)]


def test_what_cannot_be_measured(lookalike: Path) -> None:
    with pytest.raises(ArgumentError, match="1 and 3 are possible"):
        bench(lookalike, groups=[2])
    with pytest.raises(ArgumentError, match="from 1 to"):
        bench(lookalike, steps=0)


def test_the_command(lookalike: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'plot')")

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mqadapt_rs.cli", "bench", lookalike, "--steps", 2, "--rounds", 1, *args]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    file, picture = tmp_path / "bench.json", tmp_path / "latency.svg"
    done = run("--groups", "1,3", "--depth", "4,20", "--prompt", "8", "--json", "--plot", picture)
    assert done.returncode == 0, done.stderr
    file.write_text(done.stdout)
    assert {row["depth"] for row in json.loads(done.stdout)["decode"]} == {4, 20}
    assert picture.read_text().startswith("<?xml")
    assert "mqa:all" in run("--groups", "1", "--depth", "4", "--prompt", "8").stdout
    for wrong in (["--groups", "0"], ["--depth", "deep"], ["--plot", tmp_path / "x.txt"], ["--groups", "2"]):
        done = run(*wrong)
        assert done.returncode == 2, wrong
        assert "Traceback" not in done.stderr
