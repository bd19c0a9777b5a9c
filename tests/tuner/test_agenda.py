"""What of a long wish list is measured, in which order, and what is said of the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from factories import Scripted, make_device, make_workload
from hypothesis import given
from hypothesis import strategies as st

from autochunk.device import Device
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.agenda import Agenda, Wishes, make_agenda
from autochunk.tuner.events import Event, Finished, LeftOut, Measured, Started
from autochunk.tuner.tune import tune
from autochunk.workload import Workload


def of_lengths(*lengths: int, **defaults: Any) -> list[Workload]:
    return [make_workload(f"t={length},h=4,k=8", **defaults) for length in lengths]


def agenda_of(wishes: Wishes, seconds: float | None, **options: Any) -> Agenda:
    deadline = None if seconds is None else time.monotonic() + seconds
    given = {"known": [], "least": 10.0, **options}
    return make_agenda(wishes, wishes.all, deadline=deadline, **given)


LENGTHS = st.sets(st.integers(1, 5000), max_size=30)


@given(named=LENGTHS, missed=LENGTHS, standard=LENGTHS, seconds=st.floats(0, 1000))
def test_named_and_standard_are_always_on_it(
    named: set[int], missed: set[int], standard: set[int], seconds: float
) -> None:
    """All wait, once each; what was missed is chosen, spare or left out."""
    first, others = of_lengths(*named), of_lengths(*standard)
    wishes = Wishes(first, dict.fromkeys(of_lengths(*missed), 1), others)
    agenda = agenda_of(wishes, seconds)
    assert len(agenda.order) == len(set(agenda.order))
    assert {*first, *others} <= set(agenda.order)
    assert {*agenda.order, *agenda.left_out} == set(wishes.all)
    assert not agenda.left_out & set(agenda.order)
    assert set(agenda.teaching) == set(wishes.missed) - {*first, *others}
    assert list(agenda.order[: len(named)]) == first
    assert agenda.not_begun(set(agenda.order)) == [] or agenda.left_out


@pytest.mark.parametrize(
    ("seconds", "standard", "chosen"),
    [
        (100.0, 0, 9),  # a moment of it is gone
        (100.0, 20, 4),
        (100.0, 3, 6),  # few of the standard set leave more of the time
        (1.0, 20, 1),
        (None, 20, 30),
    ],
)
def test_no_more_are_chosen_than_time_is_for(
    seconds: float | None, standard: int, chosen: int
) -> None:
    """Ten seconds each, and half of all at most while the standard set waits."""
    missed = dict.fromkeys(of_lengths(*range(100, 400, 10)), 1)
    wishes = Wishes((), missed, of_lengths(*range(1, standard + 1), dtype="bfloat16"))
    agenda = agenda_of(wishes, seconds)
    first = [one for one in agenda.order if one not in agenda.spare and one in missed]
    assert len(first) == chosen
    assert list(agenda.order[:chosen]) == first
    assert set(agenda.order[chosen + standard :]) == agenda.spare


def test_several_workers_have_time_for_more() -> None:
    """As many times as many."""
    wishes = Wishes(missed=dict.fromkeys(of_lengths(*range(100, 400, 10)), 1))
    assert len(agenda_of(wishes, 100.0, workers=2).order) == 19


def test_what_was_missed_gives_way_to_the_standard_set() -> None:
    """When it has had its part of the time; it comes once all of that are begun, if then."""
    missed, standard = of_lengths(100, 200), of_lengths(1, 2, dtype="bfloat16")
    agenda = Agenda([*missed, *standard], frozenset(missed), frozenset(standard), 10.0, until=0.0)
    assert not agenda.takes_up(missed[0], set(), 50.0)
    assert not agenda.is_over(missed[0])
    assert agenda.takes_up(standard[0], set(), 50.0)
    assert agenda.takes_up(missed[1], set(standard), 50.0)
    assert agenda.takes_up(missed[0], set(standard), 50.0)
    assert not agenda.takes_up(missed[0], set(standard), 5.0)
    assert agenda.is_over(missed[0])
    assert agenda.takes_up(missed[0], {missed[0]}, 5.0)  # begun, and gone on with
    assert agenda.takes_up(standard[0], set(), 0.0)


# --- Tunes ----------------------------------------------------------------------------------------


def run(command: tuple[str, ...], wishes: Wishes, **options: Any) -> list[Event]:
    events: list[Event] = []
    given = {"effort": "quick", "worker_command": command, **options}
    tune(lambda _: wishes, on_event=events.append, **given)
    return events


def begun(events: Sequence[Event]) -> list[Workload]:
    return [event.workload for event in events if isinstance(event, Started)]


def left_out(events: Sequence[Event]) -> list[LeftOut]:
    return [event for event in events if isinstance(event, LeftOut)]


@pytest.mark.parametrize("gpus", [(), ("0", "1")])
def test_a_long_list_is_not_begun_whole(gpus: tuple[str, ...], scripted: Scripted) -> None:
    """Of sixty lengths those that time is for; each has more than one plan, and the rest is told.

    The standard set is reached.
    """
    device = make_device(platform="gpu" if gpus else "cpu", kind="scripted").model_dump()
    missed = dict.fromkeys(of_lengths(*range(500, 1100, 10)), 1)
    standard = of_lengths(512, 600, mode="training")
    command = scripted(delay=0.2, device=device)
    events = run(command, Wishes((), missed, standard), timeout=20.0, gpus=gpus)
    assert set(standard) <= set(begun(events))
    stored = ProfileStore().profiles()
    assert all(sum(one.timed for one in profile.measurements) > 1 for profile in stored)
    (rest,) = left_out(events)
    assert set(rest.workloads) == set(missed) - set(begun(events))
    assert rest.missed
    assert rest.workloads


@pytest.mark.parametrize("gpus", [(), ("0", "1")])
def test_what_is_known_is_not_measured(gpus: tuple[str, ...], scripted: Scripted) -> None:
    """Asked before each that teaches; what is named is measured whatever is known.

    What is known is no longer one that was missed.
    """
    found = make_device(platform="gpu" if gpus else "cpu", kind="scripted")
    device = found.model_dump()
    named, missed = of_lengths(512), of_lengths(520, 1024, 2048)
    for workload in missed[:2]:
        ProfileStore().record_miss(found, workload)
    asked: list[Workload] = []

    def is_known(workload: Workload) -> bool:
        asked.append(workload)
        return workload.query_length < 2000

    wishes, command = Wishes(named, dict.fromkeys(missed, 1)), scripted(device=device)
    events = run(command, wishes, is_known=is_known, gpus=gpus)
    assert set(begun(events)) == {named[0], missed[2]}
    assert set(asked) == set(missed)
    (rest,) = left_out(events)
    assert (rest.workloads, set(rest.known)) == ((), set(missed[:2]))
    assert not ProfileStore().missed(found)


def test_all_are_measured_where_there_is_time(scripted: Scripted) -> None:
    """Those that teach most first; nothing is said to be left out."""
    missed = of_lengths(512, 600, 700)
    events = run(scripted(), Wishes(missed=dict.fromkeys(missed, 1)))
    assert begun(events) == [missed[1], missed[0], missed[2]]
    assert sum(isinstance(event, Finished) for event in events) == 3
    assert not left_out(events)


def interrupted(wishes: Wishes, after: int, command: tuple[str, ...]) -> Workload:
    """Ends a tune when so many plans are measured; returns the workload that they are of."""
    told: list[Workload] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, Measured) and event.done == after:
            told.append(event.workload)
            raise KeyboardInterrupt

    options: dict[str, Any] = {"effort": "quick", "worker_command": command}
    with pytest.raises(KeyboardInterrupt):
        tune(lambda _: wishes, on_event=interrupt, **options)
    return told[0]


def test_the_next_tune_goes_on(scripted: Scripted) -> None:
    """With what was cut short, and not with what would teach no more than that."""
    missed = dict.fromkeys(of_lengths(*range(500, 1100, 10)), 1)
    wishes = Wishes(missed=missed)
    first = interrupted(wishes, 3, scripted())
    (unfinished,) = ProfileStore().profiles()
    assert (unfinished.parsed_workload(), unfinished.complete) == (first, False)
    assert interrupted(wishes, 5, scripted()) == first


def test_one_timed_plan_is_not_stored(scripted: Scripted) -> None:
    """It would answer in place of a like workload's choice; the workload remains missed.

    It is kept with the study, and the next tune goes on from it.
    """
    (workload,) = of_lengths(2048)
    device = Device(platform="cpu", kind="scripted", cores=2, memory_gib=8)
    ProfileStore().record_miss(device, workload)
    command = scripted()
    interrupted(Wishes([workload]), 1, command)
    assert ProfileStore().profiles() == []
    assert ProfileStore().missed(device) == [workload]
    events = run(command, Wishes([workload]))
    (profile,) = ProfileStore().profiles()
    measured = [event for event in events if isinstance(event, Measured)]
    assert len(measured) == len(profile.measurements) - 1
