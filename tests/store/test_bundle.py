"""Bundles: profiles that travel between machines as one JSON file."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import make_device, make_measurement, make_profile, make_workload, run_python
from fuzz import check_bundle, sealed
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import autochunk
from autochunk.errors import ArgumentError, BundleError
from autochunk.store import bundle, files, json_text
from autochunk.store.bundle import Bundle, Provenance
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore

RELEASED = Path(__file__).parent / "released"

PROFILES = [
    make_profile(make_workload(f"t={t},k=8"), make_device(kind=kind))
    for kind in ("A", "B")
    for t in (1, 2, 3)
]
TEXT = bundle.dump(PROFILES, "made up")
KEYS = [(profile.device.key, profile.workload) for profile in PROFILES]


def refused(data: str | bytes) -> str:
    """The error of data that is no bundle: one line that names its source."""
    with pytest.raises(BundleError) as error:
        bundle.load(data, "from here")
    message = str(error.value)
    assert message.startswith("from here: ")
    assert message.isprintable()
    assert len(message) < 1500
    return message


def rewritten(change: Callable[[dict[str, Any]], object]) -> str:
    """``TEXT``, its content changed, and nothing else done about it."""
    content = json.loads(TEXT)
    change(content)
    return json.dumps(content)


def version_1(*profiles: Profile) -> str:
    """A bundle as version 1 was written."""
    dumped = [profile.model_dump(mode="json") for profile in profiles]
    content = {"schema_version": 1, "profiles": dumped}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


# --- Writing --------------------------------------------------------------------------------------


def test_round_trip() -> None:
    """What is dumped is loaded again, whole, and says where it comes from."""
    loaded = bundle.load(TEXT)
    assert loaded.profiles == tuple(PROFILES)
    assert loaded.schema_version == bundle.BUNDLE_VERSION
    created = PROFILES[0].created
    devices = tuple(sorted({profile.device.key for profile in PROFILES}))
    assert loaded.provenance == Provenance(
        autochunk=autochunk.__version__,
        devices=devices,
        oldest=created,
        newest=created,
        profiles=len(PROFILES),
        note="made up",
    )


@given(st.permutations(PROFILES))
def test_dump_is_deterministic(profiles: list[Profile]) -> None:
    """The same profiles give the same bytes, in whatever order they come."""
    assert bundle.dump(profiles, "made up") == TEXT
    assert bundle.dump(bundle.load(bundle.dump(profiles)).profiles, "made up") == TEXT


def test_dump_is_the_same_in_another_process() -> None:
    """Nor do the bytes depend on the process, compressed or not."""
    code = """
import sys
from autochunk.store import bundle, files
files.write(sys.argv[2], bundle.dump(bundle.load(sys.argv[1]).profiles, "made up"))
"""
    assert run_python(code, TEXT, "-", PYTHONHASHSEED="5") == TEXT


def test_layout_is_for_people_and_diffs() -> None:
    """The head comes first and a field to a line.

    Each profile's fields are on lines of their own, and so is each measurement, whole.
    """
    lines = TEXT.splitlines()
    assert TEXT.isascii()
    assert lines[1:4] == [
        ' "schema_version": 4,',
        f' "checksum": "{json.loads(TEXT)["checksum"]}",',
        ' "provenance": {',
    ]
    assert '  "note": "made up"' in lines
    assert lines.count('    "complete": true,') == len(PROFILES)
    measurements = [json.loads(line.rstrip(",")) for line in lines if '"implementation"' in line]
    whole = [m.model_dump(mode="json") for profile in PROFILES for m in profile.measurements]
    assert measurements == whole


def test_one_changed_measurement_is_a_diff_of_few_lines() -> None:
    """The measurement, its profile's digest and the checksum."""
    first = PROFILES[0]
    measurements = (*first.measurements[:-1], make_measurement("xla_rows", 4.0, 0.8))
    other = first.model_copy(update={"measurements": measurements})
    changed = bundle.dump([other, *PROFILES[1:]], "made up")
    lines = zip(TEXT.splitlines(), changed.splitlines(), strict=True)
    assert sum(one != two for one, two in lines) == 3


