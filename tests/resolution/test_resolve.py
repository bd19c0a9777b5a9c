"""How "auto" is answered: which layer, which plan, and what is said about it."""

from __future__ import annotations

import contextvars
import json
import os
import sqlite3
import threading
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from factories import (
    CURVE,
    make_device,
    make_measurement,
    make_profile,
    make_workload,
    one_plan,
    run_python,
    start_python,
)
from hypothesis import given
from hypothesis import strategies as st

from autochunk.device import detect
from autochunk.errors import (
    ArgumentError,
    BudgetWarning,
    BundleError,
    MissWarning,
    StaleWarning,
    StoreError,
    StoreWarning,
)
from autochunk.plan import Plan
from autochunk.resolution import layers, nearest, places, reporting, resolve
from autochunk.resolution.answer import Resolution
from autochunk.resolution.layers import MemoryLayer
from autochunk.resolution.settings import use
from autochunk.store import bundle, files
from autochunk.store.choice import DENSE
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.workload import Workload

DEVICE = make_device()
WORKLOAD = make_workload()
USUAL = Plan("xla", 17.0)  # where nothing is known of a CPU


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the shipped profiles, which differ from checkout to checkout."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(places, "shipped_profiles", lambda: folder)
    return folder


@pytest.fixture
def store(store_path: Path) -> ProfileStore:
    """The user's store, without a file yet."""
    return ProfileStore(store_path)


def ask(
    workload: Workload = WORKLOAD, implementation: str | None = None, **options: Any
) -> Resolution:
    """``resolve`` on the made-up device."""
    return resolve.resolve(workload, implementation, **{"device": DEVICE, **options})


def write(path: Path, *profiles: Profile) -> Path:
    """A bundle file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(bundle.dump(profiles))
    return path


def ship(path: Path, *profiles: Profile) -> None:
    """A shipped bundle, read as by a new process: these do not change while one runs."""
    write(path, *profiles)
    resolve.forget_all()


def limit_of(limit: float | None, workload: Workload = WORKLOAD) -> Profile:
    """A profile that leaves no choice but "xla" at this limit."""
    return make_profile(workload, measurements=one_plan(limit))


# --- Layers ---------------------------------------------------------------------------------------


def test_layers_in_order(
    store: ProfileStore, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``use`` comes first, the default last.

    Between them are AUTOCHUNK_PROFILES from left to right, the user's store, the site's folder and
    the shipped profiles.
    """
    assert ask().match == "default"
    ship(shipped / "a.json", limit_of(5.0))
    assert ask().plan == Plan("xla", 5.0)
    assert ask().layer == f"shipped {shipped}"
    write(places.site_profiles() / "a.json", limit_of(4.0))
    assert ask().plan == Plan("xla", 4.0)
    assert ask().layer == f"site {places.site_profiles()}"
    store.put(limit_of(3.0))
    assert ask().plan == Plan("xla", 3.0)
    assert ask().layer == f"user store {store.path}"
    second = write(tmp_path / "second.json", limit_of(2.0))
    first = write(tmp_path / "first.json", limit_of(1.0))
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(second))
    assert ask().plan == Plan("xla", 2.0)
    assert ask().layer == f"AUTOCHUNK_PROFILES {second}"
    monkeypatch.setenv("AUTOCHUNK_PROFILES", f"{first}{os.pathsep}{second}")
    assert ask().plan == Plan("xla", 1.0)
    with use(max_chunk_size_mb=0.5):
        assert ask().plan == Plan("xla", 0.5)
        assert ask().match == "pinned"
    assert ask().match == "exact"


def test_asked_tells_what_each_layer_had(store: ProfileStore, shipped: Path) -> None:
    """A Resolution tells the layers asked, down to the one that answered, and rejected plans."""
    ship(shipped / "a.json", make_profile())
    store.put(limit_of(3.0, make_workload("t=4,k=8")))
    resolution = ask()
    nothing = "nothing for this workload on this device"
    assert resolution.asked == (
        (f"user store {store.path}", nothing),
        (f"site {places.site_profiles()}", nothing),
        (f"shipped {shipped}", "exact match"),
    )
    asked = (resolution.workload, resolution.device, resolution.source)
    assert asked == (WORKLOAD, DEVICE, WORKLOAD.key)
    others = {str(m.plan) for m in CURVE if m.max_chunk_size_mb != 16.0}
    assert {plan for plan, _ in resolution.rejected} == others
    assert resolution.reason == "fastest"
    assert resolution.profile == make_profile()


def test_exact_in_a_late_layer_before_nearest_in_an_early_one(
    store: ProfileStore, shipped: Path
) -> None:
    """What was measured for this very workload is better than one's own measurement of another."""
    store.put(limit_of(3.0, make_workload("b=2,t=2048,s=1024,h=8,k=64")))
    assert ask().match == "nearest"
    ship(shipped / "a.json", limit_of(4.0))
    assert (ask().match, ask().plan) == ("exact", Plan("xla", 4.0))


