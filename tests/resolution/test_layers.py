"""Layers: where profiles come from, and what each of them says that it has."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from factories import make_device, make_profile, make_workload
from rich.console import Console

import autochunk
from autochunk import host
from autochunk.errors import BundleError, StoreWarning
from autochunk.report.records import profile_row
from autochunk.report.tables import profile_table
from autochunk.resolution import layers, places
from autochunk.resolution.layers import BundleLayer, Layer, MemoryLayer, account, left_out
from autochunk.resolution.resolve import resolve
from autochunk.store import bundle, files
from autochunk.store.choice import DENSE, slower_by
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.text import one_line

DEVICE, WORKLOAD = make_device(), make_workload()


def make(kind: str, folder: Path, *profiles: Profile) -> Layer:
    """A layer of each kind with these profiles."""
    text = bundle.dump(profiles)
    if kind == "store":
        ProfileStore(folder / "store.sqlite").put_all(profiles)
        return ProfileStore(folder / "store.sqlite")
    if kind == "memory":
        return MemoryLayer("memory", profiles)
    if kind == "url":
        fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
        fsspec.filesystem("memory").pipe_file(f"{folder}/bundle.json", text.encode())
        return BundleLayer(f"memory:/{folder}/bundle.json", "url")
    (folder / "bundle.json").write_text(text)
    (folder / "bundle.json.gz").write_bytes(gzip.compress(text.encode()))
    names = {"folder": "", "file": "bundle.json", "gzip": "bundle.json.gz"}
    return BundleLayer(str(folder / names[kind]), kind)


@pytest.mark.parametrize("kind", ["store", "file", "gzip", "folder", "url", "memory"])
def test_every_kind_of_layer_answers_alike(kind: str, tmp_path: Path) -> None:
    """The exact profile, the workloads of a device, and all keys."""
    here = make_profile()
    there = make_profile(make_workload("t=64,k=8"), make_device(kind="Another/Kind"))
    layer = make(kind, tmp_path, here, there)
    assert layer.get(DEVICE, WORKLOAD) == here
    assert layer.get(there.device, WORKLOAD) is None
    assert layer.workloads(DEVICE) == [WORKLOAD.key]
    keys = [(profile.device.key, profile.workload) for profile in (here, there)]
    assert layer.keys() == sorted(keys)


def test_an_url_s_colon_separates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """AUTOCHUNK_PROFILES is a list like PATH, in which URLs stay whole."""
    parts = [
        "/a/b.json",
        "https://host/c.json",
        "s3://bucket/d.json",
        "http://localhost:8000/f.json",
        "github://org:repo@main/g.json",
        "s3://h",
        "/i",
        "~/e",
        "j",
    ]
    monkeypatch.setenv("AUTOCHUNK_PROFILES", os.pathsep.join(parts))
    named = [place for kind, place in places.places(None) if kind == "AUTOCHUNK_PROFILES"]
    assert named == [*parts[:7], str(Path.home() / "e"), str(Path.cwd() / "j")]


def test_without_a_home_there_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a user whom the system does not know: "auto" asks the other layers."""
    for name in ("HOME", "XDG_DATA_HOME", "AUTOCHUNK_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    monkeypatch.setenv("AUTOCHUNK_PROFILES", "~/bundles")
    assert [kind for kind, _ in places.places(None)] == ["AUTOCHUNK_PROFILES", "site", "shipped"]


def test_a_site_without_a_folder_is_empty_and_one_that_comes_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few sites have one; its making changes the layer's version."""
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    layer = places.make_layer(layers.SITE, str(places.site_profiles()))
    assert layer.keys() == []
    before = layer.version()
    places.site_profiles().mkdir()
    assert layer.version() != before


def test_a_folder_is_read_again_only_when_it_changed(tmp_path: Path) -> None:
    """The version follows names, times and sizes of the bundles, and none of the other files."""
    layer = make("folder", tmp_path, make_profile())
    before = layer.version()
    assert layer.version() == before
    (tmp_path / "more.json").write_text(bundle.dump([make_profile(make_workload("t=64,k=8"))]))
    assert layer.version() != before


def test_a_damaged_bundle_that_was_named_says_so_every_time(tmp_path: Path) -> None:
    """Whoever names a file by itself wants that one."""
    (tmp_path / "worse.json").write_text("{")
    layer = BundleLayer(str(tmp_path / "worse.json"), "file")
    for _ in range(2):
        with pytest.raises(BundleError, match=r"worse\.json"):
            layer.get(DEVICE, WORKLOAD)


def newer(file: Path) -> None:
    file.write_text(bundle.dump([]).replace('"schema_version": 4', '"schema_version": 99'))


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "empty": Path.touch,
    "cut": lambda file: file.write_text(bundle.dump([make_profile()])[:900]),
    "newer": newer,
    "foreign": lambda file: file.write_text('{"name": "left-pad", "version": "1.0.0"}'),
    "binary": lambda file: file.write_bytes(b"\0\5\x16\7\xff"),
    "too large": lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 2**30),
    "dangling link": lambda file: file.symlink_to("nowhere"),
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        *((harm, "z.json") for harm in BAD_FILES),
        *(("foreign", name) for name in ("._x.json", "0.json.gz", "esc\x1b[31m.json")),
    ],
)
def test_one_bad_file_leaves_the_others_of_a_folder_usable(
    harm: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told once, by its name; one that is good again answers again."""
    make("folder", tmp_path, make_profile())
    BAD_FILES[harm](tmp_path / name)
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(tmp_path))
    with pytest.warns(StoreWarning) as caught:
        found = [resolve(one, device=DEVICE) for one in (WORKLOAD, make_workload("t=9,k=2"))]
    assert found[0].match == "exact"
    (told,) = (str(one.message) for one in caught)
    assert "leaves out a file of" in told
    assert one_line(name) in told
    assert told.isprintable()


def test_a_file_that_is_taken_out_meanwhile_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever replaces a folder's files does not have others warned."""
    layer = make("folder", tmp_path, make_profile())
    files = BundleLayer._files
    gone = str(tmp_path / "gone.json")
    monkeypatch.setattr(BundleLayer, "_files", lambda self: [*files(self), gone])
    assert layer.get(DEVICE, WORKLOAD) == make_profile()
    assert left_out(layer) == []


def test_a_damaged_profile_does_not_hide_another_file_s(tmp_path: Path) -> None:
    """The last file by name has it, and cannot be read; the one before answers."""
    layer = make("folder", tmp_path, make_profile())
    text = bundle.dump([make_profile()])
    (tmp_path / "z.json").write_text(text.replace('"complete": true', '"complete": false'))
    assert layer.get(DEVICE, WORKLOAD) == make_profile()
    assert [str(error).split(":")[0] for error in left_out(layer)] == [str(tmp_path / "z.json")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    """It is not an empty one."""
    (tmp_path / "locked").mkdir()
    layer = make("folder", tmp_path / "locked", make_profile())
    (tmp_path / "locked").chmod(0)
    with pytest.raises(BundleError, match="Permission denied"):
        layer.get(DEVICE, WORKLOAD)


LONGER = make_profile(make_workload("b=2,t=2048,s=1024,h=8,k=64"))
SHORT = make_profile(make_workload("t=1,k=8"))
H100 = make_device(platform="gpu", kind="NVIDIA H100", cores=0, memory_gib=80)


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ([], "empty"),
        ([make_profile()], "1 profiles, 1 of them of this device, and of this workload"),
        (
            [LONGER, SHORT],
            "2 profiles, 2 of them of this device; the nearest differs in t (2048, asked was 1024)",
        ),
        (
            [make_profile(device=make_device(cores=2))],
            "1 profiles, 0 of them of this device; this workload on a device that differs in "
            "cores (2, asked was 4)",
        ),
        (
            [make_profile(device=H100)],
            "this workload on a device that differs in platform (gpu, asked was cpu), kind "
            "(NVIDIA H100, asked was Made/Up), memory (~80GiB, asked was none)",
        ),
    ],
)
def test_account_names_the_fields_that_differ(
    profiles: list[Profile], words: str, tmp_path: Path
) -> None:
    """Why a layer did not answer, in terms of what was asked."""
    assert words in account(make("file", tmp_path, *profiles), DEVICE, WORKLOAD)


