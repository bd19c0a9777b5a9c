"""Every kind of place that has profiles is told by its URL or its first bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import make_call, make_device, make_profile, make_workload

from autochunk.errors import BundleError, ReportError, StoreWarning
from autochunk.report.overview import report_record
from autochunk.report.peers import read_peers
from autochunk.report.sources import Source, kind_of, read
from autochunk.store import bundle, files
from autochunk.store.profiles import ProfileStore
from autochunk.store.remote import without_password
from autochunk.tuner.study import Storage

DEVICE = make_device()
PROFILE = make_profile()


def store(folder: Path) -> Path:
    ProfileStore(folder / "store").put(PROFILE)
    return folder / "store"


def bundle_file(folder: Path) -> Path:
    files.write(folder / "b.json", bundle.dump([PROFILE], "a note"))
    return folder / "b.json"


def compressed(folder: Path) -> Path:
    files.write(folder / "b.json.gz", bundle.dump([PROFILE]))
    return folder / "b.json.gz"


def folder_of_bundles(folder: Path) -> Path:
    compressed(folder)
    return bundle_file(folder).parent


def journal(folder: Path) -> Path:
    study = Storage(folder / "journal").study(DEVICE, make_workload(), "standard")
    study.profile = PROFILE
    return folder / "journal"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (store, "store"),
        (bundle_file, "bundle"),
        (compressed, "bundle"),
        (folder_of_bundles, "folder"),
        (journal, "storage"),
    ],
)
def test_kinds_of_places(make: object, kind: str, tmp_path: Path) -> None:
    """Each is read as what it is, whatever it is called."""
    assert callable(make)
    place = str(make(tmp_path))
    assert kind_of(place) == kind
    assert read(place, DEVICE).profiles == (PROFILE,)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("postgresql://tuner@db/autochunk", "storage"),
        ("postgresql+psycopg://tuner@db/autochunk", "storage"),
        ("sqlite:////tmp/study.db", "storage"),
        ("https://host/profiles.json", "bundle"),
        ("s3://bucket/profiles.json.gz", "bundle"),
    ],
)
def test_urls(url: str, kind: str) -> None:
    """A database's scheme names a storage, any other a bundle."""
    assert kind_of(url) == kind


@pytest.mark.parametrize("scheme", ["https", "postgresql"])
def test_a_report_tells_no_password(scheme: str) -> None:
    """It is for others to see."""
    assert without_password(f"{scheme}://me:secret@host/x") == f"{scheme}://me:***@host/x"
    asked = f"{scheme}://host/x?password=secret&sslpassword=se@ret"
    assert without_password(asked) == f"{scheme}://host/x?password=***&sslpassword=***"


def test_what_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    """As for every command that reads a bundle."""
    with pytest.raises(BundleError, match="No such file"):
        read(str(tmp_path / "nothing.json"), DEVICE)


def test_a_bundles_note_is_told(tmp_path: Path) -> None:
    """Who wrote it had something to say."""
    assert read(str(bundle_file(tmp_path)), DEVICE).note == "a note"


def test_misses_are_of_stores_most_wanted_first(tmp_path: Path) -> None:
    """What nobody tuned on a device stands in its overview, even where nothing is tuned."""
    mine = ProfileStore(tmp_path / "store")
    often, once = make_workload("t=64,k=8"), make_workload("t=8,k=8")
    for workload in (once, often, often):
        mine.record_miss(DEVICE, workload)
    source = read(str(mine.path), DEVICE)
    (device,) = report_record([source], DEVICE)["devices"]
    assert [(one["shape"], one["processes"]) for one in device["misses"]] == [
        (often.shape, 2),
        (once.shape, 1),
    ]
    assert device["workloads"] == []


def test_the_overview_of_a_device() -> None:
    """Figures over its workloads, and how many are stale or unfinished."""
    now = make_device(jaxlib="0.13.0")
    slow = make_profile(make_workload("t=64,k=8"), complete=False)
    source = Source("s", "store", (PROFILE, slow), {})
    (device,) = report_record([source], now)["devices"]
    assert device["here"]
    assert (device["stale"], device["unfinished"], len(device["workloads"])) == (2, 1, 2)
    assert device["speedup_vs_dense"] == [2.0, 2.0, 2.0]
    assert device["memory_vs_dense"] == [0.1, 0.1, 0.1]
    assert device["versions"]["jaxlib"] == ["0.12.0"]


def test_two_sources_of_one_device_stay_apart() -> None:
    """Nothing of the second is lost behind the first."""
    sources = [Source(name, "bundle", (PROFILE,), {}) for name in ("old", "new")]
    devices = report_record(sources, DEVICE)["devices"]
    assert [one["source"] for one in devices] == ["old", "new"]


def test_peers_of_a_bench(tmp_path: Path) -> None:
    """Other libraries that ran, on this machine only; what autochunk itself is they are not."""
    names = ["haiku dense", "auto", "torch", "jax.nn cudnn"]
    ratios = [1.0, 0.5, 0.7, None]
    contenders = [
        {"name": name, "ratio": ratio, "temp_bytes": 5, "seconds": 1.0, "spread": 0, "detail": ""}
        for name, ratio in zip(names, ratios, strict=True)
    ]
    file = tmp_path / "bench.json"
    file.write_text(json.dumps([{"workload": PROFILE.workload, "contenders": contenders}]))
    peers = read_peers(file)
    assert [one["name"] for one in peers[PROFILE.workload]] == ["torch"]
    source = Source("s", "bundle", (PROFILE,), {})
    for now, shown in ((DEVICE, ["torch"]), (make_device(kind="Other/1"), [])):
        (device,) = report_record([source], now, peers)["devices"]
        assert [one["name"] for one in device["workloads"][0]["curve"]["peers"]] == shown


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"workload": "w", "contenders": [{"name": "a", "ratio": -1}]}]']
)
def test_what_is_no_bench(text: str, tmp_path: Path) -> None:
    """A line that says what was required."""
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(ReportError, match="is not what `autochunk bench --json` prints"):
        read_peers(file)


def test_a_bad_file_does_not_take_a_folder_along(tmp_path: Path) -> None:
    """As for "auto": the others are read, and it is told which one is not."""
    folder = folder_of_bundles(tmp_path)
    (folder / "bad.json").write_text("{")
    with pytest.warns(StoreWarning, match="without one of its files: .*bad.json"):
        assert read(str(folder), DEVICE).profiles == (PROFILE,)


def test_functions_that_were_missed_are_told(tmp_path: Path) -> None:
    """Beside the attention that was."""
    kept = ProfileStore(tmp_path / "store")
    kept.record_miss(DEVICE, make_call())
    kept.record_miss(DEVICE, make_workload())
    record = report_record([read(str(kept.path), DEVICE)], DEVICE)
    told = [one["shape"] for one in record["devices"][0]["misses"]]
    assert sorted(told) == sorted([make_call().shape, make_workload().shape])