def test_folder_of_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's ``*.json`` files are one layer.

    Of two with a workload the last by name answers; other files do not matter.
    """
    folder = tmp_path / "bundles"
    write(folder / "a.json", limit_of(1.0), limit_of(7.0, make_workload("t=9,k=9")))
    write(folder / "b.json", limit_of(2.0))
    (folder / "notes.txt").write_text("no bundle")
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(folder))
    assert ask().plan.max_chunk_size_mb == 2.0
    assert ask(make_workload("t=9,k=9")).plan.max_chunk_size_mb == 7.0


@pytest.mark.parametrize("count", [2, 3])
def test_other_devices_profiles_predict_at_most(
    store: ProfileStore, shipped: Path, count: int
) -> None:
    """They never answer as if they were of this device, and of too few workloads not at all."""
    devices = [make_device(kind="Made/Up2"), make_device(platform="gpu")]
    workloads = [WORKLOAD, *(shape(query_length=1024 + n) for n in range(1, count))]
    profiles = [make_profile(workload, device) for device in devices for workload in workloads]
    store.put_all(profiles)
    ship(shipped / "a.json", *profiles)
    found = ask()
    assert found.match == ("default" if count == 2 else "predicted")
    if found.prediction:
        assert found.prediction.elsewhere == found.prediction.curves == 3
        assert "3 on other devices or by other versions" in found.reason
        assert found.plan.implementation == "xla"


@pytest.mark.parametrize(
    ("memory_gib", "budget", "implementation"),
    [
        (24, None, "dense"),
        (64, None, "dense"),
        (8, None, "xla"),
        (1, None, "xla"),
        (8, 50.0, "xla_rows"),
        (0, None, "dense"),
    ],
)
def test_a_container_s_memory_bounds_what_was_measured_with_more(
    store: ProfileStore, memory_gib: int, budget: float | None, implementation: str
) -> None:
    """It is the same device, on which not every plan fits."""
    measured = (
        make_measurement("dense", None, 1.0, 5000.0),
        make_measurement("xla", 64.0, 1.5, 500.0),
        make_measurement("xla_rows", 4.0, 2.0, 40.0),
    )
    store.put(make_profile(WORKLOAD, make_device(memory_gib=24), measured))
    with use(memory_budget_mb=budget):
        answer = resolve.resolve(WORKLOAD, device=make_device(memory_gib=memory_gib))
    assert (answer.match, answer.plan.implementation) == ("exact", implementation)


def test_where_nothing_measured_fits_the_memory_there_are_slices(store: ProfileStore) -> None:
    """As with a budget that nothing fits."""
    large = (make_measurement("dense", None, 1.0, 5000.0),)
    store.put(make_profile(WORKLOAD, make_device(memory_gib=24), large))
    answer = resolve.resolve(WORKLOAD, device=make_device(memory_gib=8))
    assert answer.plan.implementation == "xla"
    assert "no measured plan fits the memory budget of 4294.97 MB" in answer.reason


@pytest.mark.parametrize(
    ("platform", "precision", "match"),
    [
        ("cpu", "highest", "exact"),
        ("cpu", "tensorfloat32", "exact"),
        ("cpu", "bf16_bf16_f32", "default"),
        ("gpu", "highest", "default"),
    ],
)
def test_what_precision_changes_nothing_needs_no_profile_of_its_own(
    store: ProfileStore, platform: str, precision: str, match: str
) -> None:
    """On CPUs, which multiply in the inputs' precision whatever is asked."""
    device = make_device(platform=platform)
    store.put(make_profile(WORKLOAD, device))
    asked = make_workload(f"b=2,t=1024,s=1024,h=8,k=64,precision={precision}")
    assert resolve.resolve(asked, device=device).match == match


def test_unfinished_profile_answers_and_says_so(store: ProfileStore) -> None:
    """A tuning that was cut short is better than none; the reason says that it was."""
    store.put(make_profile(complete=False))
    assert ask().plan == Plan("xla", 16.0)
    assert ask().reason == "fastest; its tuning was cut short"


def test_profile_without_a_fitting_plan_passes_on(store: ProfileStore, shipped: Path) -> None:
    """Where a layer's profile has no usable plan the next layer is asked; ``asked`` says why."""
    store.put(make_profile(measurements=[make_measurement("xla", 1.0, status="oom")]))
    assert ask().match == "default"
    ship(shipped / "a.json", limit_of(4.0))
    assert ask().plan == Plan("xla", 4.0)
    assert (f"user store {store.path}", "its profile has no plan that fits") in ask().asked


@pytest.mark.parametrize(
    ("implementation", "expected"),
    [
        (None, Plan("xla", 16.0)),
        ("xla_rows", Plan("xla_rows", 4.0)),
        ("dense", Plan("dense", None)),
    ],
)
def test_pinned_implementation(
    store: ProfileStore, implementation: str | None, expected: Plan
) -> None:
    """The best plan of the implementation asked for."""
    store.put(make_profile())
    assert ask(implementation=implementation).plan == expected


@pytest.mark.parametrize("implementation", ["cudnn_v8", "", "auto", 3, ["xla"]])
def test_unknown_implementation(implementation: Any) -> None:
    """An implementation that does not exist is an ArgumentError."""
    with pytest.raises(ArgumentError, match="implementation must be"):
        ask(implementation=implementation)


# --- The default ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("implementation", "expected"),
    [
        (None, USUAL),
        ("xla", USUAL),
        ("xla_rows", Plan("xla_rows", 17.0)),
        ("dense", Plan("dense", None)),
    ],
)
def test_default(implementation: str | None, expected: Plan) -> None:
    """Nothing known: the usual plan, and the reason is the command that would make a profile."""
    resolution = ask(implementation=implementation)
    assert (resolution.match, resolution.layer, resolution.plan) == ("default", "default", expected)
    assert WORKLOAD.tune_command in resolution.reason
    assert (resolution.source, resolution.profile, resolution.stale) == ("", None, ())


