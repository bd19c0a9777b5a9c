"""What travels and what becomes of it where it arrives: filters, and import into a store."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import (
    make_call,
    make_chunks,
    make_device,
    make_function_profile,
    make_measurement,
    make_profile,
    make_workload,
    start_python,
)
from hypothesis import given
from hypothesis import strategies as st

from autochunk.errors import ArgumentError, BundleError, StoreError, StoreWarning, WorkloadError
from autochunk.store import bundle, merge
from autochunk.store.bundle import Bundle
from autochunk.store.merge import PREFERENCES, ImportPlan
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore

OLD, MIDDLE, NEW = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z"
PROFILES = [
    make_profile(make_workload(f"t={t},k=8"), make_device(kind=kind))
    for kind in ("A", "B")
    for t in (1, 2, 3)
]
TEXT = bundle.dump(PROFILES, "made up")


def rewritten(change: Callable[[dict[str, Any]], object]) -> str:
    """``TEXT``, its content changed, and nothing else done about it."""
    content = json.loads(TEXT)
    change(content)
    return json.dumps(content)


# --- Choosing what travels ------------------------------------------------------------------------

CPU, GPU = make_device(kind="A"), make_device(platform="gpu", kind="Made Up 80GB", cores=0)
MIXED = [
    make_profile(make_workload("t=4096,h=8,k=64"), CPU),
    make_profile(make_workload("t=4096,h=8,k=64", dtype="bfloat16"), CPU),
    make_profile(make_workload("b=2,t=4096,h=4,k=64", mode="training"), GPU),
    make_profile(make_workload("t=40960,h=8,k=64"), GPU),
]


@pytest.mark.parametrize(
    ("filters", "chosen"),
    [
        ({}, [0, 1, 2, 3]),
        ({"device": "80gb"}, [2, 3]),
        ({"device": "GPU"}, [2, 3]),
        ({"device": "no such"}, []),
        ({"dtype": "bfloat16"}, [1]),
        ({"mode": "training"}, [2]),
        ({"mode": "forward", "dtype": "float32"}, [0, 3]),
        ({"shapes": ["t=4096"]}, [0, 1, 2]),
        ({"shapes": ["t=4096,h=8"]}, [0, 1]),
        ({"shapes": [" t = 4096 , h=4"]}, [2]),
        ({"shapes": ["h=4", "t=40960"]}, [2, 3]),
        ({"shapes": ["h=8"], "device": "kind of"}, []),
        ({"shapes": ["h=8"], "device": "cpu", "dtype": "float32"}, [0]),
        ({"shapes": [MIXED[1].workload]}, [1]),
        ({"shapes": ["causal=FALSE"]}, [0, 1, 2, 3]),
        ({"shapes": ["causal=true"]}, []),
    ],
)
def test_select(filters: dict[str, Any], chosen: list[int]) -> None:
    """Every filter must let a profile through; of shapes one, with all the items that it names."""
    assert merge.select(MIXED, **filters) == [MIXED[index] for index in chosen]


@pytest.mark.parametrize(
    ("filters", "chosen"),
    [
        ({"dtype": "float32"}, [0, 1, 2]),
        ({"dtype": "bfloat16"}, []),
        ({"mode": "training"}, [2]),
        ({"shapes": ["name=model.transition"]}, [1]),
        ({"shapes": ["lengths=8x8,mode=training"]}, [2]),
        ({"shapes": ["name=f", "t=1024"], "mode": "forward"}, [0]),
        ({"shapes": ["dropout=none"]}, [0]),
    ],
)
def test_select_of_functions(filters: dict[str, Any], chosen: list[int]) -> None:
    """By their own items, and by what both kinds have; never by those of attention alone."""
    profiles = [
        make_profile(),
        make_function_profile(),
        make_function_profile(
            make_call(name="f", lengths="8x8", mode="training"), [make_chunks(8, 4)]
        ),
    ]
    assert merge.select(profiles, **filters) == [profiles[index] for index in chosen]


@pytest.mark.parametrize("shape", ["", "t", "t=", "q=3", "t=4096;h=8,", "=4"])
def test_select_of_what_is_no_shape(shape: str) -> None:
    """A filter that could let nothing through is a mistake, and told."""
    with pytest.raises(WorkloadError, match="a filter of shapes is NAME=VALUE items"):
        merge.select(MIXED, shapes=[shape])


# --- Merging --------------------------------------------------------------------------------------


def at(created: str, t: int = 1, limit: float = 1.0, **fields: Any) -> Profile:
    measurements = [make_measurement("xla", limit)]
    workload = make_workload(f"t={t},k=8")
    return make_profile(workload, measurements=measurements, created=created, **fields)


def of(*profiles: Profile) -> Bundle:
    return Bundle(schema_version=2, profiles=profiles)


def counts(plan: ImportPlan) -> tuple[int, int, int]:
    """(new, replaced, left out)"""
    new = plan.count("new")
    return new, len(plan.taken) - new, len(plan.entries) - len(plan.taken)


QUICK: dict[str, Any] = {"effort": "quick"}
THOROUGH: dict[str, Any] = {"effort": "thorough"}
PARTIAL: dict[str, Any] = {"complete": False}
BEST = ("best-effort", "theirs")


@pytest.mark.parametrize(
    ("mine", "theirs", "relation", "taken_by"),
    [
        (None, at(OLD), "new", PREFERENCES),
        (at(OLD), at(OLD), "same", ()),
        (at(OLD), at(NEW, limit=9), "newer", ("newest", "best-effort", "theirs")),
        (at(NEW), at(OLD, limit=9), "older", ("theirs",)),
        (at(OLD), at(OLD, limit=9), "conflicting", ("theirs",)),
        (at(OLD, **PARTIAL), at(OLD), "conflicting", BEST),
        (at(OLD), at(NEW, **PARTIAL), "newer", ("newest", "theirs")),
        (at(NEW, **PARTIAL), at(OLD), "older", BEST),
        (at(NEW), at(OLD, **THOROUGH), "older", BEST),
        (at(OLD), at(NEW, **QUICK), "newer", ("newest", "theirs")),
        (at(OLD, **THOROUGH, **PARTIAL), at(OLD, **QUICK), "conflicting", BEST),
        (at(OLD), at(OLD, autochunk="0.2.0"), "conflicting", ("theirs",)),
    ],
)
@pytest.mark.parametrize("prefer", PREFERENCES)
def test_which_of_two_stays(
    store_path: Path,
    mine: Profile | None,
    theirs: Profile,
    relation: str,
    taken_by: tuple[str, ...],
    prefer: Any,
) -> None:
    """The preferred one stays; where that does not tell them apart the store's does.

    The plan says so.
    """
    store = ProfileStore(store_path)
    store.put_all([] if mine is None else [mine])
    plan = merge.merge(store, of(theirs), prefer)
    assert plan == merge.plan_import([mine] if mine else [], of(theirs), prefer)
    (entry,) = plan.entries
    assert (entry.profile, entry.stored, entry.relation) == (theirs, mine, relation)
    assert entry.taken == (prefer in taken_by)
    assert entry.reason
    assert store.profiles() == [theirs if entry.taken or mine is None else mine]


def test_reasons_say_what_decided() -> None:
    """In the words of the fields, so that a user can check."""
    mine = [at(NEW, 1, **PARTIAL), at(OLD, 2), at(OLD, 3)]
    plan = merge.plan_import(mine, of(at(OLD, 1), at(OLD, 2, **QUICK), at(OLD, 3, 9)))
    assert [entry.reason for entry in plan.entries] == [
        "complete is True in the bundle and False in the store",
        "effort is quick in the bundle and standard in the store",
        "different, but equal in complete, effort, created; choose with prefer='theirs' or 'ours'",
    ]


def test_preference_must_be_known() -> None:
    """A misspelt one changes nothing."""
    said = "prefer must be one of newest, best-effort, theirs, ours; got 'latest'"
    with pytest.raises(ArgumentError, match=said):
        merge.plan_import([], of(), "latest")  # type: ignore[arg-type]


def test_merge_counts_new_updated_and_kept(store_path: Path) -> None:
    """What the store lacks is new, what is later than the store's replaces it.

    What is as old or older is left out.
    """
    store = ProfileStore(store_path)
    store.put_all([at(MIDDLE, t) for t in (1, 2, 3)])
    incoming = of(at(OLD, 1, 9.0), at(MIDDLE, 2, 9.0), at(NEW, 3, 9.0), at(OLD, 4, 9.0))
    plan = merge.merge(store, incoming)
    assert counts(plan) == (1, 1, 2)
    relations = Counter(entry.relation for entry in plan.entries)
    assert relations == {"new": 1, "newer": 1, "older": 1, "conflicting": 1}
    assert [plan.count("new"), plan.count("same")] == [1, 0]
    expected = [at(MIDDLE, 1), at(MIDDLE, 2), at(NEW, 3, 9.0), at(OLD, 4, 9.0)]
    assert sorted(store.profiles(), key=lambda profile: profile.workload) == expected


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_dry_run_changes_nothing(store_path: Path, prefer: Any) -> None:
    """It says what would be done, and is the same plan."""
    store = ProfileStore(store_path)
    assert counts(merge.merge(store, of(*PROFILES), prefer, dry_run=True)) == (len(PROFILES), 0, 0)
    assert not store_path.exists()
    store.put_all([at(MIDDLE, t) for t in (1, 2)])
    before = store_path.read_bytes()
    incoming = of(at(NEW, 1, 9.0), at(OLD, 3))
    plan = merge.merge(store, incoming, prefer, dry_run=True)
    assert store_path.read_bytes() == before
    assert merge.merge(store, incoming, prefer) == plan


def test_merge_twice_changes_nothing(store_path: Path) -> None:
    """Importing the same bundle again leaves the store as it is, to the byte."""
    store = ProfileStore(store_path)
    assert counts(merge.merge(store, of(*PROFILES))) == (len(PROFILES), 0, 0)
    before = store_path.read_bytes()
    again = merge.merge(store, of(*PROFILES), "theirs")
    assert (counts(again), again.count("same")) == ((0, 0, len(PROFILES)), len(PROFILES))
    assert store_path.read_bytes() == before


def test_merge_of_export_and_import(store_path: Path, tmp_path: Path) -> None:
    """A store's bundle, merged into an empty store, is the same store."""
    one, other = ProfileStore(store_path), ProfileStore(tmp_path / "other.sqlite")
    one.put_all(PROFILES)
    merge.merge(other, bundle.load(bundle.dump(one.profiles())))
    assert other.profiles() == one.profiles()


