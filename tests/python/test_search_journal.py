"""Searches that are killed, resumed, run elsewhere, or handed a journal that is not theirs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mqadapt_rs import ArgumentError, MqadaptError
from mqadapt_rs.search import STRATEGIES, JournalError, Options, conduct
from mqadapt_rs.search.core.executors import Pool, in_process, processes
from mqadapt_rs.search.core.journal import numbered, read
from search_fakes import ONE, SPACE, TWO, FakeSpec

FULL = SPACE.kv_bytes(SPACE.source)
OPTIONS = Options(kv_budget=FULL * 0.5)
SPEC = FakeSpec("interacting", documents=48, noise=0.3)


def content(folder: Path) -> list[Any]:
    """The journal without what a clock says."""
    header, records = read(folder)
    return [header, *({key: value for key, value in record.items() if key != "seconds"} for record in records)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    conduct(SPEC, SPACE, "budget", OPTIONS, folder, seed=4)
    return folder


def test_a_journal_cut_anywhere_resumes_to_the_same_end(whole: Path, tmp_path: Path) -> None:
    journal = (whole / "journal.jsonl").read_bytes()
    cuts = [*range(0, len(journal), max(1, len(journal) // 23)), len(journal) - 1, len(journal)]
    for cut in dict.fromkeys(cuts):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(journal[:cut])
        result = conduct(SPEC, SPACE, "budget", OPTIONS, folder, seed=4, resume=True)
        assert content(folder) == content(whole)
        assert (folder / "best.plan.json").read_bytes() == (whole / "best.plan.json").read_bytes()
        assert result.verdict == json.loads((whole / "summary.json").read_text())["verdict"]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_resumes_to_the_same_end(strategy: str, tmp_path: Path) -> None:
    given = Options(plans=(SPACE.last(3, ONE), SPACE.alternate(2, TWO), SPACE.last(5, ONE)))
    options = {"budget": OPTIONS, "given": given}.get(strategy, Options())
    conduct(SPEC, SPACE, strategy, options, tmp_path / "whole", seed=2)
    journal = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    for cut in (len(journal) // 3, 2 * len(journal) // 3):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(journal[:cut])
        conduct(SPEC, SPACE, strategy, options, folder, seed=2, resume=True)
        assert content(folder) == content(tmp_path / "whole")


def test_a_finished_search_resumes_without_evaluating(whole: Path, tmp_path: Path) -> None:
    journal = (whole / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(journal)
    spec = FakeSpec("interacting", documents=48, noise=0.3, log=str(tmp_path / "log"))
    conduct(spec, SPACE, "budget", OPTIONS, tmp_path, seed=4, resume=True)
    assert not (tmp_path / "log").exists()
    assert (tmp_path / "journal.jsonl").read_bytes() == journal


def test_damage_in_the_middle_is_not_believed(whole: Path, tmp_path: Path) -> None:
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    value = lines[2].index(b'"losses": [') + 14
    flipped = lines[2][:value] + (b"1" if lines[2][value : value + 1] != b"1" else b"2") + lines[2][value + 1 :]
    number = len(lines) - 3
    for broken in (
        flipped,
        b'{"plan": [4, 4\n',
        b"[]\n",
        b"{}\n",
        b"\xff\n",
        b"\0" * 40 + b"\n",
        b"",
        lines[1],
        lines[2].replace(b'"losses": [', b'"losses": [NaN, '),
        b"[" * 100_000 + b"\n",
    ):
        (tmp_path / "journal.jsonl").write_bytes(b"".join([*lines[:2], broken, *lines[3:]]))
        after = number if broken else number - 1
        with pytest.warns(UserWarning, match=f"line 3: damaged .* the {after} lines after it are discarded"):
            assert len(read(tmp_path)[1]) == 1
        with pytest.warns(UserWarning, match="line 3: damaged"):
            conduct(SPEC, SPACE, "budget", OPTIONS, tmp_path, seed=4, resume=True)
        assert content(tmp_path) == content(whole)


def test_a_damaged_or_older_first_line_is_refused(whole: Path, tmp_path: Path) -> None:
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for first, message in (
        (lines[0].replace(b'"seed": 4', b'"seed": 5'), "line 1: damaged"),
        (lines[0].replace(b'"journal": 2', b'"journal": 1'), "format 1, expected 2: its lines have checksums"),
    ):
        damaged = b"".join([first, *lines[1:]])
        (tmp_path / "journal.jsonl").write_bytes(damaged)
        with pytest.raises(JournalError, match=message):
            conduct(SPEC, SPACE, "budget", OPTIONS, tmp_path, seed=4, resume=True)
        with pytest.raises(JournalError, match=message):
            read(tmp_path)
        assert (tmp_path / "journal.jsonl").read_bytes() == damaged


def test_an_intact_line_that_is_no_evaluation_is_an_error(whole: Path, tmp_path: Path) -> None:
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join([*lines[:2], numbered({"plan": [1]}, 2)]))
    with pytest.raises(JournalError, match="line 3: not an evaluation"):
        conduct(SPEC, SPACE, "budget", OPTIONS, tmp_path, seed=4, resume=True)


def test_links_pipes_and_files_of_others_are_refused(whole: Path, tmp_path: Path) -> None:
    folder, victim = tmp_path / "search", tmp_path / "victim"
    folder.mkdir()
    victim.write_bytes((whole / "journal.jsonl").read_bytes()[:-20])
    before = victim.read_bytes()
    journal = folder / "journal.jsonl"

    def refused(message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            conduct(SPEC, SPACE, "budget", OPTIONS, folder, seed=4, resume=True)
        journal.unlink()
        assert victim.read_bytes() == before
        assert not list(folder.iterdir())

    journal.symlink_to(victim)
    refused("is a symbolic link")
    journal.symlink_to(folder / "nowhere")
    refused("is a symbolic link")
    journal.hardlink_to(victim)
    refused("has another name")
    os.mkfifo(journal)
    refused("is not a regular file")
    if os.geteuid() == 0:  # only root gives files to another user
        journal.write_bytes(before)
        os.chown(journal, 1234, -1)
        refused("belongs to another user")


def test_results_do_not_follow_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    folder = tmp_path / "search"
    folder.mkdir()
    for name in ("best.plan.json", "summary.json", ".best.plan.json.partial", ".summary.json.partial"):
        (folder / name).symlink_to(victim)
    conduct(SPEC, SPACE, "budget", OPTIONS, folder, seed=4)
    assert victim.read_text() == "years of work"
    assert not (folder / "best.plan.json").is_symlink()
    assert (folder / ".summary.json.partial").is_symlink()
    assert not [path for path in folder.glob(".*.partial") if not path.is_symlink()]


def test_a_journal_of_another_search_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes((whole / "journal.jsonl").read_bytes())
    before = (tmp_path / "journal.jsonl").read_bytes()
    other = FakeSpec("interacting", documents=48, noise=0.3, name="another model")
    with pytest.raises(JournalError, match="model is 'fake', this one's is 'another model'"):
        conduct(other, SPACE, "budget", OPTIONS, tmp_path, seed=4, resume=True)
    with pytest.raises(JournalError, match="its seed is 4"):
        conduct(SPEC, SPACE, "budget", OPTIONS, tmp_path, seed=5, resume=True)
    with pytest.raises(JournalError, match="its options is"):
        conduct(SPEC, SPACE, "budget", Options(kv_budget=FULL * 0.4), tmp_path, seed=4, resume=True)
    with pytest.raises(JournalError, match="its strategy is 'budget'"):
        conduct(SPEC, SPACE, "sensitivity", Options(), tmp_path, seed=4, resume=True)
    with pytest.raises(JournalError, match="continue it with --resume"):
        conduct(SPEC, SPACE, "budget", OPTIONS, tmp_path, seed=4)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


SCRIPT = """
import sys
from pathlib import Path
from mqadapt_rs.search import Options, conduct
from search_fakes import SPACE, FakeSpec
spec = FakeSpec("interacting", documents=48, noise=0.3, pause=0.02)
conduct(spec, SPACE, "budget", Options(kv_budget=%r), Path(sys.argv[1]), seed=4, resume=True)
"""


def test_sigkill_and_resume_give_the_same_best_plan(whole: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT % OPTIONS.kv_budget, str(tmp_path)], env=environment, text=True
        )
        journal = tmp_path / "journal.jsonl"
        size = journal.stat().st_size if journal.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and (not journal.exists() or journal.stat().st_size < size + 4000):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 3
    assert not (tmp_path / "summary.json").exists() or killed == 6
    conduct(SPEC, SPACE, "budget", OPTIONS, tmp_path, seed=4, resume=True)
    assert content(tmp_path) == content(whole)
    assert (tmp_path / "best.plan.json").read_bytes() == (whole / "best.plan.json").read_bytes()


def test_a_journal_in_use_is_refused(tmp_path: Path) -> None:
    def watch(*_: Any) -> None:
        with pytest.raises(JournalError, match="in use"):
            conduct(SPEC, SPACE, "budget", OPTIONS, tmp_path, seed=4, resume=True)

    conduct(FakeSpec(), SPACE, "sensitivity", Options(), tmp_path, watcher=watch)


def test_processes_write_the_same_journal(whole: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    spec = FakeSpec("interacting", documents=48, noise=0.3, log=str(log), pause=0.03)
    with processes(2) as pool:
        conduct(spec, SPACE, "budget", OPTIONS, tmp_path, pool=pool, seed=4)
    assert content(tmp_path) == content(whole)
    workers = {line.split()[0] for line in log.read_text().splitlines()}
    assert len(workers) == 2
    assert str(os.getpid()) not in workers


def test_a_worker_that_dies_is_replaced(whole: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    spec = FakeSpec("interacting", documents=48, noise=0.3, log=str(log), pause=0.005)
    (tmp_path / "log.kill").touch()
    with processes(2) as pool:
        conduct(spec, SPACE, "budget", OPTIONS, tmp_path, pool=pool, seed=4)
    assert not (tmp_path / "log.kill").exists()
    assert content(tmp_path) == content(whole)


def test_workers_that_always_die_end_the_search(tmp_path: Path) -> None:
    from concurrent.futures import BrokenExecutor

    class Dying:
        def __call__(self) -> Any:
            from concurrent.futures import ProcessPoolExecutor

            return ProcessPoolExecutor(1, initializer=os._exit, initargs=(3,))

    with pytest.raises(BrokenExecutor, match="died three times in a row") as raised:
        conduct(SPEC, SPACE, "sensitivity", Options(), tmp_path, pool=Pool(Dying(), 1, "dying"))
    assert isinstance(raised.value, MqadaptError)


def test_errors_of_the_evaluator_reach_the_caller(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="nonsense"):
        conduct(FakeSpec("nonsense"), SPACE, "sensitivity", Options(), tmp_path, pool=in_process())


def test_losses_that_are_no_numbers_end_the_search(tmp_path: Path) -> None:
    spec = FakeSpec("undefined", documents=4)
    with pytest.raises(MqadaptError, match="has a loss that is infinite or not a number"):
        conduct(spec, SPACE, "sensitivity", Options(), tmp_path)
    header, records = read(tmp_path)
    assert header["journal"] == 2 and [record["plan"] for record in records] == [[4] * 8]
    with pytest.raises(ArgumentError, match="max-damage nan"):
        conduct(SPEC, SPACE, "greedy", Options(max_damage=float("nan")), tmp_path / "other")


ORPHANS = """
import sys
from pathlib import Path
from mqadapt_rs.search import Options, conduct
from mqadapt_rs.search.core.executors import processes
from search_fakes import SPACE, FakeSpec
if __name__ == "__main__":
    spec = FakeSpec("interacting", documents=48, noise=0.3, log=sys.argv[2], pause=float(sys.argv[3]))
    with processes(2) as pool:
        conduct(spec, SPACE, "budget", Options(kv_budget=%r), Path(sys.argv[1]), pool=pool, seed=4)
