"""What comes next, by what was missed and what is stored."""

from __future__ import annotations

import datetime
from typing import Any

from factories import make_device, make_function_profile, make_profile, make_workload

from autochunk.store.profile import Profile
from autochunk.watch.todo import SAMPLE, VERIFY_DAYS, Job, Known, Memory, todo
from autochunk.workload import Workload

DAY = 86_400.0
DEVICE = make_device()
OLDER = make_device(jaxlib="0.9.0")
CREATED = datetime.datetime.fromisoformat(make_profile().created).timestamp()
NOW = CREATED + DAY
WORKLOADS = [make_workload(f"t={128 * number},h=4,k=8") for number in range(1, 9)]
A, B, C, D, *_ = WORKLOADS


def jobs(
    *profiles: Profile,
    missed: dict[Workload, int] | None = None,
    memory: Memory | None = None,
    now: float = NOW,
    **known: Any,
) -> list[tuple[str, str]]:
    found = Known(DEVICE, profiles, missed or {}, **known)
    return [(job.kind, job.workload) for job in todo(found, memory or Memory(), "quick", now)]


def test_nothing_is_to_be_done_where_all_is_fresh() -> None:
    """Nor of what is missed elsewhere and measured here."""
    assert jobs(make_profile(A), missed={A: 9}) == []


def test_the_most_wanted_comes_first() -> None:
    """Whatever is to be done with it; of equal ones what nothing is known of."""
    found = jobs(
        make_profile(A, complete=False),
        make_profile(B, OLDER),
        make_profile(C),
        missed={D: 2, B: 5, A: 2},
        memory=Memory(drifted=[C.key]),
        functions=3,
    )
    assert found == [
        ("stale", B.key),
        ("functions", ""),
        ("missed", D.key),
        ("unfinished", A.key),
        ("drifted", C.key),
    ]


def test_efforts() -> None:
    """What was missed has the service's; what is stored is measured again by its own."""
    stored = [make_profile(A, OLDER, effort="thorough"), make_profile(B, complete=False)]
    found = todo(Known(DEVICE, stored, {C: 1}), Memory(), "quick", NOW)
    assert {job.workload: job.effort for job in found} == {
        A.key: "thorough",
        B.key: "standard",
        C.key: "quick",
    }


def test_what_came_to_nothing_is_put_off() -> None:
    """For a day, then for two, until it is done; others go on."""
    memory = Memory()
    missed = {A: 2, B: 1}
    memory.came_to_nothing(A.key, NOW)
    assert jobs(missed=missed, memory=memory) == [("missed", B.key)]
    assert len(jobs(missed=missed, memory=memory, now=NOW + DAY)) == 2
    memory.came_to_nothing(A.key, NOW + DAY)
    assert len(jobs(missed=missed, memory=memory, now=NOW + 2.5 * DAY)) == 1
    assert len(jobs(missed=missed, memory=memory, now=NOW + 3 * DAY)) == 2
    for _ in range(2000):
        memory.came_to_nothing(A.key, NOW)
    assert memory.not_before[A.key] == NOW + 30 * DAY
    memory.is_done(A.key)
    assert memory == Memory()


def test_a_sample_of_old_profiles_is_verified_when_nothing_else_is_to_be_done() -> None:
    """The oldest first, so many a day; functions and what chooses no plan cannot be."""
    later = CREATED + (VERIFY_DAYS + 1) * DAY
    profiles = [make_profile(one) for one in WORKLOADS]
    profiles += [make_function_profile(), make_profile(make_workload("t=8,k=8"), measurements=())]
    memory = Memory()
    memory.verified[A.key] = CREATED + 1.0
    found = jobs(*profiles, memory=memory, now=later, missed={make_workload("t=9,k=8"): 1})
    assert [kind for kind, _ in found] == ["missed", *["verify"] * SAMPLE]
    assert A.key not in [key for _, key in found]
    for _, key in found[1:]:
        memory.verified[key] = later
    assert jobs(*profiles, memory=memory, now=later) == []
    assert len(jobs(*profiles, memory=memory, now=later + 1.5 * DAY)) == SAMPLE


def test_jobs_are_named_by_what_they_are_about() -> None:
    """So that what kept one from being done keeps the same from being done for another reason."""
    assert Job("missed", A.key, "quick").name == Job("stale", A.key, "quick").name == A.key
    assert Job("functions", "", "quick").name == "functions"
