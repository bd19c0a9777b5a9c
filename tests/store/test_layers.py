"""Layers: where profiles come from, and what each of them says that it has."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import pytest
from factories import make_device, make_profile, make_workload
from rich.console import Console

from autochunk import report
from autochunk.errors import BundleError
from autochunk.store import bundle, layers
from autochunk.store.database import ProfileStore
from autochunk.store.layers import BundleLayer, Layer, MemoryLayer, StoreLayer, account, places
from autochunk.store.profile import DENSE, Profile, slower_by
from autochunk.store.resolve import resolve

DEVICE, WORKLOAD = make_device(), make_workload()


def make(kind: str, folder: Path, *profiles: Profile) -> Layer:
    """A layer of each kind with these profiles."""
    text = bundle.dump(profiles)
    if kind == "store":
        ProfileStore(folder / "store.sqlite").put_all(profiles)
        return StoreLayer(folder / "store.sqlite")
    if kind == "memory":
        return MemoryLayer("memory", profiles)
    if kind == "url":
        fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
        fsspec.filesystem("memory").pipe_file(f"{folder}/bundle.json", text.encode())
        return BundleLayer(f"memory:/{folder}/bundle.json", "url")
    (folder / "bundle.json").write_text(text)
    (folder / "bundle.json.gz").write_bytes(gzip.compress(text.encode()))
    return BundleLayer(
        str(
            {"folder": folder, "file": folder / "bundle.json", "gzip": folder / "bundle.json.gz"}[
                kind
            ]
        ),
        kind,
    )


@pytest.mark.parametrize("kind", ["store", "file", "gzip", "folder", "url", "memory"])
def test_every_kind_of_layer_answers_alike(kind: str, tmp_path: Path) -> None:
    """The exact profile, the workloads of a device, and all keys."""
    here, there = (
        make_profile(),
        make_profile(
            "attention:" + make_workload("t=64,k=8").key.removeprefix("attention:"),
            make_device(kind="Another/Kind"),
        ),
    )
    layer = make(kind, tmp_path, here, there)
    assert layer.get(DEVICE, WORKLOAD) == here
    assert layer.get(there.device, WORKLOAD) is None
    assert layer.workloads(DEVICE) == [WORKLOAD.key]
    assert layer.keys() == sorted(
        (profile.device.key, profile.workload) for profile in (here, there)
    )


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
    named = [place for kind, place in places(None) if kind == "AUTOCHUNK_PROFILES"]
    assert named == [*parts[:7], str(Path.home() / "e"), str(Path.cwd() / "j")]


def test_without_a_home_there_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a user whom the system does not know: "auto" asks the other layers."""
    for name in ("HOME", "XDG_DATA_HOME", "AUTOCHUNK_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    monkeypatch.setenv("AUTOCHUNK_PROFILES", "~/bundles")
    assert [kind for kind, _ in layers.places(None)] == ["AUTOCHUNK_PROFILES", "site", "shipped"]


def test_a_site_without_a_folder_is_empty_and_one_that_comes_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few sites have one; its making changes the layer's version."""
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    layer = layers.make_layer(layers.SITE, str(layers.site_profiles()))
    assert layer.keys() == []
    before = layer.version()
    layers.site_profiles().mkdir()
    assert layer.version() != before


def test_a_folder_is_read_again_only_when_it_changed(tmp_path: Path) -> None:
    """The version follows names, times and sizes of the bundles, and none of the other files."""
    layer = make("folder", tmp_path, make_profile())
    before = layer.version()
    assert layer.version() == before
    (tmp_path / "more.json").write_text(bundle.dump([make_profile(make_workload("t=64,k=8"))]))
    assert layer.version() != before


def test_a_layer_with_a_damaged_bundle_says_so_every_time(tmp_path: Path) -> None:
    """Half a layer must not answer."""
    layer = make("folder", tmp_path, make_profile())
    (tmp_path / "worse.json").write_text("{")
    for _ in range(2):
        with pytest.raises(BundleError, match=r"worse\.json"):
            layer.get(DEVICE, WORKLOAD)


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ([], "empty"),
        ([make_profile()], "1 profiles, 1 of them of this device, and of this workload"),
        (
            [
                make_profile(make_workload("b=2,t=2048,s=1024,h=8,k=64")),
                make_profile(make_workload("t=1,k=8")),
            ],
            "2 profiles, 2 of them of this device; the nearest differs in t (2048, asked was 1024)",
        ),
        (
            [make_profile(device=make_device(cores=2))],
            "1 profiles, 0 of them of this device; this workload on a device that differs in "
            "cores (2, asked was 4)",
        ),
        (
            [
                make_profile(
                    device=make_device(platform="gpu", kind="NVIDIA H100", cores=0, memory_gib=80)
                )
            ],
            "this workload on a device that differs in platform (gpu, asked was cpu), kind "
            "(NVIDIA H100, asked was Made/Up), memory (80GiB, asked was 8GiB)",
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
    assert account(BundleLayer(str(tmp_path / "bad.json"), "file"), DEVICE, WORKLOAD).startswith(
        "cannot be read: "
    )


FOLDER = layers.shipped_profiles()
SHIPPED = sorted(FOLDER.glob("*.json*"))


def test_profiles_are_shipped() -> None:
    """For some devices at least, with a table of what each chooses."""
    assert SHIPPED
    table = (FOLDER / "README.md").read_text().splitlines()
    for file in SHIPPED:
        console = Console(width=1000, record=True, file=io.StringIO())
        console.print(
            report.profile_table(
                [report.profile_row(profile) for profile in bundle.read(file).profiles],
                markdown=True,
            )
        )
        assert [
            line
            for line in map(str.rstrip, console.export_text().splitlines())
            if line and line not in table
        ] == []


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_bundles_are_sound(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of one device each, as `autochunk export` writes them.

    Whoever has that device gets each profile's own choice, never slower than dense.
    """
    monkeypatch.setattr(layers, "shipped_profiles", lambda: FOLDER)
    found = bundle.read(file)
    assert (
        bundle.dump(found.profiles, found.provenance.note if found.provenance else "")
        == bundle.fetch(file).decode()
    )
    assert len({profile.device.key for profile in found.profiles}) == 1
    for profile in found.profiles:
        answer, choice, dense = (
            resolve(profile.parsed_workload(), device=profile.device),
            profile.choose(),
            profile.baseline(DENSE),
        )
        assert choice is not None
        assert answer.layer == f"shipped {FOLDER}"
        assert (answer.match, answer.plan, answer.stale) == ("exact", choice.plan, ())
        assert dense is None or slower_by(choice.measurement, dense) <= 0
