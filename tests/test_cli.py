"""The command line: every command, its output for people and for scripts, and its errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autochunk.cli import main
from autochunk.store.database import ProfileStore

README = Path(__file__).resolve().parent.parent / "README.md"
SHAPE = "b=2,t=64,h=2,k=8"


def call(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


@pytest.fixture
def tuned() -> list[dict[str, Any]]:
    """Rows of a store with one small workload, really tuned, forward."""
    result = call("tune", "--shape", SHAPE, "--mode", "forward", "--effort", "quick", "--json")
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def test_tune_show_explain_export_import_bench(tuned: list[dict[str, Any]], tmp_path: Path) -> None:
    """The whole road by commands: what tune prints is what show lists, explain answers with, and export and import carry over."""
    (row,) = tuned
    assert row["complete"]
    assert row["speedup_vs_dense"] > 0
    assert json.loads(call("show", "--json").stdout) == tuned
    assert row["shape"] in call("show").stdout

    (answer,) = json.loads(call("explain", "--shape", SHAPE, "--mode", "forward", "--json").stdout)
    assert (answer["match"], answer["implementation"], answer["max_chunk_size_mb"]) == ("exact", row["implementation"], row["max_chunk_size_mb"])
    assert "because" in call("explain", "--shape", SHAPE, "--mode", "forward").stdout

    bundle = tmp_path / "profiles.json"
    assert call("export", str(bundle)).exit_code == 0
    assert call("export", "-").stdout == bundle.read_text()
    other = str(tmp_path / "other.sqlite")
    assert "1 new, 0 updated, 0 kept" in call("import", "--store", other, str(bundle)).stderr
    assert "0 new, 0 updated, 1 kept" in call("import", "--store", other, "-", stdin=bundle.read_bytes()).stderr
    assert json.loads(call("show", "--store", other, "--json").stdout) == tuned

    (compared,) = json.loads(call("bench", "--rounds", "2", "--json").stdout)
    names = [contender["name"] for contender in compared["contenders"]]
    assert names[:3] == ["haiku dense", "1000 MB", "auto"]
    assert "(exact)" in compared["contenders"][2]["detail"]
    assert compared["contenders"][0]["ratio"] == 1.0


def test_show_and_explain_without_profiles() -> None:
    """Nothing stored is no error, and says what to do."""
    assert "`autochunk tune` makes some" in call("show").stdout
    assert json.loads(call("show", "--json").stdout) == []
    answer = call("explain", "--shape", SHAPE, "--mode", "training").stdout
    assert f"autochunk tune --shape {'b=2,t=64,s=64,h=2,k=8'} --dtype float32 --mode training" in answer
    assert "1000" in answer


def test_missed_workloads_are_tuned() -> None:
    """What a model missed is what --missed measures; afterwards nothing is missed."""
    import jax.numpy as jnp

    import autochunk
    from autochunk.errors import MissWarning

    x = jnp.ones((1, 24, 2, 4))
    with pytest.warns(MissWarning):
        autochunk.dot_product_attention(x, x, x)
    (row,) = json.loads(call("tune", "--missed", "--effort", "quick", "--json").stdout)
    assert row["shape"] == "b=1,t=24,s=24,h=2,k=4"
    assert row["mode"] == "forward"
    again = call("tune", "--missed")
    assert again.exit_code == 0
    assert "missed nothing" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune", "--shape", "b=1,q=3"], "'q=3' is not an item of a shape"),
        (["tune", "--shape", "t=0,k=1"], "t='0'|t=0"),
        (["tune", "--shape", "t=8,k=8", "--timeout", "-1"], "timeout must be a positive finite number of seconds"),
        (["tune", "--shape", "t=8,k=8", "--timeout", "nan"], "timeout must be"),
        (["tune", "--effort", "heroic"], "heroic"),
        (["tune", "--preset", "nope"], "nope"),
        (["explain"], "--shape"),
        (["explain", "--shape", SHAPE, "--implementation", "fast"], "implementation must be None or one of"),
        (["explain", "--shape", SHAPE, "--memory-budget-mb", "-3"], "must be a positive finite number"),
        (["bench"], "the store has no profile of this machine"),
        (["import", "/nonexistent/bundle.json"], "No such file"),
    ],
)
def test_bad_arguments_are_told_in_a_line(arguments: list[str], words: str) -> None:
    """A clear message and a failing exit status; never a traceback."""
    result = call(*arguments)
    assert result.exit_code in (1, 2)
    assert re.search(words, result.stderr), result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 2, "profiles": []}', b'{"schema_version": 1}', b"\xff\xfe", b"[" * 10**6])
def test_importing_what_is_no_bundle_changes_nothing(content: bytes, tuned: list[dict[str, Any]]) -> None:
    """One line of error, and the store as it was."""
    result = call("import", "-", stdin=content)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert json.loads(call("show", "--json").stdout) == tuned


def damage() -> Path:
    path = ProfileStore().path
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 1000)
    return path


@pytest.mark.parametrize("command", [["show"], ["tune", "--shape", SHAPE], ["export", "-"], ["import", "-"]])
def test_a_damaged_store_is_told_and_left_alone(command: list[str]) -> None:
    """The message names the file and the cure; the file is not touched."""
    path = damage()
    result = call(*command, stdin=b'{"schema_version": 1, "profiles": []}')
    assert result.exit_code == 1, result.output
    assert str(path) in result.stderr
    assert "AUTOCHUNK_STORE" in result.stderr
    assert path.read_bytes() == b"this is no database" * 1000


def test_explain_goes_on_without_a_damaged_store() -> None:
    """For looking up, a damaged layer is left out with a warning."""
    from autochunk.errors import StoreWarning

    damage()
    with pytest.warns(StoreWarning):
        result = call("explain", "--shape", SHAPE, "--mode", "forward")
    assert result.exit_code == 0
    assert "left out" in result.stdout


def test_ctrl_c_ends_at_once_and_says_how_to_go_on() -> None:
    """SIGINT to a tune in progress: exit status 130 within seconds, and the hint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "autochunk.cli", "tune", "--shape", "b=4,t=1024,h=8,k=64", "--effort", "thorough"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "1/" in line and "MB:" in line:
            break
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - asked < 20
    assert "the same command goes on" in rest
    assert "Traceback" not in rest
    (profile,) = ProfileStore().profiles()
    assert not profile.complete


def test_every_command_and_effort_is_in_the_readme() -> None:
    """A command that README does not name is one that nobody finds."""
    text = README.read_text()
    for name, command in main.commands.items():
        assert f"autochunk {name}" in text
        assert command.help
    assert all(option in text for option in ("--missed", "--effort", "--timeout", "--json", "--preset", "AUTOCHUNK_STORE", "AUTOCHUNK_PROFILES"))


def test_the_installed_command_runs() -> None:
    """The entry point of the package."""
    command = Path(sys.executable).with_name("autochunk")
    if not command.exists():
        pytest.skip("the package is not installed beside this interpreter")
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert "autochunk" in done.stdout