def test_empty_bundle() -> None:
    """No profiles are a bundle, too."""
    loaded = bundle.load(bundle.dump([]))
    assert loaded.profiles == ()
    assert (loaded.provenance.oldest, loaded.provenance.profiles) == (None, 0)


@given(st.floats(min_value=0, allow_infinity=False), st.integers(0, 2**60))
def test_numbers_survive_to_the_last_bit(seconds: float, memory: int) -> None:
    """A digest holds for every number that a profile may have."""
    measurement = make_measurement(seconds=(seconds,), ratios=(seconds,), temp_bytes=memory)
    profile = make_profile(measurements=[measurement])
    loaded = check_bundle(bundle.dump([profile]))
    assert isinstance(loaded, Bundle)
    assert loaded.profiles == (profile,)


@pytest.mark.parametrize("note", ["two\nlines", "\x1b[31m", "x" * 1001, "a\u2028b", "\ud800"])
def test_note_is_one_line(note: str) -> None:
    """It is printed where the bundle is imported."""
    with pytest.raises(ArgumentError, match="note must be one line"):
        bundle.dump([], note)


def test_two_profiles_of_one_workload_are_not_written() -> None:
    """Which of them is meant is for the caller to say."""
    said = r"there are two of cpu A cores=4 \| attention:b=1,t=1,"
    with pytest.raises(BundleError, match=said):
        bundle.dump([*PROFILES, PROFILES[0].model_copy(update={"effort": "quick"})])


# --- Versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(RELEASED.iterdir()), ids=lambda file: file.name)
def test_every_released_format_can_be_read(file: Path, tmp_path: Path) -> None:
    """What any version wrote is read for ever: each file here holds the same three profiles.

    For a new version of a format: write these profiles with it (``bundle.load`` an older file,
    ``bundle.dump`` or ``ProfileStore.put_all`` them), add the file as ``bundle-<version>.json`` or
    ``store-<version>.sqlite``, and never change one that is there.
    """
    copy = Path(shutil.copy(file, tmp_path))
    profiles = (
        ProfileStore(copy).profiles()
        if file.suffix == ".sqlite"
        else list(bundle.read(copy).profiles)
    )
    assert sorted(profiles, key=repr) == sorted(
        bundle.read(RELEASED / "bundle-1.json").profiles, key=repr
    )
    assert len(profiles) == 3
    assert {str(choice.plan) for profile in profiles if (choice := profile.choose())} == {
        "cudnn",
        "xla, 16 MB",
    }


def test_released_store_keeps_what_was_missed(tmp_path: Path) -> None:
    """Not only its profiles."""
    store = ProfileStore(shutil.copy(RELEASED / "store-1.sqlite", tmp_path))
    assert [workload.shape for workload in store.missed(make_device())] == ["b=1,t=77,s=77,h=1,k=8"]


def test_version_1_is_brought_up_to_date() -> None:
    """Written again it is of today's version."""
    old = bundle.load(version_1(*PROFILES))
    assert (old.schema_version, old.provenance.autochunk) == (1, "")
    assert bundle.dump(old.profiles, "made up") == TEXT
    assert dict(bundle.scan(version_1(*PROFILES))) == dict(zip(KEYS, PROFILES, strict=True))


def test_every_older_version_has_an_upgrade() -> None:
    """From each to the next."""
    assert sorted(bundle._UPGRADES) == list(range(1, bundle.BUNDLE_VERSION))


@pytest.mark.parametrize("version", [5, 99, 10**3000])
def test_newer_version_says_to_upgrade(version: int) -> None:
    """It names both versions and the cure, whatever else the file has."""
    message = refused(f'{{"schema_version": {version}, "layout": [1]}}')
    assert f"its schema_version is {str(version)[:10]}" in message
    assert "reads those up to 4; upgrade autochunk" in message


# --- What is no bundle ----------------------------------------------------------------------------


def changed(**fields: Any) -> str:
    """A bundle of one profile with fields of the profile changed; None leaves one out."""
    profile = {**json.loads(make_profile().model_dump_json()), **fields}
    given = {name: value for name, value in profile.items() if value is not None}
    return json.dumps({"schema_version": 1, "profiles": [given]})