@pytest.mark.parametrize(("budget", "expected"), [(10.0, 2.5), (68.0, 17.0), (1e6, 17.0)])
def test_default_within_a_budget(budget: float, expected: float) -> None:
    """Without measurements one slice takes at most a quarter of the budget."""
    with use(memory_budget_mb=budget):
        assert ask().plan == Plan("xla", expected)


def test_resolving_by_itself_is_silent(store: ProfileStore) -> None:
    """Asking does not warn and does not write: only a call that uses the plan does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask()
        resolve.plans(WORKLOAD, None)
    assert not store.path.exists()


# --- The nearest ----------------------------------------------------------------------------------


def shape(**sizes: int) -> Workload:
    """The workload with some sizes changed."""
    fields = {**WORKLOAD.model_dump(), "value_size": 64, **sizes}
    return Workload.make(**fields)


@pytest.mark.parametrize(
    ("sizes", "near"),
    [
        ({"query_length": 4096}, True),
        ({"query_length": 256}, True),
        ({"query_length": 4097}, False),
        ({"query_length": 255}, False),
        ({"key_length": 4096}, True),
        ({"key_length": 4097}, False),
        ({"batch": 8}, True),
        ({"batch": 9}, False),
        ({"num_heads": 32, "num_kv_heads": 32}, True),
        ({"num_heads": 40, "num_kv_heads": 40}, False),
        ({"num_kv_heads": 2}, True),
        ({"num_kv_heads": 1}, False),
        ({"key_size": 256}, True),
        ({"key_size": 257}, False),
        ({"value_size": 16}, True),
        ({"value_size": 15}, False),
        ({"query_length": 4096, "key_length": 4096, "batch": 8}, True),
    ],
)
def test_nearest_is_bounded(store: ProfileStore, sizes: dict[str, int], near: bool) -> None:
    """A tuned workload answers for another if no size is more than four times larger or smaller."""
    tuned = shape(**sizes)
    store.put(limit_of(3.0, tuned))
    resolution = ask()
    assert resolution.match == ("nearest" if near else "default")
    if near:
        assert resolution.source == tuned.key
        assert tuned.shape in resolution.reason
        assert resolution.plan == Plan("xla", 3.0)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("dtype", "bfloat16"),
        ("mode", "training"),
        ("causal", True),
        ("mask", "b1ts"),
        ("bias", "11ts"),
    ],
)
def test_nearest_is_of_the_same_kind(store: ProfileStore, field: str, other: Any) -> None:
    """Only sizes may differ: another dtype, mode or mask is another computation."""
    store.put(limit_of(3.0, shape(**{field: other})))
    assert ask().match == "default"


def test_nearest_of_several(store: ProfileStore) -> None:
    """The one whose sizes differ least, all ratios taken together."""
    store.put(limit_of(1.0, shape(query_length=2048)))
    store.put(limit_of(2.0, shape(query_length=1536)))
    store.put(limit_of(3.0, shape(query_length=1536, key_length=2048)))
    assert ask().plan == Plan("xla", 2.0)


def test_equally_near_ones_are_decided_by_key(tmp_path: Path) -> None:
    """Twice and half as long are as near; the answer does not depend on which was stored first."""
    profiles = [
        limit_of(1.0, shape(query_length=512)),
        limit_of(2.0, shape(query_length=2048)),
        limit_of(3.0, shape(batch=4)),
    ]
    orders = (profiles, profiles[::-1], [profiles[1], profiles[0], profiles[2]])
    answers = set()
    for number, order in enumerate(orders):
        store = ProfileStore(tmp_path / f"{number}.sqlite")
        for profile in order:
            store.put(profile)
        with use(store=store.path):
            answers.add((ask().match, ask().plan, ask().source))
    assert len(answers) == 1
    assert next(iter(answers))[0] == "nearest"


@pytest.mark.parametrize(
    ("implementation", "expected"), [("xla", "xla"), ("xla_rows", "xla_rows"), ("dense", "xla")]
)
def test_never_slice_of_a_smaller_neighbour_becomes_a_limit(
    store: ProfileStore, implementation: str, expected: str
) -> None:
    """Not to slice was measured with the neighbour's logits.

    More than those are not held at once for a larger workload.
    """
    small = shape(query_length=512)
    store.put(make_profile(small, measurements=one_plan(None, implementation)))
    assert ask().plan == Plan(expected, small.logits_bytes / 1e6)


@pytest.mark.parametrize("implementation", ["xla", "xla_rows", "dense"])
def test_never_slice_of_a_larger_neighbour_stays(store: ProfileStore, implementation: str) -> None:
    """In the other direction it is safe."""
    store.put(make_profile(shape(query_length=2048), measurements=one_plan(None, implementation)))
    assert ask().plan == Plan(implementation, None)


def test_a_neighbour_s_limit_carries_over(store: ProfileStore) -> None:
    """A limit holds whatever the size."""
    store.put(limit_of(3.0, shape(query_length=512)))
    assert ask().plan == Plan("xla", 3.0)


def test_a_limit_that_the_neighbour_never_reached(store: ProfileStore) -> None:
    """A limit above all the neighbour's logits is "do not slice" there.

    For a larger workload it must not mean more than was measured.
    """
    small = shape(query_length=512)
    store.put(make_profile(small, measurements=one_plan(1000.0)))
    large = shape(query_length=2048, key_length=2048)
    limit = ask(large).plan.max_chunk_size_mb
    assert limit is not None
    assert limit * 1e6 <= small.logits_bytes


def test_a_neighbour_s_fused_kernel_carries_over(store: ProfileStore) -> None:
    """It holds no logits, so that a larger neighbour is as safe.

    The op looks whether it takes the call.
    """
    store.put(make_profile(shape(query_length=512), measurements=one_plan(None, "cudnn")))
    resolution = ask(shape(query_length=1024))
    assert (resolution.match, resolution.plan) == ("nearest", Plan("cudnn", None))


def test_pinned_implementation_of_the_nearest(store: ProfileStore) -> None:
    """implementation= pins how it is computed, whichever profile answers."""
    store.put(make_profile(shape(query_length=512), measurements=CURVE))
    assert ask(implementation="dense").plan.implementation == "dense"


SIZES = ("batch", "query_length", "key_length", "num_heads", "key_size")
sized = st.fixed_dictionaries(dict.fromkeys(SIZES, st.integers(1, 10_000))).map(
    lambda sizes: Workload.make(**sizes)
)


@given(sized, sized)
def test_distance_is_symmetric(one: Workload, other: Workload) -> None:
    """As near in one direction as in the other, and nothing is nearer than itself."""
    there, back = nearest.distance(one.key, other.key), nearest.distance(other.key, one.key)
    assert (there is None) == (back is None)
    assert there is None or there == pytest.approx(back)
    assert nearest.distance(one.key, one.key) == 0
    assert there is None or (there == 0) == (one == other)


TUNED = [shape(query_length=t, key_length=s) for t in (512, 1024, 2048) for s in (512, 2048)]


@given(st.permutations(TUNED))
def test_nearest_does_not_depend_on_the_order(workloads: Sequence[Workload]) -> None:
    """The same tuned workloads, listed in any order, have the same nearest."""
    layers = [MemoryLayer("", [make_profile(one) for one in many]) for many in (workloads, TUNED)]
    found = [nearest.nearest_workloads(WORKLOAD, [layer], DEVICE) for layer in layers]
    assert [other for _, other in found[0]] == [other for _, other in found[1]]


def test_nearest_is_looked_for_in_all_layers(
    store: ProfileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nearer workload in a later layer before a farther one in an earlier layer."""
    far = write(tmp_path / "far.json", limit_of(1.0, shape(query_length=4096)))
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(far))
    store.put(limit_of(2.0, shape(query_length=1100)))
    assert ask(shape(query_length=1024)).plan == Plan("xla", 2.0)


