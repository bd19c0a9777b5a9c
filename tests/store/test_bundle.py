"""Bundles: profiles that travel between machines as one JSON file."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from factories import make_device, make_measurement, make_profile, make_workload, run_python
from hypothesis import given
from hypothesis import strategies as st

from autochunk.errors import BundleError, StoreError
from autochunk.store import bundle
from autochunk.store.bundle import ImportSummary
from autochunk.store.database import ProfileStore
from autochunk.store.profile import Bundle, Profile

OLD, MIDDLE, NEW = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z"
PROFILES = [make_profile(make_workload(f"t={t},k=8"), make_device(kind=kind)) for kind in ("A", "B") for t in (1, 2, 3)]


def test_round_trip() -> None:
    """What is dumped is loaded again, whole."""
    loaded = bundle.load(bundle.dump(PROFILES))
    assert sorted(loaded.profiles, key=repr) == sorted(PROFILES, key=repr)


@given(st.permutations(PROFILES))
def test_dump_is_deterministic(profiles: list[Profile]) -> None:
    """The same profiles give the same bytes, in whatever order they come."""
    assert bundle.dump(profiles) == bundle.dump(PROFILES)
    assert bundle.dump(bundle.load(bundle.dump(profiles)).profiles) == bundle.dump(PROFILES)


def test_dump_is_the_same_in_another_process() -> None:
    """Nor do the bytes depend on the process."""
    code = "import sys; from autochunk.store import bundle; sys.stdout.write(bundle.dump(bundle.load(sys.argv[1]).profiles))"
    text = bundle.dump(PROFILES)
    assert run_python(code, text, PYTHONHASHSEED="5") == text


def test_dump_is_json_for_people() -> None:
    """One object, sorted and indented, that ends in a newline: it can be read, compared and kept in a repository."""
    text = bundle.dump(PROFILES)
    assert text.endswith("}\n")
    assert text.isascii()
    content = json.loads(text)
    assert sorted(content) == ["profiles", "schema_version"]
    assert content["schema_version"] == 1
    assert text == json.dumps(content, indent=1, sort_keys=True) + "\n"


def test_empty_bundle() -> None:
    """No profiles are a bundle, too."""
    assert bundle.load(bundle.dump([])).profiles == ()


def changed(**fields: Any) -> str:
    """A bundle of one profile with fields of the profile changed; None leaves one out."""
    profile = {**json.loads(make_profile().model_dump_json()), **fields}
    return json.dumps({"schema_version": 1, "profiles": [{name: value for name, value in profile.items() if value is not None}]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the whole text"),
        (b"", "the whole text"),
        ("not json", "the whole text"),
        ("{", "the whole text"),
        (b"\xff\xfe\x00", "the whole text"),
        (b"SQLite format 3\0", "the whole text"),
        ("\ud800", "the whole text"),
        ("null", "the whole text"),
        ("3", "the whole text"),
        ("[]", "the whole text"),
        ('"text"', "the whole text"),
        ("{}", "schema_version: Field required"),
        ('{"profiles": 3, "schema_version": 1}', "profiles"),
        ('{"profiles": {}, "schema_version": 1}', "profiles"),
        ('{"profiles": [3], "schema_version": 1}', "profiles.0"),
        ('{"profiles": [{}], "schema_version": 1}', "profiles.0.schema_version: Field required"),
        ('{"profiles": [], "schema_version": 1, "more": 2}', "more: Extra inputs"),
        ('{"profiles": [], "schema_version": 2}', "schema_version must be 1; got 2"),
        ('{"profiles": [], "schema_version": 0}', "schema_version must be 1; got 0"),
        ('{"profiles": [], "schema_version": null}', "schema_version must be 1; got None"),
        ('{"profiles": [], "schema_version": "1"}', "schema_version must be 1; got 1"),
        ('{"profiles": [{"new": "layout"}], "schema_version": 7, "extra": []}', "schema_version must be 1; got 7"),
        ("[" * 100_000, "recursion"),
        ('{"a":' * 100_000, "recursion"),
        (bundle.dump(PROFILES)[:-20], "the whole text"),
        (bundle.dump(PROFILES)[: len(bundle.dump(PROFILES)) // 2], "the whole text"),
        (bundle.dump(PROFILES) + "x", "the whole text"),
        (bundle.dump(PROFILES).replace("0.1", "NaN"), "should be a finite number"),
        (bundle.dump(PROFILES).replace("0.1", "Infinity"), "should be a finite number"),
        (changed(workload=None), "profiles.0.workload: "),
        (changed(device=None), "profiles.0.device: Field required"),
        (changed(measurements=None), "profiles.0.measurements: Field required"),
        (changed(complete=None), "profiles.0.complete: Field required"),
        (changed(workload="t=1,k=1"), "not a canonical workload key"),
        (changed(workload="nonsense"), "profiles.0.workload"),
        (changed(measurements=[{"implementation": "xla"}]), "profiles.0.measurements.0"),
        (changed(schema_version=3), "profiles.0.schema_version"),
        (changed(unknown=3), "profiles.0.unknown: Extra inputs"),
        (changed(created="now"), "profiles.0.created"),
    ],
)
def test_what_is_no_bundle(text: str | bytes, says: str) -> None:
    """Whatever is no bundle is a BundleError of one line that names the source and the place."""
    with pytest.raises(BundleError) as error:
        bundle.load(text, "from here")
    message = str(error.value)
    assert message.startswith("from here: ")
    assert says in message
    assert "\n" not in message
    assert len(message) < 1000


def test_nan_is_refused() -> None:
    """NaN, which is not JSON but which Python writes, does not get in as a time."""
    text = bundle.dump([make_profile()]).replace('"compile_seconds": 0.5', '"compile_seconds": NaN')
    assert "NaN" in text
    with pytest.raises(BundleError, match=r"profiles.0.measurements.0.compile_seconds"):
        bundle.load(text)


def test_bundle_without_a_schema_version() -> None:
    """A bundle says its schema version; an object without is none."""
    with pytest.raises(BundleError, match="schema_version"):
        bundle.load('{"profiles": []}')


@pytest.mark.parametrize("text", ['{"profiles": [], "schema_version": 1, "a\\nb": 1}', changed(workload="attention:t=1\n2,k=3")])
def test_error_is_one_line_whatever_the_text(text: str) -> None:
    """A name or a value with a newline in it does not break the message into lines."""
    with pytest.raises(BundleError) as error:
        bundle.load(text)
    assert "\n" not in str(error.value)


@given(st.one_of(st.text(), st.binary()))
def test_hostile_text_is_a_bundle_error(text: str | bytes) -> None:
    """No text that was not written as a bundle raises anything else."""
    with pytest.raises(BundleError):
        bundle.load(text)


@given(st.data())
def test_damaged_bundle_is_a_bundle_error_or_a_bundle(data: st.DataObject) -> None:
    """A bundle with a few bytes changed raises nothing but a BundleError."""
    content = bytearray(bundle.dump(PROFILES[:1]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BundleError):
        assert isinstance(bundle.load(bytes(content)), Bundle)


def test_bundle_of_too_many_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file larger than any bundle is refused unread."""
    monkeypatch.setattr(bundle, "MOST_BYTES", 2**20)
    with pytest.raises(BundleError, match="at most 1 MiB; this has 3"):
        bundle.load(" " * (3 << 20))
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(3 << 20)
    with pytest.raises(BundleError, match="at most 1 MiB; this has 3"):
        bundle.read(tmp_path / "large.json")


