"""The parent's half of measuring: every way a worker can fail is a result."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from factories import Scripted

from autochunk.errors import ProbeError
from autochunk.plan import Plan
from autochunk.tuner.probe import OutOfTime, Probe
from autochunk.tuner.process import WORKER, WorkerFailure
from autochunk.workload import Workload

GOOD, BAD = Plan("xla", 1.0), Plan("xla", 2.0)


def pid_of(probe: Probe) -> int | None:
    """Process id of its worker; None where none runs."""
    return probe._worker.process.pid if probe._worker else None


def test_a_real_worker_measures(small: Workload) -> None:
    """A real process prepares and times.

    Status, memory, compile time, error and one time are there for each plan.
    """
    with Probe() as probe:
        probe.load(small)
        prepared = probe.prepare(Plan("xla", 0.01))
        assert prepared.status == "ok"
        assert prepared.temp_bytes is not None
        assert prepared.temp_bytes >= 0
        assert prepared.compile_seconds is not None
        assert prepared.compile_seconds > 0
        assert len(probe.time([Plan("xla", 0.01), Plan("dense", None)])) == 2


def test_a_real_worker_that_is_killed_costs_one_plan(small: Workload) -> None:
    """After SIGKILL the plan at hand has crashed, and the next is measured by a new worker."""
    with Probe() as probe:
        probe.load(small)
        assert probe.prepare(Plan("xla", None)).status == "ok"
        first = pid_of(probe)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        lost = probe.prepare(Plan("dense", None))
        assert lost.status == "crashed"
        assert "SIGKILL" in lost.detail
        assert probe.time([Plan("dense", None), Plan("xla", None)])
        assert pid_of(probe) != first


def test_more_memory_than_there_is_is_out_of_memory() -> None:
    """A buffer that cannot be had is a result, even where the budget was wrong.

    The worker lives on.
    """
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this system promises memory that it has not got")
    # Logits of four times the machine's memory.
    length = math.isqrt(4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    with Probe(memory_budget_bytes=2**62) as probe:
        probe.load(Workload.parse(f"t={length},k=1"))
        pid = pid_of(probe)
        assert probe.prepare(Plan("dense", None)).status == "oom"
        assert pid_of(probe) == pid


@pytest.mark.parametrize(
    ("deed", "status", "words"),
    [
        (f"die {int(signal.SIGKILL)}", "crashed", "SIGKILL"),
        (f"die {int(signal.SIGABRT)}", "crashed", "SIGABRT"),
        (f"die {int(signal.SIGSEGV)}", "crashed", "SIGSEGV"),
        ("exit 3", "crashed", "exit status 3: giving up"),
        ("babble", "crashed", "Segmentation fault imminent"),
        ("hang", "timeout", "no answer within 1 s"),
        ("refuse", "crashed", "refused as scripted"),
        ("oom", "oom", "scripted oom"),
        ("over_budget", "over_budget", "scripted"),
    ],
)
@pytest.mark.parametrize("when", ["", "time:"])
def test_every_failure_is_a_result_of_that_plan_only(
    deed: str, status: str, words: str, when: str, small: Workload, scripted: Scripted
) -> None:
    """Whatever a plan does, prepared or timed, is told of it, and the next plan is measured."""
    if when and deed in ("refuse", "oom", "over_budget"):
        pytest.skip("answers, not deeds")
    command = scripted(plans={str(BAD): {"do": when + deed}}, default={"seconds": 0.5})
    with Probe(command, seconds_per_request=1.0) as probe:
        probe.load(small)
        assert probe.time([GOOD]) == [0.5]
        if when:
            assert probe.prepare(BAD).status == "ok"
            with pytest.raises(WorkerFailure) as failure:
                probe.time([GOOD, BAD])
            result: Any = failure.value
        else:
            result = probe.prepare(BAD)
        assert result.status == status
        assert words in result.detail
        assert probe.time([GOOD]) == [0.5]


@pytest.mark.parametrize(
    ("worker", "deed", "temp", "asked", "status"),
    [
        ("scripted_gpu", "once:FLAG:oom", 5000, 2, "ok"),
        ("scripted_gpu", "oom", 5000, 2, "oom"),
        ("scripted_gpu", "oom", None, 1, "oom"),
        ("scripted", "oom", 5000, 1, "oom"),
    ],
    ids=["then it runs", "not even then", "compiling it takes too much", "cpu"],
)
def test_a_compiled_plan_that_has_no_memory_is_tried_in_a_new_worker(
    worker: str,
    deed: str,
    temp: int | None,
    asked: int,
    status: str,
    small: Workload,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """A new worker has memory whole, and the compiled program.

    Compiling on a GPU leaves jax's allocator with pieces, none of which may be large enough.
    """
    log, deed = tmp_path / "log", deed.replace("FLAG", str(tmp_path / "flag"))
    plans = {str(BAD): {"do": deed, "temp": temp}}
    with Probe(request.getfixturevalue(worker)(plans=plans, log=str(log))) as probe:
        probe.load(small)
        pid = pid_of(probe)
        assert probe.prepare(BAD).status == status
        assert (pid_of(probe) == pid) == (asked == 1)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["do"] for line in lines].count("prepare") == asked
    (folder,) = {line["programs"] for line in lines if line["do"] == "load"}
    assert bool(folder) == (worker == "scripted_gpu")
    assert not folder or not Path(folder).exists()


@pytest.mark.parametrize("order", [[GOOD, BAD], [BAD, GOOD]], ids=["last", "first"])
def test_plans_that_a_new_worker_does_not_know_are_prepared_there(
    order: list[Plan], small: Workload, scripted_gpu: Scripted, tmp_path: Path
) -> None:
    """One of those to be timed together may need a new worker.

    The others are then prepared in that one, too.
    """
    plans = {str(BAD): {"do": f"once:{tmp_path / 'flag'}:oom", "temp": 5000}}
    with Probe(scripted_gpu(plans=plans, default={"seconds": 0.5})) as probe:
        probe.load(small)
        assert len(probe.time(order)) == 2


def test_plans_that_have_no_memory_together_cannot_be_timed_together(
    small: Workload, scripted_gpu: Scripted, tmp_path: Path
) -> None:
    """That ends, as out of memory: preparing one of them costs another each time."""
    third, one, other = Plan("xla", 3.0), tmp_path / "one", tmp_path / "other"
    deeds = {
        str(third): {"do": f"once:{one}:oom", "temp": 5000},
        str(BAD): {"do": f"after:{one}:once:{other}:oom", "temp": 5000},
    }
    with Probe(scripted_gpu(plans=deeds)) as probe:
        probe.load(small)
        with pytest.raises(WorkerFailure, match="not beside the plans") as failure:
            probe.time([GOOD, BAD, third])
    assert failure.value.status == "oom"


def test_no_place_for_programs_is_no_obstacle(
    small: Workload, scripted_gpu: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no folder can be made for them, workers compile anew."""
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    with Probe(scripted_gpu()) as probe:
        probe.load(small)
        assert probe.prepare(GOOD).status == "ok"