def test_a_neighbour_that_fits_before_none(store: ProfileStore) -> None:
    """The next nearest answers where no plan of the exact or nearest profile fits the budget."""
    for length, memory in ((1024, 400.0), (1100, 300.0), (1300, 30.0)):
        measurements = [make_measurement("xla", 1.0, 0.5, memory)]
        store.put(make_profile(shape(query_length=length), measurements=measurements))
    with use(memory_budget_mb=100):
        assert ask(shape(query_length=1024)).source == shape(query_length=1300).key


@pytest.mark.parametrize(
    ("length", "near"), [(512, False), (2048, True)], ids=["smaller", "larger"]
)
def test_what_a_smaller_neighbour_took_shows_nothing(
    store: ProfileStore, length: int, near: bool
) -> None:
    """Only its share of a budget counts for a smaller workload's plans: 80 MB each, of 100 MB."""
    measurements = [make_measurement("xla", 1.0, 0.5, 80.0)]
    store.put(make_profile(shape(query_length=length), measurements=measurements))
    with use(memory_budget_mb=100):
        assert ask(shape(query_length=1024)).match == ("nearest" if near else "default")


@pytest.mark.parametrize(
    ("limit", "budget", "expected"),
    [
        (4.0, 5.0, Plan("xla", 1.25)),
        (0.5, 5.0, Plan("xla_rows", 0.5)),
        (None, 5.0, Plan("xla", 1.25)),
    ],
    ids=["smaller slices", "the least", "unsliced"],
)
def test_a_budget_that_no_measured_plan_fits_is_told(
    store: ProfileStore, limit: float | None, budget: float, expected: Plan
) -> None:
    """It is no miss, which tuning would cure: the warning says what the least takes.

    The smaller slices run, those or a quarter of the budget.
    """
    rows, dense = (
        make_measurement("xla_rows", limit, 1.0, 40.0),
        make_measurement("dense", None, 0.5, 400.0),
    )
    store.put(make_profile(WORKLOAD, detect(), [rows, dense]))
    with use(memory_budget_mb=budget):
        plans = resolve.plans(WORKLOAD, None)
    said = r"the memory budget of 5 MB; the one that takes least, xla_rows, .*, takes 40 MB"
    with pytest.warns(BudgetWarning, match=said):
        plans.used("forward")
    assert plans.forward == expected
    assert store.missed(detect()) == []


def test_a_warning_points_at_the_users_line() -> None:
    """Not into this package or a framework: of many attention calls it is the one to look at."""
    with pytest.warns(MissWarning) as caught:
        resolve.plans(WORKLOAD, None).used("forward")
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]