NO_BUNDLE = "not a bundle of profiles as `autochunk export` writes; "
NO_VERSION = "schema_version must be a whole number from 1 to 4; got "
TWICE = "a name is given twice in one object"
LATER = PROFILES[0].model_copy(update={"created": "2026-03-01T00:00:00Z"})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", NO_BUNDLE + "EOF"),
        (b"", NO_BUNDLE + "EOF"),
        ("not json", NO_BUNDLE),
        ("{", NO_BUNDLE + "EOF"),
        (b"\xff\xfe\x00", NO_BUNDLE),
        (b"SQLite format 3\0", NO_BUNDLE),
        (pickle.dumps(PROFILES), NO_BUNDLE),
        ("/etc/passwd", NO_BUNDLE),
        ("\ufeff" + TEXT, NO_BUNDLE),
        (TEXT.encode("utf-16"), NO_BUNDLE),
        ("\ud800", "surrogates not allowed"),
        ('"\\ud800"', NO_BUNDLE),
        (TEXT.replace("made up", "\\ud800"), NO_BUNDLE),
        (gzip.compress(TEXT.encode())[:-9], "damaged gzip data"),
        (gzip.compress(TEXT.encode()) + b"x", "damaged gzip data"),
        (b"\x1f\x8b", "damaged gzip data"),
        (b"\x1f\x8b\x08" + b"x" * 99, "damaged gzip data"),
        ("null", "it must be an object; got None"),
        ("3", "it must be an object; got 3"),
        ("[]", "it must be an object; got []"),
        ('"text"', "it must be an object; got 'text'"),
        ("[" + "1" * 4000 + "]", "it must be an object; got [1111"),
        ("1" + "0" * 5000, "number out of range"),
        ('{"schema_version": 1, "profiles": [{"a": 1' + "0" * 5000 + "}]}", "number out of range"),
        ("{}", NO_VERSION + "None"),
        ('{"profiles": [], "schema_version": 0}', NO_VERSION + "0"),
        ('{"profiles": [], "schema_version": "1"}', NO_VERSION + "'1'"),
        ('{"profiles": [], "schema_version": true}', NO_VERSION + "True"),
        ('{"profiles": [], "schema_version": 1.0}', NO_VERSION + "1.0"),
        ('{"openapi": "3.0", "$schema": "x"}', "schema_version must be"),
        ('{"schema_version": 1}', "profiles: Field required"),
        ('{"profiles": 3, "schema_version": 1}', "first at profiles: "),
        ('{"profiles": {}, "schema_version": 1}', "first at profiles: "),
        ('{"profiles": [3], "schema_version": 1}', "first at profiles.0: "),
        ('{"profiles": [{}], "schema_version": 1}', "first at profiles.0.device: Field required"),
        ('{"profiles": [], "schema_version": 1, "more": 2}', "more: Extra inputs"),
        ('{"profiles": [], "schema_version": 1, "a\\nb": 2}', "a\\nb: Extra inputs"),
        ('{"profiles": [], "schema_version": 2}', "checksum: Field required"),
        ('{"profiles": [], "profiles": [], "schema_version": 1}', TWICE),
        (TEXT.replace('"complete": true', '"complete": true, "complete": true', 1), TWICE),
        ("[" * 100_000, "recursion limit"),
        ('{"a":' * 100_000, "recursion limit"),
        (TEXT + "x", NO_BUNDLE + "trailing characters"),
        (TEXT + TEXT, NO_BUNDLE + "trailing characters"),
        (version_1(PROFILES[0]).replace("0.1", "NaN"), NO_BUNDLE),
        (version_1(PROFILES[0]).replace("0.1", "-Infinity"), NO_BUNDLE),
        (version_1(PROFILES[0]).replace("0.1", "1e999"), "not JSON compliant"),
        (changed(workload=None), "profiles.0.workload: Field required"),
        (changed(device=None), "profiles.0.device: Field required"),
        (changed(device={"platform": "cpu"}), "profiles.0.device.kind: Field required"),
        (changed(device=[[]]), "profiles.0.device: "),
        (changed(measurements=None), "profiles.0.measurements: Field required"),
        (changed(complete=None), "profiles.0.complete: Field required"),
        (changed(workload="t=1,k=1"), "not a canonical workload key"),
        (changed(workload="nonsense"), "profiles.0.workload"),
        (changed(workload="attention:t=1\n2,k=3"), "profiles.0.workload"),
        (changed(workload=["\x1b[31m"]), "profiles.0.workload"),
        (changed(measurements=[{"implementation": "xla"}]), "profiles.0.measurements.0"),
        (changed(schema_version=4), "profiles.0.schema_version"),
        (changed(unknown=3), "profiles.0.unknown: Extra inputs"),
        (changed(created="now"), "profiles.0.created"),
        (version_1(PROFILES[0], PROFILES[0]), f"there are two of {KEYS[0][0]} | {KEYS[0][1]}"),
        (version_1(PROFILES[0], LATER), "there are two of"),
    ],
    # Some texts differ from process to process, and pytest's processes must agree on names.
    ids=map(str, itertools.count()),
)
def test_what_is_no_bundle(data: str | bytes, says: str) -> None:
    """Whatever is no bundle is a BundleError of one line that names the source and the place.

    Nothing is read from it by scanning either.
    """
    assert says in refused(data)
    assert isinstance(check_bundle(data), BundleError)