def test_read(tmp_path: Path) -> None:
    """A bundle file is read; errors name it."""
    file = tmp_path / "bundle.json"
    file.write_text(bundle.dump(PROFILES))
    assert bundle.dump(bundle.read(file).profiles) == bundle.dump(PROFILES)
    file.write_text("no bundle")
    with pytest.raises(BundleError, match=f"{file}: not a bundle"):
        bundle.read(file)


def test_read_of_what_is_no_file(tmp_path: Path) -> None:
    """A missing file and a folder are BundleErrors with the system's reason."""
    with pytest.raises(BundleError, match="No such file"):
        bundle.read(tmp_path / "missing.json")
    with pytest.raises(BundleError, match="Is a directory"):
        bundle.read(tmp_path)


# --- Merging --------------------------------------------------------------------------------------------------------------


def at(created: str, t: int = 1, limit: float = 1.0) -> Profile:
    return make_profile(make_workload(f"t={t},k=8"), measurements=[make_measurement("xla", limit)], created=created)


def test_merge_counts_new_updated_and_kept(store_path: Path) -> None:
    """What the store lacks is new, what is later than the store's replaces it, and what is as old or older is left out."""
    store = ProfileStore(store_path)
    store.put_all([at(MIDDLE, t) for t in (1, 2, 3)])
    incoming = [at(OLD, 1, 9.0), at(MIDDLE, 2, 9.0), at(NEW, 3, 9.0), at(OLD, 4, 9.0)]
    assert bundle.merge(store, Bundle(schema_version=1, profiles=tuple(incoming))) == ImportSummary(new=1, updated=1, kept=2)
    limits = {profile.parsed_workload().query_length: profile.measurements[0].max_chunk_size_mb for profile in store.profiles()}
    assert limits == {1: 1.0, 2: 1.0, 3: 9.0, 4: 9.0}


