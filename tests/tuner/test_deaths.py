"""Plans that end the tuner itself, as where a kernel kills the whole container for its memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import Scripted, make_device, start_python

from autochunk.plan import Plan
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.process import WorkerProcess
from autochunk.tuner.study import Storage
from autochunk.workload import Workload

SHAPE = "t=512,h=4,k=8"

_TUNER = """
import json, sys
from pathlib import Path
from autochunk.tuner.events import Failed, Measured
from autochunk.tuner.tune import tune
from autochunk.workload import Workload
shape, command, storage, flag = json.loads(sys.argv[1])
def tell(event):
    if isinstance(event, Failed):
        print(event.detail)
    if isinstance(event, Measured) and event.done == event.total:
        Path(flag).touch()
options = {"worker_command": command, "storage": storage, "on_event": tell}
tune([Workload.parse(shape)], effort="quick", **options)
"""


def tuned_in_the_end(
    script: dict[str, Any], scripted: Scripted, folder: Path, storage: str | None, before: str = ""
) -> tuple[int, str, list[Any]]:
    """Starts a tune again for as long as it is killed; ``before`` is run in it first.

    How often it was, what the last one said, and what was asked of all measuring processes.
    """
    log = folder / "log"
    command = scripted(log=str(log), **script)
    for deaths in range(10):
        arguments = json.dumps([SHAPE, command, storage, str(folder / "flag")])
        tuner = start_python(before + _TUNER, arguments)
        out, complaints = tuner.communicate(timeout=60)
        if tuner.returncode == 0:
            return deaths, out, [json.loads(line) for line in log.read_text().splitlines()]
        assert tuner.returncode == -signal.SIGKILL, complaints
    raise AssertionError(f"killed {deaths + 1} times")


@pytest.fixture(params=[False, True], ids=["alone", "shared"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """None, or a storage that several tuners share."""
    return str(tmp_path / "shared" / "studies.journal") if request.param else None


@pytest.mark.parametrize(("plan", "when"), [("dense", ""), ("xla, 1.05 MB", "time:")])
def test_a_plan_that_ends_the_tuner_is_given_up_after_two_deaths(
    plan: str, when: str, storage: str | None, scripted: Scripted, tmp_path: Path
) -> None:
    """All others are measured, and a profile is made of them.

    Whether it does so when it is run first, as the anchor may be before all, or in a round.
    """
    script = {"plans": {plan: {"do": f"{when}end-parent"}}}
    deaths, _, requests = tuned_in_the_end(script, scripted, tmp_path, storage)
    assert deaths == 2
    asked = Counter(str(Plan(*one["plan"])) for one in requests if one["do"] == "prepare")
    assert asked[plan] == deaths
    (profile,) = ProfileStore().profiles()
    assert profile.complete
    found = {str(measurement.plan): measurement for measurement in profile.measurements}
    given_up = found.pop(plan)
    assert given_up.status == "crashed"
    assert "ended the tuner itself 2 times" in given_up.detail
    assert {measurement.status for measurement in found.values()} <= {"ok", "pruned"}


MEMORY_CGROUPS = Path("/sys/fs/cgroup/memory")  # of version 1


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Path]:
    """A memory cgroup of 700 MB, all of whose processes are killed when the kernel kills one.

    Version 2 does that by itself (``memory.oom.group``).
    """
    if os.geteuid() or not os.access(MEMORY_CGROUPS / "memory.oom_control", os.R_OK):
        pytest.skip("a memory cgroup of one's own takes root and version 1")
    folder = MEMORY_CGROUPS / f"autochunk-{os.getpid()}"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(str(700 * 10**6))
    ended = threading.Event()

    def kill_all() -> None:
        killed = (folder / "memory.oom_control").read_text()
        while not ended.wait(0.002):
            if killed != (killed := (folder / "memory.oom_control").read_text()):
                for process in (folder / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(process), signal.SIGKILL)

    watch = threading.Thread(target=kill_all)
    watch.start()
    yield folder
    ended.set()
    watch.join()
    folder.rmdir()


def test_a_plan_for_which_a_kernel_kills_the_container_is_given_up(
    container: Path, scripted: Scripted, tmp_path: Path
) -> None:
    """The real thing: it takes more memory than there is, and everything around it is killed."""
    script = {"plans": {"dense": {"do": "take 2000"}}}
    inside = f"open({str(container / 'cgroup.procs')!r}, 'w').write('0')\n"
    deaths, _, _ = tuned_in_the_end(script, scripted, tmp_path, None, before=inside)
    assert deaths == 2
    (profile,) = ProfileStore().profiles()
    assert profile.complete
    statuses = {str(one.plan): one.status for one in profile.measurements}
    assert statuses.pop("dense") == "crashed"
    assert set(statuses.values()) <= {"ok", "pruned"}


def test_one_death_is_no_reason_to_give_a_plan_up(
    storage: str | None, scripted: Scripted, tmp_path: Path
) -> None:
    """A person or another program may have been the cause: it is tried again, after the others."""
    script = {"plans": {"dense": {"do": f"once:{tmp_path / 'died'}:end-parent"}}}
    deaths, _, _ = tuned_in_the_end(script, scripted, tmp_path, storage)
    assert deaths == 1
    (profile,) = ProfileStore().profiles()
    assert {measurement.status for measurement in profile.measurements} <= {"ok", "pruned"}


def test_a_workload_whose_inputs_end_the_tuner_is_told_to_fail(
    storage: str | None, scripted: Scripted, tmp_path: Path
) -> None:
    """They are tried twice; without them nothing of it can be measured."""
    deaths, said, requests = tuned_in_the_end({"load": "end-parent"}, scripted, tmp_path, storage)
    assert deaths == 2
    assert [one["do"] for one in requests].count("load") == deaths
    assert "ended the tuner itself 2 times" in said.splitlines()[-1]


def test_joint_rounds_that_end_the_tuner_are_left_out(
    storage: str | None, scripted: Scripted, tmp_path: Path
) -> None:
    """What each plan took alone stands."""
    deed = f"time:after:{tmp_path / 'flag'}:end-parent"
    script = {"plans": {"xla_rows, 1.05 MB": {"do": deed, "seconds": 0.0095}}}
    deaths, _, _ = tuned_in_the_end(script, scripted, tmp_path, storage)
    assert deaths == 2
    (profile,) = ProfileStore().profiles()
    assert profile.complete
    assert {measurement.joint for measurement in profile.measurements} == {0}


def test_leaving_a_plan_is_no_death(tmp_path: Path) -> None:
    """Ctrl-C, or the end of the time."""
    study = Storage(tmp_path / "journal").study(make_device(), Workload.parse(SHAPE), "quick")
    for _ in range(3):
        claim = study.claim([Plan("dense", None)])
        assert claim is not None
        with contextlib.suppress(KeyboardInterrupt), claim:
            claim.runs("dense")
            raise KeyboardInterrupt
    assert not study.deaths()


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux's")
def test_the_measuring_process_is_the_likelier_victim() -> None:
    """Where memory is short the kernel kills it first: its death is a result, no loss."""
    code = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"score": int(open("/proc/self/oom_score_adj").read())}), flush=True)
"""
    process = WorkerProcess([sys.executable, "-c", code], {})
    try:
        assert process.ask({}, 30.0) == {"score": 1000}
    finally:
        process.stop()