@pytest.mark.parametrize("prefer", ["newest", "best-effort"])
@given(data=st.data())
def test_merge_in_either_order(prefer: Any, data: st.DataObject) -> None:
    """Two machines' bundles end in the same profiles in either order, but for told conflicts."""

    def profile(t: int, limit: float) -> Profile:
        created = data.draw(st.sampled_from([OLD, MIDDLE, NEW]))
        effort = data.draw(st.sampled_from(["quick", "standard", "thorough"]))
        return at(created, t, limit, effort=effort, complete=data.draw(st.booleans()))

    one, other = (of(*(profile(t, limit) for t in (1, 2, 3))) for limit in (2.0, 3.0))
    plan = merge.plan_import(one.profiles, other, prefer)
    back = merge.plan_import(other.profiles, one, prefer)
    for entry, reverse in zip(plan.entries, back.entries, strict=True):
        if entry.taken == reverse.taken:
            assert entry.relation == reverse.relation == "conflicting"
            assert "different, but equal" in entry.reason


def test_a_bundle_with_two_of_one_workload_is_refused(store_path: Path) -> None:
    """Which of them is meant cannot be told; it names them, and nothing changes."""
    said = r"there are two of cpu Made/Up cores=4 \| attention:b=1,t=1,"
    with pytest.raises(BundleError, match=said):
        merge.merge(ProfileStore(store_path), of(at(NEW, 2), at(NEW, 1, 9.0), at(OLD, 1, 1.0)))
    assert not store_path.exists()