def test_a_worker_that_cannot_start_is_an_error(
    tmp_path: Path, scripted: Scripted, small: Workload
) -> None:
    """No process, or one that never says hello, is no result of a plan: nothing can be measured."""
    nothing = (str(tmp_path / "nothing"),)
    with pytest.raises(ProbeError, match="cannot start"), Probe(nothing) as probe:
        probe.connect()
    said = "cannot start a measuring process"
    with pytest.raises(ProbeError, match=said), Probe(("false",)) as probe:
        probe.connect()
    said = r"cannot measure attention:.*exit status 4"
    with pytest.raises(ProbeError, match=said), Probe(scripted(load="exit 4")) as probe:
        probe.load(small)


def test_a_workers_complaints_may_be_any_bytes(small: Workload) -> None:
    """They are read to the end whatever their encoding.

    What nobody reads fills the pipe, and then the worker waits.
    """
    code = "import os; os.write(2, b'caf\\xe9\\nout of coffee'); os._exit(3)"
    said, command = r"exit status 3: .*out of coffee", (sys.executable, "-c", code)
    with pytest.raises(ProbeError, match=said), Probe(command) as probe:
        probe.load(small)


def test_a_workers_modules_are_not_the_working_directorys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's file that is called as a module of the worker's stays unread."""
    for name in ("queue.py", "copy.py"):
        (tmp_path / name).write_text("raise RuntimeError('not what was meant')")
    monkeypatch.chdir(tmp_path)
    with Probe() as probe:
        assert probe.connect().platform


def test_a_worker_runs_the_autochunk_that_started_it(tmp_path: Path) -> None:
    """Its folder comes with the command: it may be installed nowhere, or another version may be."""
    (tmp_path / "autochunk" / "tuner").mkdir(parents=True)
    (tmp_path / "autochunk" / "__init__.py").touch()
    (tmp_path / "autochunk" / "tuner" / "worker.py").write_text("def main(): print('this one')")
    assert (Path(WORKER[-1]) / "autochunk" / "tuner" / "probe.py").is_file()
    assert subprocess.check_output([*WORKER[:-1], str(tmp_path)], text=True) == "this one\n"


def test_the_deadline_ends_a_request_without_blaming_the_plan(
    small: Workload, scripted: Scripted
) -> None:
    """Running out of time is not a plan's timeout."""
    with Probe(scripted(plans={str(BAD): {"do": "hang"}}), seconds_per_request=60.0) as probe:
        probe.load(small)
        probe.deadline = time.monotonic() + 0.5
        with pytest.raises(OutOfTime):
            probe.prepare(BAD)
        assert pid_of(probe) is None