OTHER_DIGEST = "sha256:" + "0" * 64
WRONG_CHECKSUM, WRONG_PROVENANCE = "its checksum does not fit", "its provenance does not fit"
WRONG_COUNT = "its provenance says 5 profiles; there are 6"


def of_third(content: dict[str, Any]) -> dict[str, Any]:
    """The third profile of a bundle's content."""
    profile: dict[str, Any] = content["profiles"][2]["profile"]
    return profile


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: of_third(c).update(complete=False), "profiles.2: the profile of cpu A"),
        (lambda c: of_third(c)["measurements"].pop(), "profiles.2: the profile of cpu A"),
        (lambda c: of_third(c)["measurements"].reverse(), "is not what its digest was made of"),
        (lambda c: of_third(c).update(effort="quick"), "is not what its digest was made of"),
        (lambda c: c["profiles"][2].update(digest=OTHER_DIGEST), WRONG_CHECKSUM),
        (lambda c: c["profiles"][2].update(digest="md5:0"), "profiles.2.digest"),
        (lambda c: c.update(checksum=OTHER_DIGEST), WRONG_CHECKSUM),
        (lambda c: c.update(checksum=3), "first at checksum"),
        (lambda c: c["profiles"].pop(), WRONG_CHECKSUM),
        (lambda c: c["profiles"].reverse(), WRONG_CHECKSUM),
        (lambda c: c["profiles"].append(c["profiles"][0]), WRONG_CHECKSUM),
        (lambda c: c["provenance"].update(profiles=5), WRONG_COUNT),
        (lambda c: c["provenance"].update(devices=["cpu C"]), WRONG_PROVENANCE),
        (lambda c: c["provenance"].update(newest="2026-03-01T00:00:00Z"), WRONG_PROVENANCE),
        (lambda c: c["provenance"].update(note="\x1b[31m"), "provenance.note"),
        (lambda c: c["provenance"].update(by="me"), "provenance.by"),
        (lambda c: c.pop("provenance"), "provenance: Field required"),
    ],
)
def test_damage_is_found(change: Callable[[dict[str, Any]], object], says: str) -> None:
    """What was changed on the way is told by a digest, the checksum or the provenance.

    The message says where.
    """
    text = rewritten(change)
    assert says in refused(text)
    check_bundle(text)


def test_another_layout_is_the_same_bundle() -> None:
    """Digests are of the content: a file laid out anew, or with fields sorted, is not damaged."""
    for text in (
        json.dumps(json.loads(TEXT)),
        json.dumps(json.loads(TEXT), indent=4, sort_keys=True),
        TEXT.replace("\n", "\r\n"),
    ):
        assert bundle.load(text) == bundle.load(TEXT)


@pytest.mark.parametrize("text", [bundle.dump(PROFILES[:1], "x"), version_1(PROFILES[0])])
def test_truncated_at_every_byte(text: str) -> None:
    """No beginning of a bundle is one."""
    data = text.rstrip().encode()
    for length in range(len(data)):
        with pytest.raises(BundleError):
            bundle.load(data[:length])
        with pytest.raises(BundleError):
            bundle.scan(data[:length])


