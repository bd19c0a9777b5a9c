"""What XLA tries out for a GPU is kept between measuring processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from factories import Scripted

from autochunk import nvidia
from autochunk.tuner import autotuning
from autochunk.tuner.probe import Probe


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder for what can be made again, on a machine with a GPU."""
    monkeypatch.setattr(nvidia, "gpu_uuids", lambda: {"0": "GPU-0"})
    monkeypatch.setattr("platformdirs.user_cache_path", tmp_path.joinpath)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return tmp_path


@pytest.mark.parametrize("own", ["", "--xla_gpu_autotune_level=4"])
def test_the_folder_is_made_and_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    """For this version of jaxlib, beside the flags that the user has."""
    monkeypatch.setenv("XLA_FLAGS", own)
    flags = autotuning.environment()["XLA_FLAGS"].split()
    *others, flag = flags
    assert others == own.split()
    folder = Path(flag.partition("=")[2])
    assert folder.is_dir()
    assert folder.is_relative_to(cache)
    assert autotuning.environment() == {"XLA_FLAGS": " ".join(flags)}


def test_there_are_no_flags_without_a_gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a folder made."""
    monkeypatch.setattr(nvidia, "gpu_uuids", dict)
    assert autotuning.environment() == {}
    assert list(cache.iterdir()) == []


def test_what_the_user_says_of_it_stands(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user's own is not exchanged."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_per_fusion_autotune_cache_dir=/elsewhere")
    assert autotuning.environment() == {}


def test_where_no_folder_can_be_made(cache: Path) -> None:
    """Processes start without; they take longer."""
    (cache / "autochunk").write_text("no folder")
    assert autotuning.environment() == {}


def test_an_xla_that_does_not_know_the_flag(
    monkeypatch: pytest.MonkeyPatch, scripted: Scripted
) -> None:
    """It ends its process; another is started without."""
    monkeypatch.setattr(autotuning, "environment", lambda: {"XLA_FLAGS": "--unknown"})
    check = (
        "import os, runpy, sys\n"
        "if '--unknown' in os.environ.get('XLA_FLAGS', ''): sys.exit('Unknown flag in XLA_FLAGS')\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = scripted()
    with Probe((sys.executable, "-c", check, *script[1:])) as probe:
        assert probe.connect().kind == "scripted"