def test_a_worker_has_one_workload(small: Workload, scripted: Scripted) -> None:
    """One that was only asked for its device takes the first.

    The next workload has a worker of its own, free of what the last one left in memory.
    """
    with Probe(scripted()) as probe:
        probe.connect()
        pids = [pid_of(probe)]
        for _ in range(2):
            probe.load(small)
            pids.append(pid_of(probe))
    assert pids[0] == pids[1] != pids[2]


def test_on_an_accelerator_a_worker_has_one_workload_after_the_other(
    small: Workload, scripted: Scripted, tmp_path: Path
) -> None:
    """Its memory is jax's own; plans of the last workload are asked for anew."""
    device = {"platform": "gpu", "kind": "scripted", "cores": 0, "memory_gib": 8}
    log = tmp_path / "log"
    pids = []
    with Probe(scripted(device=device, log=str(log))) as probe:
        for _ in range(3):
            probe.load(small, [GOOD])
            pids.append(pid_of(probe))
            assert probe.prepare(GOOD).status == "ok"
            assert probe.prepare(GOOD).status == "ok"
    assert len(set(pids)) == 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["do"] for line in lines].count("prepare") == 3
    assert all(line["ahead"] == [GOOD.as_data()] for line in lines if line["do"] == "load")


def test_a_worker_that_dies_before_its_workload_is_replaced(
    small: Workload, scripted: Scripted
) -> None:
    """It cost nothing, since it had nothing to do."""
    with Probe(scripted()) as probe:
        probe.connect()
        assert probe._worker is not None
        probe._worker.process.kill()
        probe._worker.process.wait()
        probe.load(small)
        assert probe.prepare(GOOD).status == "ok"


def test_a_plan_is_prepared_once_for_each_worker(
    small: Workload, scripted: Scripted, tmp_path: Path
) -> None:
    """Compiling is dear: what the worker has ready is not sent again, what it dropped is."""
    log = tmp_path / "log"
    with Probe(scripted(log=str(log))) as probe:
        probe.load(small)
        for _ in range(3):
            probe.prepare(GOOD)
            probe.time([GOOD])
        probe.drop(GOOD)
        probe.time([GOOD])
    assert log.read_text().count('"prepare"') == 2


def test_closing_leaves_no_process_behind(small: Workload) -> None:
    """A closed probe's worker is gone."""
    probe = Probe()
    probe.load(small)
    pid = pid_of(probe)
    assert pid is not None
    probe.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
