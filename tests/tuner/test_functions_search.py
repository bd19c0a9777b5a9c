"""Which chunks of a function are tried, in which order, and what is found when time is short."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from factories import Scripted, make_call

from autochunk.plan import CHUNKS, Plan
from autochunk.store.choice import DENSE, choose
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.functions.candidates import Candidates
from autochunk.tuner.functions.search import Search
from autochunk.tuner.probe import Probe

LENGTH = 768
MOST = 1024  # chunks that quick effort looks at
COARSE = [one for (one,) in Candidates([LENGTH], MOST).coarse()]
SLOW = 100.0


def chunks(size: int) -> Plan:
    """Of so many positions."""
    return Plan(CHUNKS, None, (size,))


def searched(
    command: tuple[str, ...], seconds: float = math.inf, length: int = LENGTH
) -> tuple[Search, bool]:
    """A search by a worker of its own, which is ready when the time begins; whether it is done."""
    call = make_call(lengths=str(length), arguments=f"float32[{length}.8]@0")
    with Probe(command) as probe:
        probe.connect()
        search = Search(call, probe, EFFORT_SETTINGS["quick"])
        return search, search.run(seconds)


def requests(log: Path, action: str) -> list[dict[str, Any]]:
    """What a worker was asked for, in this order."""
    every = [json.loads(line) for line in log.read_text().splitlines()]
    return [one for one in every if one["do"] == action]


def sizes_prepared(log: Path) -> list[int | None]:
    """Sizes of chunks as they were prepared; None is the whole call."""
    return [one["plan"][2][0] if one["plan"][2:] else None for one in requests(log, "prepare")]


def test_from_coarse_to_fine(scripted: Scripted, tmp_path: Path) -> None:
    """The whole call, the coarse sizes from the middle on, then those beside the best."""
    plans = {str(chunks(COARSE[1])): {"seconds": 0.005}}
    search, complete = searched(scripted(plans=plans, log=str(tmp_path / "log")))
    assert complete
    order = sizes_prepared(tmp_path / "log")
    assert order[: 1 + len(COARSE)] == [None, *COARSE]
    beside = Candidates([LENGTH], MOST).neighbours((COARSE[1],))
    assert {(one,) for one in order[1 + len(COARSE) :]} >= set(beside)
    choice = choose(search.found.values())
    assert choice is not None
    assert choice.plan == chunks(COARSE[1])


def test_below_the_range_if_that_is_worth_it(scripted: Scripted) -> None:
    """While smaller chunks are about as fast: they take less memory, and may fit a cache."""
    plans = {str(chunks(2)): {"seconds": 0.005}, str(chunks(1)): {"seconds": 0.02}}
    length = 4 * MOST
    search, complete = searched(scripted(plans=plans), length=length)
    assert complete
    assert 2 not in [size for (size,) in Candidates([length], MOST).fine()]
    choice = choose(search.found.values())
    assert choice is not None
    assert choice.plan == chunks(2)


def test_a_slow_whole_call_is_timed_once(scripted: Scripted, tmp_path: Path) -> None:
    """It says what is right, and then takes no more of the time."""
    command = scripted(plans={str(DENSE): {"seconds": SLOW}}, log=str(tmp_path / "log"))
    search, _ = searched(command)
    timed = [one["plans"] for one in requests(tmp_path / "log", "time")]
    assert sum(DENSE.as_data() in plans for plans in timed) == 1
    assert sizes_prepared(tmp_path / "log")[0] is None
    assert search.found[DENSE].status == "pruned"


def test_a_short_time_sees_the_whole_range(scripted: Scripted) -> None:
    """Each coarse size has a round before any has another, and the best meet in joint rounds."""
    best, second = chunks(COARSE[-1]), chunks(COARSE[-2])
    plans = {str(best): {"seconds": 0.002}, str(second): {"seconds": 0.0022}}
    command = scripted(plans=plans, delay=0.1)
    search, _ = searched(command, 3.0)
    assert all(search.found[chunks(size)].timed for size in COARSE)
    assert search.found[best].joint > 0
    choice = choose(search.found.values())
    assert choice is not None
    assert choice.plan == best


@pytest.mark.parametrize("whole", [0.01, SLOW])
@pytest.mark.parametrize("number", range(3))
def test_no_more_chunks_once_results_differ(
    number: int, whole: float, scripted: Scripted, tmp_path: Path
) -> None:
    """All are refused, and the whole call, however slow, is what is left."""
    plans = {str(DENSE): {"seconds": whole}, str(chunks(COARSE[number])): {"do": "inaccurate"}}
    search, complete = searched(scripted(plans=plans, log=str(tmp_path / "log")))
    assert complete
    assert sizes_prepared(tmp_path / "log") == [None, *COARSE[: number + 1]]
    tried = [one for one in search.found.values() if one.chunk_sizes]
    assert {one.status for one in tried} == {"inaccurate"}
    choice = choose(search.found.values())
    assert choice is not None
    assert choice.plan == DENSE


def test_what_is_below_slower_and_slower_chunks_is_skipped(
    scripted: Scripted, tmp_path: Path
) -> None:
    """Larger ones are tried all the same."""
    plans = {str(chunks(size)): {"seconds": 0.01 * 512 / size} for size in COARSE}
    search, complete = searched(scripted(plans=plans, log=str(tmp_path / "log")))
    assert complete
    below = [size for size in COARSE if size < min(COARSE[:2])]
    assert below
    assert {search.found[chunks(size)].status for size in below} == {"skipped"}
    assert not set(below) & set(sizes_prepared(tmp_path / "log"))
    assert all(search.found[chunks(size)].timed for size in COARSE if size not in below)


def test_a_tie_goes_to_less_memory(scripted: Scripted) -> None:
    """Of chunks that all take as long as the whole call."""
    plans = {str(chunks(size)): {"temp": 1000 * size} for size in range(1, LENGTH)}
    plans[str(DENSE)] = {"temp": 1000 * LENGTH}
    search, complete = searched(scripted(plans=plans))
    assert complete
    choice = choose(search.found.values())
    assert choice is not None
    assert choice.measurement.temp_bytes == min(m.temp_bytes or 0 for m in search.found.values())


@pytest.mark.parametrize("deed", ["oom", "over_budget", "die 9", "time:die 9", "hang"])
def test_a_whole_call_that_fails(deed: str, scripted: Scripted) -> None:
    """The function is tuned even so: by chunks, of which the first says what is right."""
    command = scripted(plans={str(DENSE): {"do": deed}})
    search, _ = searched(command, 9.0 if deed == "hang" else math.inf)
    assert not search.found[DENSE].timed
    assert all(search.found[chunks(size)].timed for size in COARSE)
    choice = choose(search.found.values())
    assert choice is not None
    assert choice.plan.implementation == CHUNKS