@given(st.one_of(st.text(), st.binary()))
def test_hostile_text_is_a_bundle_error(data: str | bytes) -> None:
    """No text that was not written as a bundle is one."""
    assert isinstance(check_bundle(data), BundleError)


NAMES = st.text(max_size=9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(st.data(), JSON, st.sampled_from([TEXT, version_1(*PROFILES)]))
def test_any_value_in_any_place_is_a_bundle_or_a_bundle_error(
    data: st.DataObject, value: Any, text: str
) -> None:
    """Wrong types and lengths are found in every place, also behind digests that fit."""
    content = json.loads(text)
    place, name = content, "profiles"
    for _ in range(data.draw(st.integers(0, 6))):
        inner = place[name]
        if not isinstance(inner, dict | list) or not inner:
            break
        names = sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))
        place, name = inner, data.draw(st.sampled_from(names))
    place[name] = value
    damaged = json.dumps(content).encode()
    check_bundle(damaged)
    check_bundle(sealed(damaged))


@given(st.data(), st.sampled_from([bundle.dump(PROFILES[:1]), version_1(PROFILES[0])]))
def test_damaged_bytes_are_a_bundle_or_a_bundle_error(data: st.DataObject, text: str) -> None:
    """A bundle with a few bytes changed, left out or doubled raises nothing but a BundleError."""
    content = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check_bundle(bytes(content))
    check_bundle(sealed(bytes(content)))
    check_bundle(gzip.compress(bytes(content)))


HEAD = '{"schema_version": 1, "profiles": ['
DEVICES = '{"schema_version": 2, "profiles": [], "provenance": {"devices": ['
# (before, what is repeated until the file is as large as a bundle may be, or that often, after)
HUGE = {
    "deep lists": ("", "[", None, ""),
    "deep objects": ("", '{"a":', None, ""),
    "lists": ("[", "[],", None, "[]]"),
    "objects": ("[", "{},", None, "{}]"),
    "profiles that are lists": (HEAD, "[],", None, "[]]}"),
    "as many lists as are let through": ("[", "[],", 2**23 - 9, "[]]"),
    "as many profiles as are let through": (HEAD, "3,", 2**24 - 9, "3]}"),
    "many objects as profiles": (HEAD, "{},", 299_999, "{}]}"),
    "many devices": (DEVICES, "3,", 10**7, "3]}}"),
}


@pytest.mark.parametrize("case", HUGE)
def test_what_is_made_to_take_time_and_memory(case: str) -> None:
    """Files made to be expensive are refused in some seconds and gigabytes.

    They have as many brackets as fit, deep or side by side, or as many values as are let through.
    """
    code = """
import resource, sys
from autochunk.errors import BundleError
from autochunk.store import bundle, files, json_text
before, unit, count, after = sys.argv[1:]
times = int(count) if count != "None" else (json_text.MOST_BYTES - 99) // len(unit)
text = before + unit * times + after
for read in (bundle.load, bundle.scan):
    try:
        read(text)
    except BundleError as error:
        assert len(str(error)) < 1000
    else:
        raise AssertionError("that is no bundle")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    started = time.monotonic()
    assert int(run_python(code, *HUGE[case])) < 3000
    assert time.monotonic() - started < 50


@pytest.mark.parametrize(
    "place",
    [
        *("", "provenance", "profiles.0", "profiles.0.profile"),
        *("profiles.0.profile.device", "profiles.0.profile.measurements.0"),
    ],
)
def test_an_object_of_many_fields_is_refused_unvalidated(place: str) -> None:
    """An error for each of them would take a thousand times the file's memory."""
    content: Any = json.loads(TEXT)
    inner = content
    for name in place.split(".") if place else []:
        inner = inner[int(name)] if name.isdecimal() else inner[name]
    inner.update({f"field {number}": 1 for number in range(1000)})
    assert "an object has 10" in refused(json.dumps(content))