def test_account_of_a_damaged_layer(tmp_path: Path) -> None:
    """Says what is wrong instead of failing."""
    (tmp_path / "bad.json").write_text("[")
    layer = BundleLayer(str(tmp_path / "bad.json"), "file")
    assert account(layer, DEVICE, WORKLOAD).startswith("cannot be read: ")


FOLDER = places.shipped_profiles()
SHIPPED = sorted(FOLDER.glob("*.json*"))


def test_profiles_are_shipped() -> None:
    """For some devices at least, with a table of what each chooses."""
    assert SHIPPED
    table = (FOLDER / "README.md").read_text().splitlines()
    for file in SHIPPED:
        console = Console(width=1000, record=True, file=io.StringIO())
        rows = [profile_row(profile) for profile in bundle.read(file).profiles]
        console.print(profile_table(rows, markdown=True))
        lines = map(str.rstrip, console.export_text().splitlines())
        assert [line for line in lines if line and line not in table] == []


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_bundles_are_sound(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of one device each, as `autochunk export` writes them.

    Whoever has that device gets each profile's own choice, never slower than dense; libraries that
    some were measured without are not there.
    """
    monkeypatch.setattr("autochunk.implementations._is_installed", lambda _: False)
    monkeypatch.setattr(places, "shipped_profiles", lambda: FOLDER)
    found = bundle.read(file)
    note = found.provenance.note if found.provenance else ""
    text = files.fetch(file).decode()
    # But for the version that wrote it. On the very CPU that older versions measured, its kind is
    # read as today's.
    dumped = bundle.dump(found.profiles, note).splitlines()
    changed = [one for one in dumped if one not in set(text.splitlines())]
    written = f'  "autochunk": "{autochunk.__version__}",'
    assert changed in ([], [written]) or (host.former_cpu_kind() or "-") in text
    assert len({profile.device.key for profile in found.profiles}) == 1
    for profile in found.profiles:
        answer = resolve(profile.parsed_workload(), device=profile.device)
        choice, dense = profile.choose(), profile.baseline(DENSE)
        assert choice is not None
        assert answer.layer == f"shipped {FOLDER}"
        assert (answer.match, answer.plan, answer.stale) == ("exact", choice.plan, ())
        assert dense is None or slower_by(choice.measurement, dense) <= 0
