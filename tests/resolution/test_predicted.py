"""Predictions as answers: from what they come, when they are told of, and what they hold to."""

from __future__ import annotations

import math
import sqlite3
import warnings
from contextlib import closing
from pathlib import Path

import pytest
from factories import (
    make_call,
    make_device,
    make_function_profile,
    make_measurement,
    make_profile,
    run_python,
)

from autochunk.device import Device
from autochunk.errors import MissWarning
from autochunk.plan import Plan
from autochunk.predict.prediction import plans_of
from autochunk.predict.work import work_of
from autochunk.resolution import reporting, resolve
from autochunk.resolution.answer import Resolution
from autochunk.resolution.settings import use
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.workload import Workload

DEVICE = make_device()
BEST_BYTES = 2.1e6
LENGTHS = (256, 512, 2048, 4096)


def workload(length: int, mode: str = "forward", **fields: str) -> Workload:
    return Workload.parse(f"b=2,t={length},h=4,k=32", mode=mode, **fields)


def cost(of: Workload, plan: Plan) -> tuple[float, float]:
    """Seconds and MB of a made-up machine on which slices of ``BEST_BYTES`` are the fastest."""
    work = work_of(of, plan)
    off = math.log2(work.at_once / BEST_BYTES)
    share = 3.0 if plan.implementation == "dense" else 1 + 0.02 * off**2
    slow = 1.1 if plan.implementation == "xla_rows" else 1.0
    return 1e-9 * work.logits * share * slow, 2 * work.at_once / 1e6 + 1.0


def profile(of: Workload, device: Device = DEVICE, most: int = 100, **fields: object) -> Profile:
    plans = plans_of(of, "cpu")[:most]
    unit = cost(of, plans[0])[0]
    measured: list[Measurement] = []
    for plan in plans:
        seconds, memory = cost(of, plan)
        name, limit = plan.implementation, plan.max_chunk_size_mb
        measured.append(make_measurement(name, limit, seconds / unit, memory, noise=0.005))
    return make_profile(of, device, measured, **fields)


@pytest.fixture
def store(store_path: Path) -> ProfileStore:
    """The user's store with four lengths in it."""
    store = ProfileStore(store_path)
    store.put_all([profile(workload(length)) for length in LENGTHS])
    return store


def ask(of: Workload, device: Device = DEVICE, **options: object) -> Resolution:
    return resolve.resolve(of, device=device, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [300, 777, 1024, 1536, 3000])
def test_lengths_in_between_have_the_fastest_plan(store: ProfileStore, length: int) -> None:
    """Within 3% of it; "explain" has times, memory and how sure it is."""
    found = ask(workload(length))
    assert found.match == "predicted"
    assert found.prediction is not None
    best = min(cost(workload(length), plan)[0] for plan in plans_of(workload(length), "cpu"))
    assert cost(workload(length), found.plan)[0] <= 1.03 * best
    assert "4 measured here" in found.reason
    assert found.within is not None
    assert found.rejected


def test_functions_are_no_neighbours(store: ProfileStore) -> None:
    """Of a name and sizes like those of attention, and by what only looks like a key."""
    before = ask(workload(777))
    store.put(make_function_profile(make_call(name="attention:b", lengths="777")))
    rest = workload(777).key.removeprefix("attention:")
    with closing(sqlite3.connect(store.path)) as file, file:
        named = (f"{DEVICE.key} | function:{rest}", "{}")
        file.execute("INSERT INTO profiles (key, value) VALUES (?, ?)", named)
    assert ask(workload(777)).plan == before.plan


@pytest.mark.parametrize("budget", [1000.0, 30.0, 6.0])
def test_a_budget_holds_for_predictions(store: ProfileStore, budget: float) -> None:
    """With a margin: what the plan really takes is within it."""
    with use(memory_budget_mb=budget):
        found = ask(workload(1500))
    assert found.match == "predicted"
    assert cost(workload(1500), found.plan)[1] <= budget


def test_half_of_the_memory_there_is_holds_without_a_budget(store: ProfileStore) -> None:
    """A container with less of it is the same device; what did run elsewhere may not fit there."""
    small = make_device(memory_gib=1)
    long = workload(60_000)
    found = ask(long, small)
    assert found.prediction is None or found.prediction.cost.most_bytes <= 2**29


@pytest.mark.parametrize("implementation", ["xla", "xla_rows"])
def test_what_is_asked_for_is_chosen_among(store: ProfileStore, implementation: str) -> None:
    """Its limit is predicted; what does not slice leaves nothing to predict."""
    found = ask(workload(1500), implementation=implementation)
    assert found.match == "predicted"
    assert found.plan.implementation == implementation
    assert ask(workload(1500), implementation="dense").match != "predicted"


def test_what_is_far_is_not_predicted(store: ProfileStore) -> None:
    """Sizes of another order are not guessed at from these."""
    assert ask(Workload.parse("b=4096,t=16,h=64,k=512", mode="training")).match == "default"


def test_no_warning_where_this_device_was_measured(store: ProfileStore) -> None:
    """What is not sure is remembered for ``autochunk tune --missed``, what is is not."""
    near, far = ask(workload(1024)), ask(workload(1024, "training"))
    assert near.prediction is not None
    assert far.prediction is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reporting.report(near)
        reporting.report(far)
    unsure = [one.workload for one in (near, far) if one.prediction and not one.prediction.sure]
    assert far.workload in unsure
    assert store.missed(DEVICE) == unsure


def test_another_device_s_curves_are_told_of_once(store: ProfileStore) -> None:
    """They answer where nothing was measured, with one warning for all lengths, and are missed."""
    other = make_device(kind="Made/Up2")
    answers = [ask(workload(length), other) for length in (300, 777, 1024)]
    assert {answer.match for answer in answers} == {"predicted"}
    with pytest.warns(MissWarning, match="predicted from other devices"):
        reporting.report(answers[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for answer in answers:
            reporting.report(answer)
    assert len(store.missed(other)) == 3


def test_an_unfinished_profile_of_two_plans_hides_no_prediction(store: ProfileStore) -> None:
    """Nor does it keep what it measured from counting."""
    store.put(profile(workload(1024), most=2, complete=False))
    found = ask(workload(1024))
    assert found.match == "predicted"
    assert "5 measured here" in found.reason
    store.put(profile(workload(1024), most=3, complete=False))
    assert ask(workload(1024)).match == "exact"


def test_a_limit_that_cannot_be_is_left_out(store: ProfileStore) -> None:
    """A profile written by hand may have one of less than one logit: the rest of it counts."""
    odd = make_measurement("xla", 1e-9)
    one = profile(workload(900))
    store.put(one.model_copy(update={"measurements": (*one.measurements, odd)}))
    assert ask(workload(1024)).match == "predicted"


def test_every_process_predicts_the_same(store: ProfileStore) -> None:
    """Whatever the order in which profiles were stored, and however Python hashes."""
    code = f"""
import sys
from autochunk.device import Device
from autochunk.resolution.resolve import resolve
from autochunk.workload import Workload
device = Device.model_validate_json({DEVICE.model_dump_json()!r})
for length in (300, 777, 1024, 1536, 3000):
    found = resolve(Workload.parse(f"b=2,t={{length}},h=4,k=32"), device=device)
    print(found.plan, repr(round(found.prediction.cost.seconds, 12)))
"""
    first = run_python(code)
    profiles = store.profiles()
    store.forget(profiles)
    for one in profiles[::-1]:
        store.put(one)
    assert run_python(code) == first