def test_an_error_that_is_kept_does_not_keep_what_was_read() -> None:
    """Pydantic's errors hold objects that the garbage collector cannot see.

    In a cycle with a kept error, the file's whole content would stay for ever.
    """
    three_heads = make_workload("t=8,h=3,k=8").key
    key = three_heads.replace("kv_heads=3", "kv_heads=2")
    text = changed(workload=key)
    reads: tuple[Callable[[], object], ...] = (
        lambda: bundle.load(text),
        lambda: bundle.scan(text)[make_device().key, key],
    )

    def keep() -> None:
        kept = []
        for read in reads:
            with pytest.raises(BundleError) as error:
                read()
            kept.append(error.value)

    def objects_after(times: int) -> int:
        for _ in range(times):
            keep()
        gc.collect()
        return len(gc.get_objects())

    before = objects_after(3)
    assert objects_after(50) < before + 50


# --- Reading a part -------------------------------------------------------------------------------


def test_scan() -> None:
    """A bundle is a mapping from device and workload to the profile."""
    index = bundle.scan(TEXT)
    assert dict(index) == dict(zip(KEYS, PROFILES, strict=True))
    assert index.workloads(KEYS[0][0]) == [workload for _, workload in KEYS[:3]]
    assert index.workloads("cpu C") == []
    assert index.get(("cpu C", KEYS[0][1])) is None
    assert index.provenance == bundle.load(TEXT).provenance
    assert bundle.scan(gzip.compress(TEXT.encode())) == index


def test_damaged_profile_leaves_the_others_usable() -> None:
    """It is found when it is asked for."""
    damaged = rewritten(lambda content: of_third(content).update(complete=False))
    index = bundle.scan(damaged, "from here")
    assert [index[key] for key in KEYS[:2]] == PROFILES[:2]
    said = r"from here: profiles.2: the profile of cpu A .* is not what its digest was made of"
    with pytest.raises(BundleError, match=said):
        index[KEYS[2]]


def test_invalid_profile_is_found_when_asked_for() -> None:
    """Also one whose digest fits."""
    damaged = rewritten(lambda content: of_third(content).update(created="now"))
    index = bundle.scan(sealed(damaged.encode()))
    assert index[KEYS[1]] == PROFILES[1]
    with pytest.raises(BundleError, match=r"profiles.2.created"):
        index[KEYS[2]]


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        *("measurements.0.detail", "measurements.0.implementation", "device.jaxlib", "device.kind"),
        *("workload", "autochunk", "created", "effort", "device.a name that is none"),
    ],
)
def test_a_text_without_end_is_refused(place: str) -> None:
    """In whichever field: none takes more than a few thousand characters."""
    size = 2_000_000

    def change(content: dict[str, Any]) -> None:
        value: Any = content["profiles"][0]["profile"]
        *path, name = place.split(".")
        for part in path:
            value = value[int(part) if part.isdecimal() else part]
        value[name] = "x" * size

    message = refused(sealed(rewritten(change).encode()))
    assert len(message) < 1000


def test_plans_and_times_have_a_bound() -> None:
    """Ten thousand plans are read; more times than can be looked at while tracing are not."""
    plans = [make_measurement("xla", n + 1.0) for n in range(10_000)]
    assert len(bundle.load(bundle.dump([make_profile(measurements=plans)])).profiles) == 1
    with pytest.raises(ValidationError, match="at most 10000 items"):
        make_profile(measurements=[*plans, plans[0]])
    long = make_measurement("xla", 1.0, seconds=(1.0,) * 1000, ratios=(1.0,) * 1000)
    with pytest.raises(ValidationError, match="at most 100000 times; this has 101000"):
        make_profile(measurements=[long] * 101)


def test_bundle_of_too_many_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file larger than any bundle is refused unread, and what is no file after that much."""
    monkeypatch.setattr(json_text, "MOST_BYTES", 2**20)
    with pytest.raises(BundleError, match="at most 1 MiB; this has 3"):
        bundle.load(" " * (3 << 20))
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(3 << 20)
    with pytest.raises(BundleError, match="at most 1 MiB; this has 3"):
        bundle.read(tmp_path / "large.json")
    with pytest.raises(BundleError, match="/dev/zero: a bundle has at most 1 MiB; this has more"):
        bundle.read("/dev/zero")


def test_a_file_of_a_gigabyte_is_refused_unread(tmp_path: Path) -> None:
    """By its size."""
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**30)
    started = time.monotonic()
    with pytest.raises(BundleError, match="at most 256 MiB; this has 1024"):
        bundle.read(tmp_path / "large.json")
    assert time.monotonic() - started < 30


def test_gzip_that_unfolds_to_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is unfolded up to the limit only."""
    monkeypatch.setattr(json_text, "MOST_BYTES", 2**20)
    bomb = gzip.compress(bytes(2**26))
    assert len(bomb) < 2**17
    with pytest.raises(BundleError, match="at most 1 MiB; this has more"):
        bundle.load(bomb)