def test_merge_twice_changes_nothing(store_path: Path) -> None:
    """Importing the same bundle again leaves the store as it is, to the byte."""
    store = ProfileStore(store_path)
    incoming = Bundle(schema_version=1, profiles=tuple(PROFILES))
    assert bundle.merge(store, incoming) == ImportSummary(len(PROFILES), 0, 0)
    before = store_path.read_bytes()
    assert bundle.merge(store, incoming) == ImportSummary(0, 0, len(PROFILES))
    assert store_path.read_bytes() == before


def test_merge_of_export_and_import(store_path: Path, tmp_path: Path) -> None:
    """A store's bundle, merged into an empty store, is the same store."""
    one, other = ProfileStore(store_path), ProfileStore(tmp_path / "other.sqlite")
    one.put_all(PROFILES)
    bundle.merge(other, bundle.load(bundle.dump(one.profiles())))
    assert other.profiles() == one.profiles()


def test_merge_in_either_order(tmp_path: Path) -> None:
    """Two machines' bundles end in the same store, whichever comes first."""
    bundles = [
        Bundle(schema_version=1, profiles=(at(OLD, 1, 2.0), at(NEW, 2, 2.0))),
        Bundle(schema_version=1, profiles=(at(NEW, 1, 3.0), at(OLD, 2, 3.0), at(OLD, 3, 3.0))),
    ]
    stores = [ProfileStore(tmp_path / name) for name in ("one", "other")]
    for store, order in zip(stores, (bundles, bundles[::-1]), strict=True):
        for one in order:
            bundle.merge(store, one)
    assert stores[0].profiles() == stores[1].profiles()


def test_merge_of_a_bundle_with_two_of_one_workload(store_path: Path) -> None:
    """Of two for one device and workload the later one stays, also where both are in the bundle, and it counts once."""
    store = ProfileStore(store_path)
    summary = bundle.merge(store, Bundle(schema_version=1, profiles=(at(NEW, 1, 9.0), at(OLD, 1, 1.0))))
    assert store.profiles() == [at(NEW, 1, 9.0)]
    assert summary.new == 1


def test_merge_of_nothing_does_not_create_a_store(store_path: Path) -> None:
    """An empty bundle writes nothing."""
    assert bundle.merge(ProfileStore(store_path), Bundle(schema_version=1, profiles=())) == ImportSummary(0, 0, 0)
    assert not store_path.exists()


def test_failed_merge_changes_nothing(store_path: Path) -> None:
    """All profiles of a bundle are stored or, where one cannot be, none."""
    store = ProfileStore(store_path)
    store.put_all(PROFILES[:2])
    with sqlite3.connect(store_path) as file:
        file.execute("CREATE TRIGGER no BEFORE INSERT ON profiles WHEN NEW.key LIKE '%t=3,%' BEGIN SELECT RAISE(ABORT, 'disk on fire'); END")
    file.close()
    before = store_path.read_bytes()
    rng = random.Random(1)
    with pytest.raises(StoreError, match="disk on fire"):
        bundle.merge(store, Bundle(schema_version=1, profiles=tuple(rng.sample(PROFILES, len(PROFILES)))))
    assert store_path.read_bytes() == before
    assert len(store.profiles()) == 2


def test_bundle_of_several_devices() -> None:
    """A bundle holds profiles of several devices side by side."""
    kinds = {profile.device.kind for profile in bundle.load(bundle.dump(PROFILES)).profiles}
    assert kinds == {"A", "B"}