"""


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie, which in a container nobody may bury."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state not in "ZX"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("pause", [0.2, 60.0], ids=["between pieces", "in a piece"])
def test_workers_end_when_their_parent_is_killed(pause: float, whole: Path, tmp_path: Path) -> None:
    log, script, folder = tmp_path / "log", tmp_path / "script.py", tmp_path / "found"
    log.touch()
    script.write_text(ORPHANS % OPTIONS.kv_budget)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, script, folder, log, str(pause)], env=environment)
    deadline = time.monotonic() + 60
    wanted = 2 if pause < 1 else 1  # the source is evaluated alone
    while len(workers := {int(line.split()[0]) for line in log.read_text().splitlines()}) < wanted:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    others = {int(pid) for pid in children.read_text().split()} if children.exists() else set()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while alive := {pid for pid in workers | others if is_running(pid)}:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    if pause < 1:  # what is in the journal is whole, and the search goes on from it
        conduct(SPEC, SPACE, "budget", OPTIONS, folder, seed=4, resume=True)
        assert content(folder) == content(whole)


@pytest.mark.slow
def test_ray_writes_the_same_journal_though_a_worker_is_killed(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra 'ray')")
    log = tmp_path / "log"
    log.touch()
    script = f"""
import sys, warnings
from pathlib import Path
import ray
from mqadapt_rs.search import Options, conduct
from mqadapt_rs.search.core.executors import ray_cluster
from search_fakes import SPACE, FakeSpec
ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
spec = FakeSpec("interacting", documents=48, noise=0.3, log={str(log)!r}, pause=0.05)
with ray_cluster() as pool:
    assert pool.slots == 2, pool
    conduct(spec, SPACE, "budget", Options(kv_budget={OPTIONS.kv_budget!r}), Path(sys.argv[1]), pool=pool, seed=4)
ray.shutdown()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment)
    killed: set[int] = set()
    deadline = time.monotonic() + 200
    while process.poll() is None:
        assert time.monotonic() < deadline
        workers = [int(line.split()[0]) for line in log.read_text().splitlines() if line.endswith("48")]
        if not killed and len(workers) > 6:
            os.kill(workers[-1], signal.SIGKILL)
            killed.add(workers[-1])
        time.sleep(0.02)
    assert process.returncode == 0
    assert killed
    assert content(tmp_path) == content(whole)