@pytest.mark.parametrize("name", ["bundle.json", "bundle.json.gz", "a name with ä and {}.json"])
def test_write_and_read(tmp_path: Path, name: str) -> None:
    """What is written is read; a name that ends in .gz is compressed, and known by its content."""
    files.write(tmp_path / name, TEXT)
    assert bundle.read(tmp_path / name) == bundle.read(str(tmp_path / name)) == bundle.load(TEXT)
    data = (tmp_path / name).read_bytes()
    assert data == TEXT.encode() if not name.endswith(".gz") else data.startswith(b"\x1f\x8b")
    renamed = (tmp_path / name).rename(tmp_path / "renamed")
    assert bundle.read(renamed) == bundle.load(TEXT)


def test_compressed_bytes_are_deterministic(tmp_path: Path) -> None:
    """They have neither time nor name in them."""
    files.write(tmp_path / "one.gz", TEXT)
    time.sleep(1.1)
    files.write(tmp_path / "other.gz", TEXT)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "other.gz").read_bytes()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_written_file_has_plain_permissions(tmp_path: Path, umask: int, mode: int) -> None:
    """Those that any new file would get."""
    before = os.umask(umask)
    try:
        files.write(tmp_path / "bundle.json", TEXT)
    finally:
        os.umask(before)
    assert (tmp_path / "bundle.json").stat().st_mode & 0o777 == mode


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """And nothing beside it."""
    file = tmp_path / "bundle.json"
    file.write_text("old")
    code = """
import resource, signal, sys
from autochunk.errors import BundleError
from autochunk.store import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    files.write(sys.argv[1], "x" * 5000)
except BundleError as error:
    print(error)
"""
    assert run_python(code, file) == f"{file}: File too large\n"
    assert file.read_text() == "old"
    assert list(tmp_path.glob("[!s]*")) == [file]


def test_write_through_a_link_keeps_it(tmp_path: Path) -> None:
    """What it points to is written."""
    (tmp_path / "link.json").symlink_to(tmp_path / "bundle.json")
    files.write(tmp_path / "link.json", TEXT)
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "bundle.json").read_text() == TEXT


def test_write_to_what_is_no_file(tmp_path: Path) -> None:
    """A device is written to, not replaced; a folder and a missing one are BundleErrors."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.write(pipe, "text")
        assert os.read(reader, 99) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(BundleError, match=f"{tmp_path}: Is a directory"):
        files.write(tmp_path, TEXT)
    with pytest.raises(BundleError, match="No such file or directory"):
        files.write(tmp_path / "missing" / "bundle.json", TEXT)


def test_standard_streams(tmp_path: Path) -> None:
    """A place named "-" is standard output in writing and standard input in reading."""
    files.write(tmp_path / "bundle.json.gz", TEXT)
    code = """
import os, sys
os.dup2(os.open(sys.argv[1], os.O_RDONLY), 0)
from autochunk.store import bundle, files
read = bundle.read("-")
files.write("-", bundle.dump(read.profiles, read.provenance.note))
"""
    assert run_python(code, tmp_path / "bundle.json.gz") == TEXT


def test_errors_name_the_file(tmp_path: Path) -> None:
    """Also one whose name has a line end in it, in one line."""
    file = tmp_path / "a\nb.json"
    file.write_text("no bundle")
    with pytest.raises(BundleError) as error:
        bundle.read(file)
    assert str(error.value).startswith(f"{tmp_path}/a\\nb.json: not a bundle")


def test_read_of_what_is_no_file(tmp_path: Path) -> None:
    """A missing file and a folder are BundleErrors with the system's reason."""
    with pytest.raises(BundleError, match="No such file"):
        bundle.read(tmp_path / "missing.json")
    with pytest.raises(BundleError, match="Is a directory"):
        bundle.read(tmp_path)