def test_a_changed_store_does_not_fetch_urls_again(
    store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that have not changed stay as they were read.

    A URL that failed is not asked again at once.
    """
    fetched: list[str] = []

    def fetch(place: str, *_: Any) -> bytes:
        fetched.append(place)
        if place.startswith("http://down"):
            raise BundleError("down")
        return bundle.dump([make_profile()]).encode()

    monkeypatch.setattr(files, "fetch", fetch)
    monkeypatch.setenv("AUTOCHUNK_PROFILES", "http://down/b.json:http://up:80/a.json")
    with pytest.warns(StoreWarning):
        answer = ask()
    assert answer.layer == "AUTOCHUNK_PROFILES http://up:80/a.json"
    for length in (3, 4, 5):
        store.put(limit_of(2.0, shape(query_length=length)))
        assert ask().match == "exact"
        ask(shape(query_length=10 * length))
    assert sorted(fetched) == ["http://down/b.json", "http://up:80/a.json"]


# --- Reports --------------------------------------------------------------------------------------


def test_miss_warns_once_and_names_the_command(store: ProfileStore) -> None:
    """A miss that came to run is recorded and warns once, with the exact command that cures it."""
    with pytest.warns(MissWarning) as caught:
        resolve.plans(WORKLOAD, None).used("forward")
    assert len(caught) == 1
    text = str(caught[0].message)
    assert WORKLOAD.key in text
    command = "autochunk tune --shape b=2,t=1024,s=1024,h=8,k=64 --dtype float32 --mode forward"
    assert command in text
    assert text.endswith(WORKLOAD.tune_command)
    assert str(USUAL) in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve.plans(WORKLOAD, None).used("forward")
    assert store.missed(detect()) == [WORKLOAD]


@pytest.mark.parametrize(("wanted", "is_missed"), [("dense", False), ("xla", True), (None, True)])
def test_what_has_one_plan_is_not_missed(
    wanted: str | None, is_missed: bool, store: ProfileStore
) -> None:
    """No tuning could tell of another: ``implementation="dense"`` is all that there is of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resolve.plans(WORKLOAD, wanted).used("forward")
    assert bool(caught) is is_missed
    assert bool(store.missed(detect())) is is_missed


def test_a_miss_is_counted_once_by_a_process(store: ProfileStore) -> None:
    """Every trace of a model may come by again: the file is not written for it."""
    for _ in range(2):  # as two processes
        used("t=100,k=32")
        version = store.version()
        used("t=100,k=32")
        assert store.version() == version
        resolve.forget_all()
    assert list(store.misses(detect()).values()) == [2]


def test_only_the_mode_that_ran_is_reported(store: ProfileStore) -> None:
    """Both modes are resolved.

    A call that was differentiated misses the training profile and not the other.
    """
    with pytest.warns(MissWarning, match="--mode training"):
        resolve.plans(WORKLOAD, None).used("training")
    assert store.missed(detect()) == [WORKLOAD.with_mode("training")]


def used(*shapes: str, **defaults: Any) -> list[str]:
    """What is said when these workloads come to run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for shape in shapes:
            resolve.plans(make_workload(shape, **defaults), None).used("forward")
    return [str(one.message) for one in caught if one.category is MissWarning]


def test_a_family_of_missed_workloads_warns_once(store: ProfileStore) -> None:
    """A model of sixty lengths is told of one, and how to tune for all; all are remembered."""
    lengths = [f"t={length},h=4,k=32,bias=1hts" for length in range(100, 400, 5)]
    (said,) = used(*lengths)
    assert ",t=100," in said
    assert "Others that differ only in sizes are counted" in said
    assert "autochunk tune --missed" in said
    assert len(store.missed(detect())) == 60


def test_a_family_that_was_missed_before_is_counted(store: ProfileStore) -> None:
    """By other processes, whose misses the store has; the one command cures all of them."""
    used("t=100,k=32", "t=200,k=32", "t=300,k=32,causal=yes")
    resolve.forget_all()
    (said,) = used("t=150,h=2,k=64")
    assert "It is one of 3 workloads missed here that differ only in sizes" in said
    assert said.endswith("autochunk tune --missed")
    assert len(store.missed(detect())) == 4


@pytest.mark.parametrize(
    ("other", "defaults"),
    [
        ("t=100,k=32,causal=yes", {}),
        ("t=100,k=32,bias=11ts", {}),
        ("t=100,k=32", {"dtype": "bfloat16"}),
    ],
)
def test_another_family_warns_too(other: str, defaults: dict[str, Any]) -> None:
    """What differs in more than sizes is not cured by the same measurements."""
    assert len(used("t=100,k=32")) == 1
    assert len(used(other, **defaults)) == 1
    assert not used("t=200,k=32")


def test_what_is_forgotten_is_told_again() -> None:
    """Tests, and long-lived sessions, may ask for the warnings again."""
    for _ in range(2):
        with pytest.warns(MissWarning):
            resolve.plans(WORKLOAD, None).used("forward")
        resolve.forget_all()


def test_nearest_is_recorded_and_does_not_warn(store: ProfileStore) -> None:
    """An answer from a neighbour is good enough not to warn, and still worth tuning."""
    store.put(make_profile(shape(query_length=2048), detect(), one_plan(3.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans = resolve.plans(WORKLOAD, None)
        plans.used("forward")
    assert plans.forward == Plan("xla", 3.0)
    assert store.missed(detect()) == [WORKLOAD]


def test_exact_and_pinned_answers_are_no_misses(store: ProfileStore) -> None:
    """Neither a warning nor a record."""
    store.put(make_profile(device=detect()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve.plans(WORKLOAD, None).used("forward")
        with use(max_chunk_size_mb=3):
            resolve.plans(make_workload("t=4,k=8"), None).used("training")
    assert store.missed(detect()) == []


def test_miss_where_nothing_can_be_written(tmp_path: Path) -> None:
    """A store that cannot be written does not stop the model: the warning stands."""
    (tmp_path / "file").touch()
    with use(store=tmp_path / "file" / "profiles.sqlite"), pytest.warns(MissWarning) as caught:
        resolve.plans(WORKLOAD, None).used("forward")
    # `tune --missed` would find nothing
    assert "--missed" not in str(caught[0].message)


def test_miss_is_recorded_in_the_store_in_use(tmp_path: Path, store: ProfileStore) -> None:
    """``use(store=...)`` stands for the user's store in this, too."""
    other = ProfileStore(tmp_path / "other.sqlite")
    with use(store=other.path), pytest.warns(MissWarning):
        resolve.plans(WORKLOAD, None).used("forward")
    assert other.missed(detect()) == [WORKLOAD]
    assert not store.path.exists()


def test_stale_profile_answers_and_warns(store: ProfileStore) -> None:
    """A profile measured with another jaxlib is used.

    The warning says what changed and how to measure again, once for all of which it is true.
    """
    here = detect()
    another = make_workload("t=64,k=8")
    store.put(make_profile(device=here.model_copy(update={"jaxlib": "0.1.2"})))
    store.put(make_profile(another, device=here.model_copy(update={"jaxlib": "0.1.2"})))
    plans = resolve.plans(WORKLOAD, None)
    with pytest.warns(StaleWarning) as caught:
        plans.used("forward")
    plans.used("forward")  # warnings are errors here: these are silent
    resolve.plans(another, None).used("forward")
    assert plans.forward == Plan("xla", 16.0)
    assert len(caught) == 1
    assert "tune --stale" in str(caught[0].message)
    assert "jaxlib 0.1.2" in str(caught[0].message)
    assert here.jaxlib in str(caught[0].message)
    assert WORKLOAD.tune_command in str(caught[0].message)


def test_stale_is_said_in_the_resolution(store: ProfileStore) -> None:
    """``resolve`` tells it without a warning."""
    store.put(make_profile(device=make_device(jaxlib="0.11.0")))
    assert ask().match == "exact"
    assert ask().stale == ("measured with jaxlib 0.11.0, this is 0.12.0",)
    assert ask(device=make_device(jaxlib="0.11.5")).stale == ()


# --- Layers that cannot be read -------------------------------------------------------------------


def test_unreadable_store_is_left_out(store: ProfileStore, shipped: Path) -> None:
    """A damaged store costs one StoreWarning; the other layers still answer, for every workload."""
    store.path.parent.mkdir()
    store.path.write_text("no database at all")
    ship(shipped / "a.json", limit_of(4.0))
    with pytest.warns(StoreWarning) as caught:
        assert ask().plan == Plan("xla", 4.0)
    ask(make_workload("t=4,k=8"))  # warnings are errors here: these are silent
    ask(implementation="xla_rows")
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith(f'"auto" goes on without user store {store.path}: ')
    assert "AUTOCHUNK_STORE" in text
    assert ask().asked[0][1].startswith("left out: ")
    assert store.path.read_text() == "no database at all"


@pytest.mark.parametrize(
    "content", ["no bundle", "", '{"profiles": [], "schema_version": 99}', None]
)
def test_unreadable_bundle_is_left_out(
    store: ProfileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """So does a file named by AUTOCHUNK_PROFILES that is no bundle, too new, or not there."""
    path = tmp_path / "named.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(path))
    store.put(limit_of(4.0))
    with pytest.warns(StoreWarning, match="goes on without AUTOCHUNK_PROFILES") as caught:
        assert ask().plan == Plan("xla", 4.0)
    ask(make_workload("t=4,k=8"))  # warnings are errors here: this one is silent
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


def test_garbage_row_is_left_out(store: ProfileStore) -> None:
    """A row that is no profile costs a warning, not the model; other workloads are answered."""
    other = make_workload("t=4,k=8")
    store.put(limit_of(3.0))
    store.put(limit_of(5.0, other))
    with closing(sqlite3.connect(store.path)) as file, file:
        file.execute("UPDATE profiles SET value = '{}' WHERE key LIKE '%t=1024,%'")
    with pytest.warns(StoreWarning, match="cannot be read"):
        assert ask().match == "default"
    assert ask(other).plan == Plan("xla", 5.0)


def test_garbage_key_is_left_out(store: ProfileStore) -> None:
    """Nor does a row under a key that is none."""
    store.put(limit_of(3.0, make_workload("t=4,k=8")))
    with closing(sqlite3.connect(store.path)) as file, file:
        key = f"{DEVICE.key} | attention:new=grammar"
        file.execute("INSERT INTO profiles VALUES (?, '{}')", (key,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        assert ask().match == "default"


def test_folder_with_one_unreadable_bundle_answers_the_same_each_time(
    store: ProfileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files give the same answer, whatever was asked before."""
    store.put_all([limit_of(8.0), limit_of(9.0, make_workload("t=4,k=8"))])
    folder = tmp_path / "bundles"
    other = make_workload("t=4,k=8")
    write(folder / "a.json", limit_of(1.0), limit_of(2.0, other))
    (folder / "b.json").write_text("no bundle")
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(folder))
    answers = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        for order in ((WORKLOAD, other), (other, WORKLOAD)):
            resolve.forget_all()
            answers.append({one.key: (ask(one).plan, ask(one).match) for one in order})
    assert answers[0] == answers[1]


# --- Sameness and change --------------------------------------------------------------------------

DESCRIBE = """
import json, sys, warnings
from factories import make_device, make_workload
from autochunk.resolution.resolve import resolve
for shape in json.loads(sys.argv[1]):
    r = resolve(make_workload(shape), device=make_device())
    print(str(r.plan), r.match, r.layer, r.reason, r.source, r.asked, r.rejected)
"""


def test_same_answer_in_every_process(
    store: ProfileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same profiles give the same plan, for the same reason, in every process and order."""
    named = write(tmp_path / "named.json", limit_of(2.0, shape(batch=3)))
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(named))
    for t, k in ((512, 1), (700, 2), (1024, 4), (2048, 3)):
        store.put(make_profile(shape(query_length=t), measurements=CURVE[:k]))
    shapes = [shape(query_length=t).shape for t in (1024, 1000, 300, 9000, 1434)]
    outputs = [
        run_python(DESCRIBE, json.dumps(order), PYTHONHASHSEED=seed)
        for seed, order in (("0", shapes), ("1", shapes), ("2", shapes[::-1]))
    ]
    assert len(outputs[0].splitlines()) == len(shapes)
    assert outputs[0] == outputs[1]
    assert sorted(outputs[0].splitlines()) == sorted(outputs[2].splitlines())


def test_changed_store_is_seen(store: ProfileStore) -> None:
    """What another process stores, replaces or deletes counts from the next question on."""
    assert ask().match == "default"
    code = """
import autochunk
from factories import make_profile, one_plan
autochunk.ProfileStore().put(make_profile(measurements=one_plan(3.0)))
"""
    run_python(code)
    assert ask().plan == Plan("xla", 3.0)
    store.put(limit_of(5.0))
    assert ask().plan == Plan("xla", 5.0)
    store.path.unlink()
    assert ask().match == "default"


def test_changed_bundles_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does a bundle that is added to a folder or taken away, at once.

    One that is written over counts when its files are next looked at.
    """
    monkeypatch.setattr(layers, "_LOOK_SECONDS", 0.0)
    folder = tmp_path / "bundles"
    folder.mkdir()
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(folder))
    assert ask().match == "default"
    file = write(folder / "a.json", limit_of(3.0))
    assert ask().plan == Plan("xla", 3.0)
    write(file, limit_of(5.25))
    assert ask().plan == Plan("xla", 5.25)
    file.unlink()
    assert ask().match == "default"


def test_answer_is_kept_while_nothing_changes(store: ProfileStore) -> None:
    """Asking again costs no reading: it is the same object."""
    store.put(make_profile())
    assert ask() is ask()


def test_resolving_from_many_threads(store: ProfileStore) -> None:
    """Threads that trace at the same time get the same answer."""
    store.put(make_profile())
    answers: list[Plan] = []
    threads = [threading.Thread(target=lambda: answers.append(ask().plan)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [Plan("xla", 16.0)] * 8


# --- use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "implementation"), [(3, "xla"), (0.5, "xla_rows"), (None, "xla"), (None, "dense")]
)
def test_use_answers_every_auto(
    store: ProfileStore, limit: float | None, implementation: str
) -> None:
    """Inside, "auto" is this limit, whatever the profiles say; None never slices."""
    store.put(make_profile())
    with use(max_chunk_size_mb=limit, implementation=implementation):
        assert ask().plan == Plan(implementation, limit)
        assert ask().layer == "autochunk.use"
    assert ask().match == "exact"


def test_a_limit_set_by_use_holds_for_whichever_slices(store: ProfileStore) -> None:
    """Slices of another implementation, asked for by the call or by ``use``, have the limit.

    Dense attention has no slices to limit.
    """
    store.put(make_profile())
    with use(max_chunk_size_mb=3):
        assert ask(implementation="xla").plan == Plan("xla", 3)
        assert ask(implementation="xla_rows").plan == Plan("xla_rows", 3)
        assert ask(implementation="dense").plan == DENSE
    with use(implementation="xla_rows"), use(max_chunk_size_mb=3):
        assert ask().plan == Plan("xla_rows", 3)


def test_use_nests(store: ProfileStore, tmp_path: Path) -> None:
    """The inner one wins for what it sets and keeps the rest; leaving restores."""
    store.put(make_profile())
    with use(memory_budget_mb=20):
        assert ask().plan == Plan("xla_rows", 4.0)
        with use(max_chunk_size_mb=7):
            assert ask().plan == Plan("xla", 7)
            with use(max_chunk_size_mb=8, memory_budget_mb=1):
                assert ask().plan == Plan("xla", 8)
            assert ask().plan == Plan("xla", 7)
            with use(store=tmp_path / "other.sqlite"):
                assert ask().plan == Plan("xla", 7)
        with use(store=tmp_path / "other.sqlite"):
            assert ask().plan == Plan("xla", 5.0)  # a quarter of the budget
        with use():
            assert ask().plan == Plan("xla_rows", 4.0)
    assert ask().plan == Plan("xla", 16.0)


def test_use_restores_after_an_error(store: ProfileStore) -> None:
    """Leaving by an exception restores, too."""
    store.put(make_profile())
    with pytest.raises(KeyError), use(max_chunk_size_mb=7):
        raise KeyError
    assert ask().match == "exact"


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1000, Plan("xla", 16.0)), (39, Plan("xla_rows", 4.0)), (5, Plan("xla", 1.25))],
)
def test_memory_budget(store: ProfileStore, budget: float, expected: Plan) -> None:
    """Of the measured plans the fastest that fits; where none fits, a small default."""
    store.put(make_profile())
    with use(memory_budget_mb=budget):
        assert ask().plan == expected


@pytest.mark.parametrize("as_text", [True, False])
def test_use_store(store: ProfileStore, tmp_path: Path, as_text: bool) -> None:
    """Another store's file in place of the user's own, as text or path."""
    other = ProfileStore(tmp_path / "other.sqlite")
    other.put(limit_of(9.0))
    store.put(make_profile())
    with use(store=str(other.path) if as_text else other.path):
        assert ask().plan == Plan("xla", 9.0)
        assert ask().layer == f"user store {other.path}"
    assert ask().plan == Plan("xla", 16.0)


@pytest.mark.parametrize("limit", ["auto", "1", 0, -1, float("nan"), float("inf"), True, [1]])
def test_use_with_a_wrong_limit(limit: Any) -> None:
    """A limit that is none is an ArgumentError at once, and nothing is set.

    "auto" cannot answer "auto".
    """
    with pytest.raises(ArgumentError, match="max_chunk_size_mb"), use(max_chunk_size_mb=limit):
        raise AssertionError("not reached")
    assert ask().match == "default"


def test_use_with_a_wrong_implementation() -> None:
    """So is an implementation that does not exist."""
    with (
        pytest.raises(ArgumentError, match="implementation must be"),
        use(max_chunk_size_mb=1, implementation="cudnn_v8"),
    ):
        raise AssertionError("not reached")


@pytest.mark.parametrize("budget", ["auto", "1", 0, -1, float("nan"), float("inf"), True, [1]])
def test_use_with_a_wrong_budget(budget: Any) -> None:
    """And a budget that is no positive number of MB."""
    with pytest.raises(ArgumentError), use(memory_budget_mb=budget):
        raise AssertionError("not reached")


@pytest.mark.parametrize("budget", [0, -1, "1"])
def test_wrong_budget_is_named(budget: Any) -> None:
    """The error names the argument that is wrong."""
    with (
        pytest.raises(ArgumentError, match="memory_budget_mb must be"),
        use(memory_budget_mb=budget),
    ):
        raise AssertionError("not reached")


def test_implementation_without_a_limit_is_not_dropped() -> None:
    """An implementation that does not exist is an error, also alone."""
    with pytest.raises(ArgumentError), use(implementation="cudnn_v8"):
        pass


def test_use_does_not_reach_other_threads(store: ProfileStore) -> None:
    """Settings belong to the thread that set them; a context copied inside carries them along."""
    store.put(make_profile())
    answers: dict[str, Plan] = {}
    with use(max_chunk_size_mb=7):
        inside = contextvars.copy_context()
        thread = threading.Thread(target=lambda: answers.update(thread=ask().plan))
        thread.start()
        thread.join(30)
    answers["copied"] = inside.run(lambda: ask().plan)
    outside = ask().plan
    assert answers == {"thread": Plan("xla", 16.0), "copied": Plan("xla", 7)}
    assert outside == Plan("xla", 16.0)


def test_use_as_a_decorator(store: ProfileStore) -> None:
    """``use`` may stand over a function."""
    store.put(make_profile())

    @use(max_chunk_size_mb=7)
    def inside() -> Plan:
        return ask().plan

    assert inside() == inside() == Plan("xla", 7)


# --- What ships with autochunk --------------------------------------------------------------------


def test_layers_raise_their_own_errors_only(tmp_path: Path) -> None:
    """The store's errors are StoreError, which resolving catches."""
    with pytest.raises(StoreError):
        ProfileStore(tmp_path).get(DEVICE, WORKLOAD)


def test_measurements_of_the_future_do_not_answer(store: ProfileStore) -> None:
    """A profile whose only plan this version cannot run counts as no profile."""
    future: tuple[Measurement, ...] = (make_measurement("splash_v9", None, 0.1, 1),)
    store.put(make_profile(measurements=future))
    assert ask().match == "default"


_HOLD = """
import sqlite3, sys
file = sqlite3.connect(sys.argv[1], isolation_level=None)
file.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_store_that_stays_locked_holds_no_program_up(
    store_path: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a machine that is gone: one wait, one warning, and the other layers answer.

    Were it waited for as by a command, or more than once, this would take hours.
    """
    monkeypatch.setattr("autochunk.store.database._BUSY_MILLISECONDS", 3_600_000)
    monkeypatch.setattr("autochunk.store.database._BRIEF_MILLISECONDS", 100)
    here = detect()
    ProfileStore().put(make_profile(WORKLOAD, here, one_plan(4.0)))
    known = make_profile(WORKLOAD, here, one_plan(8.0))
    (shipped / "known.json").write_text(bundle.dump([known]))
    with start_python(_HOLD, store_path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.warns(StoreWarning, match="goes on without user store"):
            assert resolve.resolve(WORKLOAD).plan == Plan("xla", 8.0)
        monkeypatch.setattr("autochunk.store.database._BRIEF_MILLISECONDS", 3_600_000)
        for length in (3, 5):  # other warnings are errors here: of the store there is none more
            missed = make_workload(f"t={length},k=1024", dtype="float64")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MissWarning)
                reporting.report(resolve.resolve(missed))
        holder.communicate()
    assert ProfileStore().missed(here) == []