IMPORT = """
import sys
from autochunk.store import bundle, merge
from autochunk.store.profiles import ProfileStore
found, store = bundle.read(sys.argv[1]), ProfileStore(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(len(merge.merge(store, found).entries))
"""


def test_eight_import_one_bundle_at_once(store_path: Path, tmp_path: Path) -> None:
    """Each of them succeeds: who finds that another was there first plans anew."""
    profiles = [at("2026-01-01T00:00:00Z", t) for t in range(1, 41)]
    file = tmp_path / "bundle.json"
    file.write_text(bundle.dump(profiles))
    processes = [start_python(IMPORT, file, store_path) for _ in range(8)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err, out) == (0, "", "40\n")
    assert sorted(ProfileStore(store_path).profiles(), key=lambda one: one.key) == sorted(
        profiles, key=lambda one: one.key
    )


def test_what_others_store_meanwhile_is_planned_with(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A better one that comes between the plan and its being carried out stays."""
    store, put_all = ProfileStore(store_path), ProfileStore.put_all
    better = at("2026-03-01T00:00:00Z", limit=3.0)

    def interfere(self: ProfileStore, profiles: Any, **options: Any) -> None:
        monkeypatch.setattr(ProfileStore, "put_all", put_all)
        store.put(better)
        put_all(self, profiles, **options)

    monkeypatch.setattr(ProfileStore, "put_all", interfere)
    plan = merge.merge(store, of(at("2026-02-01T00:00:00Z", limit=2.0)))
    assert [entry.relation for entry in plan.entries] == ["older"]
    assert store.profiles() == [better]


def test_merge_of_nothing_does_not_create_a_store(store_path: Path) -> None:
    """An empty bundle writes nothing."""
    assert counts(merge.merge(ProfileStore(store_path), of())) == (0, 0, 0)
    assert not store_path.exists()


def test_failed_merge_changes_nothing(store_path: Path) -> None:
    """All profiles of a bundle are stored or, where one cannot be, none."""
    store = ProfileStore(store_path)
    store.put_all(PROFILES[:2])
    with contextlib.closing(sqlite3.connect(store_path)) as file, file:
        action = "WHEN NEW.key LIKE '%t=3,%' BEGIN SELECT RAISE(ABORT, 'disk on fire'); END"
        file.execute(f"CREATE TRIGGER no BEFORE INSERT ON profiles {action}")
    before = store_path.read_bytes()
    rng = random.Random(1)
    with pytest.raises(StoreError, match="disk on fire"):
        merge.merge(store, of(*rng.sample(PROFILES, len(PROFILES))))
    assert store_path.read_bytes() == before
    assert len(store.profiles()) == 2


def test_damaged_bundle_changes_nothing(store_path: Path) -> None:
    """It is found before anything is stored."""
    store = ProfileStore(store_path)
    store.put_all(PROFILES[:2])
    before = store_path.read_bytes()
    damaged = rewritten(lambda content: content["profiles"][5]["profile"].update(complete=False))
    with pytest.raises(BundleError):
        merge.merge(store, bundle.load(damaged), "theirs")
    assert store_path.read_bytes() == before


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_a_newer_version_s_profile_stays(store_path: Path, prefer: Any) -> None:
    """It cannot be read here, so nothing that is imported here takes its place."""
    store = ProfileStore(store_path)
    store.put(PROFILES[0])
    with contextlib.closing(sqlite3.connect(store_path)) as file, file:
        file.execute("UPDATE profiles SET value = json_set(value, '$.schema_version', 7)")
    with pytest.warns(StoreWarning):
        plan = merge.merge(store, of(PROFILES[0]), prefer)
    (entry,) = plan.entries
    assert not entry.taken
    assert "newer autochunk" in entry.reason
    with contextlib.closing(sqlite3.connect(store_path)) as file:
        query = "SELECT json_extract(value, '$.schema_version') FROM profiles"
        assert file.execute(query).fetchall() == [(7,)]
