"""The command line: every command, its output for people and for scripts, and its errors."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from click.testing import CliRunner, Result
from factories import (
    make_call,
    make_device,
    make_function_profile,
    make_measurement,
    make_profile,
    make_workload,
    one_plan,
)
from rich.console import Console

import autochunk
from autochunk.cli import main
from autochunk.device import detect
from autochunk.errors import StaleWarning
from autochunk.report import TuneProgress
from autochunk.store import bundle, files
from autochunk.store.profile import Profile, utc_now
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.events import (
    Event,
    Failed,
    LeftOut,
    OtherWork,
    OutOfTime,
    SharedGpu,
    SlowedGpu,
)
from autochunk.workload import Workload

README = Path(__file__).resolve().parent.parent / "README.md"
SHAPE = "b=2,t=64,h=2,k=8"
PLACE = (make_workload(SHAPE), 1, 2)
MANY = tuple(make_workload(f"t={length},k=8") for length in (64, 72, 80))


def call(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


@pytest.fixture(scope="module")
def tuned_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Profile], str]:
    """The profiles of one small workload, really tuned, forward; what the command printed."""
    path = tmp_path_factory.mktemp("tuned") / "profiles.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCHUNK_STORE", str(path))
        result = call("tune", "--shape", SHAPE, "--mode", "forward", "--effort", "quick", "--json")
    assert result.exit_code == 0, result.output
    return ProfileStore(path).profiles(), result.stdout


@pytest.fixture
def tuned(tuned_once: tuple[list[Profile], str]) -> list[dict[str, Any]]:
    """Rows of a store of this test's own with what was tuned."""
    profiles, printed = tuned_once
    ProfileStore().put_all(profiles)
    rows: list[dict[str, Any]] = json.loads(printed)
    return rows


SMALL = f"--shape {SHAPE} --mode forward"
COMMANDS = {
    "show": "show",
    "show --memory": "show --memory",
    "show --plot": "show --plot mode=forward",
    "explain": f"explain {SMALL}",
    "explain --function": "explain --function rtl",
    "evaluate": "evaluate",
    "report": "report --from bundle.json --against bundle.json",
    "export": "export -",
    "import": "import --dry-run bundle.json",
    "forget": "forget --older-than 0 --yes",
    "tune": f"tune {SMALL} --effort quick --force",
    "bench": f"bench {SMALL} --rounds 2",
}


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, and a store, that have profiles of this device and of another."""
    shapes = (SHAPE, "b=2,t=128,h=2,k=8", "b=2,t=256,h=2,k=8")
    devices = (detect(), make_device(kind="\u00fcn\u00ef \u2713"))
    profiles = [make_profile(make_workload(one), device) for one in shapes for device in devices]
    named = make_call(name="\u202ertl\u2713")  # its first character turns what follows around
    profiles += [make_function_profile(named, device=device) for device in devices]
    ProfileStore().put_all(profiles)
    files.write(tmp_path / "bundle.json", bundle.dump(profiles))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(line: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "autochunk.cli", *line.split()]
    pipe = subprocess.PIPE
    env = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, errors="replace")


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_no_character_ends_a_command(line: str, filled: Path) -> None:
    """Where the output is to be ASCII, what that has not is spelt or escaped."""
    result = CliRunner(charset="ascii").invoke(main, line.split())
    assert result.exit_code == 0, result.output
    assert result.output.isascii()
    if line in ("show", COMMANDS["tune"]):
        assert "+-" in result.stdout


def test_a_process_with_ascii_output_shows_profiles(filled: Path) -> None:
    """As in a container without a locale."""
    with start("show", PYTHONIOENCODING="ascii", NO_COLOR="1") as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "+-0.0%" in out
    assert r"\xfcn\xef" in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
@pytest.mark.parametrize("line", ["show", "export -", COMMANDS["tune"], "report -"])
def test_output_that_cannot_be_written_is_told_in_a_line(line: str, filled: Path) -> None:
    """A full disk under it; what was measured is kept."""
    command = [sys.executable, "-m", "autochunk.cli", *line.split()]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, check=False, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: the output cannot be written: No space left on device"
    )
    assert "Traceback" not in done.stderr
    assert len(ProfileStore().profiles()) == 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
def test_a_log_on_a_full_disk_does_not_end_a_tune(filled: Path) -> None:
    """Nothing can be told of it, and all of it is measured."""
    command = [sys.executable, "-m", "autochunk.cli", *COMMANDS["tune"].split()]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=full, text=True, timeout=120
        )
    assert done.returncode == 0
    assert SHAPE.split(",h", maxsplit=1)[0] in done.stdout


@pytest.mark.parametrize("line", ["show", "show --json"])
def test_who_reads_a_line_and_goes_ends_a_command_quietly(line: str, filled: Path) -> None:
    """As `| head -1` does: no traceback, no message."""
    with start(line) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) == 1


@pytest.mark.parametrize(
    ("line", "status"),
    [("import - <&-", 1), ("forget --older-than 0 <&-", 1), ("show >&- 2>&-", 0)],
)
def test_streams_that_are_closed(line: str, status: int, filled: Path) -> None:
    """They are from and to nowhere."""
    command = f"{shlex.quote(sys.executable)} -m autochunk.cli {line}"
    done = subprocess.run(
        ["sh", "-c", command], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_narrow_terminals_show_whole_words(
    columns: int, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row is a block of lines where there is no room for a table."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "50")  # else Rich takes any dumb terminal for one of 80 columns
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    for line in ("show", "show --memory", "evaluate"):
        out = call(*line.split()).stdout
        assert max(map(len, out.splitlines())) <= columns
        if columns == 40:
            assert "forward" in out.split() or line == "evaluate"
            assert "\u2026" not in out


HOSTILE = "\x1b[31mred\x1b]0;title\a\x9b2J\u202e[bold]x[/x] :smile:"


def test_nothing_in_a_bundle_reaches_a_terminal_but_text(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escape sequences are escaped, brackets and colons no markup; in warnings, too."""
    here = detect().model_copy(update={"jaxlib": f"0.0.1{HOSTILE}", "driver": HOSTILE})
    there = make_device(kind="evil\x9b31m\u202egpu[/x] :smile:", jaxlib=HOSTILE)
    plans = [make_measurement("xla", 16.0, 0.5), make_measurement("dense", None, detail=HOSTILE)]
    plans.append(make_measurement("xla", 2.0, status="crashed", detail=HOSTILE))
    shapes = ("t=64,k=8", "t=128,k=8", "t=256,k=8")
    profiles = [
        make_profile(make_workload(shape), device, plans, autochunk=HOSTILE)
        for shape in shapes
        for device in (here, there)
    ]
    files.write("hostile.json", bundle.dump(profiles))
    monkeypatch.setenv("AUTOCHUNK_PROFILES", "hostile.json")
    for line in (
        *("show hostile.json", "show hostile.json --memory", "evaluate hostile.json"),
        *("explain --shape t=64,k=8 --mode forward", "import hostile.json"),
        *("show", "forget --older-than 0 --yes"),
    ):
        result = call(*line.split())
        assert isinstance(result.exception, SystemExit | None), line
        assert result.output.replace("\n", "").isprintable(), line
    told = call("explain", "--shape", "t=64,k=8", "--mode", "forward").stdout
    assert r"crashed: \x1b[31mred\x1b]0;title" in told
    assert "[bold]x[/x] :smile:" in told
    x = jnp.ones((1, 64, 1, 8))
    with pytest.warns(StaleWarning, match=r"0\.0\.1\\x1b\[31mred\\x1b\]0;title\\x07\\x9b2J\\u202e"):
        autochunk.dot_product_attention(x, x, x)


def test_tune_show_explain_export_import_bench(tuned: list[dict[str, Any]], tmp_path: Path) -> None:
    """The whole road by commands.

    What tune prints is what show lists, explain answers with, and export and import carry over.
    """
    (row,) = tuned
    assert row["complete"]
    assert row["speedup_vs_dense"] > 0
    assert json.loads(call("show", "--json").stdout) == tuned
    assert row["shape"] in call("show").stdout
    memory = json.loads(call("show", "--memory", "--json").stdout)
    assert row["plan"] in [plan["plan"] for plan in memory]
    assert all(plan["predicted_bytes"] > 0 for plan in memory)
    assert "measured / predicted" in call("show", "--memory").stdout

    (answer,) = json.loads(call("explain", "--shape", SHAPE, "--mode", "forward", "--json").stdout)
    assert answer["match"] == "exact"
    for name in ("implementation", "max_chunk_size_mb"):
        assert answer[name] == row[name]
    assert answer["within"] == row["within"]
    assert "because" in call("explain", "--shape", SHAPE, "--mode", "forward").stdout

    file = tmp_path / "profiles.json"
    assert call("export", str(file)).exit_code == 0
    assert call("export", "-").stdout == file.read_text()
    other = str(tmp_path / "other.sqlite")
    counts = "0 newer, 0 older, 0 conflicting"
    told = call("import", "--dry-run", "--store", other, str(file)).stdout
    assert f"1 new, 0 same, {counts}. 1 of 1 profiles would be stored." in told
    assert not Path(other).exists()
    told = call("import", "--store", other, str(file)).stdout
    assert f"1 new, 0 same, {counts}. 1 of 1 profiles were stored." in told
    told = call("import", "--store", other, "-", stdin=file.read_bytes()).stdout
    assert f"0 new, 1 same, {counts}. 0 of 1 profiles were stored." in told
    assert json.loads(call("show", "--store", other, "--json").stdout) == tuned

    (compared,) = json.loads(call("bench", "--rounds", "2", "--json").stdout)
    names = [contender["name"] for contender in compared["contenders"]]
    assert names[:3] == ["haiku dense", "1000 MB", "auto"]
    assert "(exact)" in compared["contenders"][2]["detail"]
    assert compared["contenders"][0]["ratio"] == 1.0


@pytest.mark.parametrize(
    ("shapes", "options", "status", "words"),
    [
        (["t=64,k=8"], [], 0, ""),
        (["t=64,k=8", "t=2048,k=8"], ["--memory-budget-mb", "0.1"], 3, "1 of 2 workloads were not"),
        (["t=2048,k=8"], ["--memory-budget-mb", "0.01"], 1, "1 of 1 workloads were not measured"),
    ],
    ids=["all", "partly", "none"],
)
def test_status_tells_how_much_was_measured(
    shapes: list[str], options: list[str], status: int, words: str
) -> None:
    """0 for all, 3 for some, 1 for none: for scripts and schedulers."""
    named = [part for shape in shapes for part in ("--shape", shape)]
    result = call("tune", *named, "--mode", "forward", "--effort", "quick", *options)
    assert result.exit_code == status, result.output
    assert words in result.stderr


def test_status_tells_of_functions_that_were_not_measured() -> None:
    """One that left no program is not measured, and not taken for one that was not missed."""
    ProfileStore().record_miss(detect(), make_call())
    result = call("tune", "--missed", "--effort", "quick")
    assert result.exit_code == 1, result.output
    assert "left no program" in result.stderr
    assert "1 of 1 workloads were not measured" in result.stderr
    assert "missed nothing" not in result.stderr


@pytest.mark.parametrize("above", ["/proc", "/dev/null"])
def test_a_store_that_cannot_be_made_is_told(above: str) -> None:
    """It is empty, and will stay so."""
    store = ["--store", f"{above}/none/store.sqlite"]
    shown = call("show", *store)
    assert shown.exit_code == 0
    assert f"cannot be made ({above} " in shown.stdout
    assert json.loads(call("show", *store, "--json").stdout) == []
    assert f"cannot be made: {above} " in call("explain", "--shape", SHAPE, *store).stdout


def test_import_says_what_answers_here(tmp_path: Path) -> None:
    """How many, and in which fields the devices of the others differ from this."""
    here = detect()
    devices = [here.model_copy(update={"cores": here.cores + 1}), make_device(), make_device(
        platform="gpu", kind="NVIDIA H100", cores=0, memory_gib=80)]  # fmt: skip
    file, both = tmp_path / "others.json", tmp_path / "both.json"
    file.write_text(bundle.dump([make_profile(device=device) for device in devices]))
    both.write_text(bundle.dump([make_profile(device=device) for device in (here, devices[0])]))
    told = call("import", "--dry-run", str(file)).stdout.replace("\n", " ")
    assert f"None of them answers on this device, {here.key}." in told
    assert f"1 of a device that differs in cores ({here.cores + 1}, here {here.cores})" in told
    assert "kind (Made/Up, here" in told
    assert "1 of a device that differs in platform (gpu, here cpu), kind (NVIDIA H100, " in told
    assert "1 of them answers on this device" in call("import", str(both)).stdout
    records = json.loads(call("import", "--json", str(both)).stdout)
    assert sorted(record["answers_here"] for record in records) == [False, True]


def test_show_and_explain_without_profiles() -> None:
    """Nothing stored is no error, and says what to do."""
    assert "`autochunk tune` makes some" in call("show").stdout
    assert json.loads(call("show", "--json").stdout) == []
    answer = call("explain", "--shape", SHAPE, "--mode", "training").stdout
    assert "autochunk tune --shape b=2,t=64,s=64,h=2,k=8 --dtype float32 --mode training" in answer
    assert "no profile: slices of a usual size" in answer


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
    ("line", "words"),
    [
        ("tune --shape b=1,q=3", "'q=3' is not an item of a shape"),
        ("tune --shape t=0,k=1", "t='0'|t=0"),
        (
            "tune --shape t=8,k=8 --timeout=-1",
            "timeout must be a positive finite number of seconds",
        ),
        ("tune --shape t=8,k=8 --timeout nan", "timeout must be"),
        ("tune --effort heroic", "heroic"),
        ("tune --preset nope", "nope"),
        ("explain", "--shape"),
        (f"explain --shape {SHAPE} --implementation fast", "implementation must be None or one of"),
        (f"explain --shape {SHAPE} --memory-budget-mb -3", "must be a positive finite number"),
        ("bench", "the store has no such profile of this machine"),
        ("import /nonexistent/bundle.json", "No such file"),
    ],
)
def test_bad_arguments_are_told_in_a_line(line: str, words: str) -> None:
    """A clear message and a failing exit status; never a traceback."""
    result = call(*line.split())
    assert result.exit_code in (1, 2)
    assert re.search(words, result.stderr), result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff\xfe", b"[" * 10**6),
        *(b'{"schema_version": 1}', b'{"schema_version": 2, "profiles": []}'),
    ],
    ids=range(
        7
    ),  # pytest hands an id to every process that a test starts; a million bytes are many
)
def test_importing_what_is_no_bundle_changes_nothing(
    content: bytes, tuned: list[dict[str, Any]]
) -> None:
    """One line of error, and the store as it was."""
    result = call("import", "-", stdin=content)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert json.loads(call("show", "--json").stdout) == tuned


def test_import_says_what_it_does_with_each_profile(tmp_path: Path) -> None:
    """What differs from the store's is listed with what decided.

    --prefer decides otherwise; --json is for scripts.
    """
    mine = make_profile(created="2026-01-01T00:00:00Z")
    theirs = make_profile(created="2026-02-01T00:00:00Z", effort="quick")
    ProfileStore().put(mine)
    file = tmp_path / "theirs.json.gz"
    files.write(file, bundle.dump([theirs]))
    kept = call("import", str(file)).stdout
    assert "left out" in kept
    assert "effort is quick in the bundle and standard in the store" in kept
    assert ProfileStore().profiles() == [mine]
    (record,) = json.loads(call("import", "--prefer", "newest", "--json", str(file)).stdout)
    assert (record["relation"], record["taken"]) == ("newer", True)
    assert ProfileStore().profiles() == [theirs]


@pytest.mark.parametrize("filters", [["--device", "no such"], ["--shape", "t=7"]], ids=" ".join)
def test_export_of_nothing_writes_nothing(filters: list[str], tmp_path: Path) -> None:
    """A filter with a slip in it must not replace a good bundle with an empty one."""
    ProfileStore().put(make_profile())
    file = tmp_path / "b.json"
    file.write_text("as it was")
    result = call("export", str(file), *filters)
    assert result.exit_code == 1
    assert "none of the 1 profiles passes these filters, and nothing was written" in result.stderr
    assert file.read_text() == "as it was"


def test_bench_without_a_shape_heeds_dtype_and_mode() -> None:
    """Of what is stored only that is timed which they name."""
    workloads = [make_workload("t=8,k=2", dtype=dtype) for dtype in ("float32", "bfloat16")]
    ProfileStore().put_all([make_profile(workload, detect()) for workload in workloads])
    results = json.loads(call("bench", "--dtype", "bfloat16", "--rounds", "1", "--json").stdout)
    assert [Workload.parse(result["workload"]).dtype for result in results] == ["bfloat16"]
    assert "no such profile" in call("bench", "--dtype", "float16").stderr


def test_bench_of_plans(tmp_path: Path) -> None:
    """Beside the chosen one those of the profile and of a bundle; only what is tuned here."""
    workload = make_workload("t=8,k=2")
    ProfileStore().put(make_profile(workload, detect()))
    file = tmp_path / "other.json"
    limits = (make_profile(workload, measurements=one_plan(1e-4)), make_profile())
    file.write_text(bundle.dump(limits))
    options = ["--rounds", "2", "--shape", "t=8,h=1,k=2", "--mode", "forward"]
    against = ["--against", str(file), *options, "--json"]
    (record,) = json.loads(call("bench", "--plans", *against).stdout)
    plans = [one["plan"] for one in record["plans"]]
    assert plans[0] == record["chosen"] == "xla, 16 MB"
    assert plans[-1] == "xla, 0.0001 MB"
    assert len(plans) == 5
    (record,) = json.loads(call("bench", *against).stdout)
    assert [one["plan"] for one in record["plans"]] == ["xla, 16 MB", "xla, 0.0001 MB"]
    printed = call("bench", "--in-layer", *options).stdout
    assert "rank correlation with the profile" in printed
    assert "chosen" in printed
    refused = call("bench", "--plans", "--shape", "t=9,k=2", "--mode", "forward")
    assert "Run `autochunk tune` with the same --shape" in refused.stderr


def test_bench_of_memory() -> None:
    """Each plan that was timed, in a process of its own."""
    plans = (make_measurement("dense", None), make_measurement("xla", 0.05))
    ProfileStore().put(make_profile(make_workload("t=512,h=4,k=8"), detect(), plans))
    rows = json.loads(call("bench", "--memory", "--json").stdout)
    assert [row["plan"] for row in rows] == ["dense", "xla, 0.05 MB"]
    dense, sliced = rows
    assert dense["predicted_bytes"] > 4 * sliced["predicted_bytes"]
    if dense["measured_bytes"] is not None:  # where the system tells
        assert dense["measured_bytes"] > 2 * sliced["measured_bytes"]


def test_export_chooses_and_notes(tmp_path: Path) -> None:
    """By device and workload; says how many were left out."""
    here, there = make_profile(), make_profile(device=make_device(kind="Another/Kind"))
    ProfileStore().put_all([here, there])
    options = ["--device", "another", "--shape", "t=1024", "--note", "from the lab"]
    result = call("export", str(tmp_path / "b.json"), *options)
    assert result.exit_code == 0, result.output
    assert "1 profiles exported, 1 left out." in result.stderr
    found = bundle.read(tmp_path / "b.json")
    assert found.profiles == (there,)
    assert found.provenance is not None
    assert found.provenance.note == "from the lab"


def test_export_of_what_machines_tuned_together(tmp_path: Path) -> None:
    """One bundle of a shared storage, whatever this machine's own store has."""
    place, workload = str(tmp_path / "journal"), Workload.parse(SHAPE)
    options = ["--mode", "forward", "--effort", "quick", "--storage", place]
    result = call("tune", "--shape", SHAPE, *options)
    assert result.exit_code == 0, result.output
    ProfileStore().forget(ProfileStore().profiles())
    exported = call("export", "-", "--storage", place)
    assert [profile.workload for profile in bundle.load(exported.stdout).profiles] == [workload.key]


def test_forget_asks_first_and_names_what_goes() -> None:
    """No answer, no deletion; the filters choose; without one it does nothing."""
    old = make_profile(created="2020-01-01T00:00:00Z")
    new = make_profile(make_workload("t=64,k=8"), created=utc_now())
    ProfileStore().put_all([old, new])
    assert call("forget").exit_code == 2
    refused = call("forget", "--older-than", "30", stdin=b"n\n")
    assert old.workload in refused.stderr
    assert new.workload not in refused.stderr
    assert len(ProfileStore().profiles()) == 2
    assert "1 profiles forgotten" in call("forget", "--older-than", "30", stdin=b"y\n").stderr
    assert ProfileStore().profiles() == [new]
    assert "nothing to forget" in call("forget", "--shape", "t=4096", "--yes").stderr
    assert "1 profiles forgotten" in call("forget", "--older-than", "0", "--yes").stderr
    assert ProfileStore().profiles() == []


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (Failed(*PLACE, "no worker", None), "not measured: no worker"),
        (Failed(*PLACE, "no worker", make_profile()), "failed: no worker"),
        (
            OutOfTime(*PLACE, None),
            "not measured: out of time; the same command goes on from here",
        ),
        (
            OutOfTime(*PLACE, None, measured=0),
            "the time was too short for one plan, and nothing is stored; allow more (--timeout)",
        ),
        (
            OutOfTime(*PLACE, make_profile(), measured=0),
            "too short for one plan, and the profile from before stays (standard); allow more",
        ),
        (
            OutOfTime(*PLACE, None, measured=1),
            "out of time with 1 plans measured, too few to choose from, and nothing is stored; "
            "the same command goes on from here",
        ),
        (
            OutOfTime(*PLACE, make_profile(), measured=9),
            "out of time, and the profile from before stays (standard); the same command goes on",
        ),
        (
            OutOfTime(*PLACE, make_profile()),
            "out of time, and the profile from before stays (standard); the same command goes on "
            "from here",
        ),
        (
            LeftOut((*MANY, make_workload("t=9,h=2,k=8,causal=yes,bias=1hts")), (), missed=True),
            "left out for want of time: 3 of float32 forward; 1 of float32 causal=yes bias=1hts "
            "forward; `autochunk tune --missed` goes on from here",
        ),
        (
            LeftOut(MANY, (), missed=False),
            "left out for want of time: 3 of float32 forward; the same command goes on from here",
        ),
        (LeftOut((), MANY, missed=True), '3 that "auto" missed need no measuring'),
        (OtherWork(0.94, 2), "other programs had 0.9 of 2 cores meanwhile: what is close"),
        (SharedGpu(1), "another program had the GPU in use as well: what is close"),
        (SharedGpu(2), "2 programs had the GPU in use as well"),
        (SlowedGpu("power cap", 0.31), "held down for 31% of the time (power cap)"),
    ],
)
def test_progress_says_what_became_of_a_workload(event: Event, words: str) -> None:
    """Not measured is only what nothing is stored of."""
    printed = io.StringIO()
    with TuneProgress(Console(file=printed, width=200)) as progress:
        progress(event)
    assert words in printed.getvalue()


def test_bundles_are_shown(tmp_path: Path) -> None:
    """Before they are imported, as the store is after."""
    profile = make_profile(device=make_device())
    file = tmp_path / "bundle.json"
    file.write_text(bundle.dump([profile], ""))
    ProfileStore().put(profile)
    assert call("show", str(file)).stdout == call("show").stdout
    assert call("show", str(file), "--json").stdout == call("show", "--json").stdout
    lines = call("show", str(file), "--markdown").stdout.splitlines()
    assert f"## {profile.device.key}" in lines
    assert [len(line.split("|")) for line in lines if line.startswith("|")] == [11, 11, 11]
    assert call("show", str(file), "--store", str(tmp_path / "store")).exit_code == 2


def test_missed_workloads_are_forgotten() -> None:
    """What a model missed once, and nobody wants measured, can be thrown away; profiles stay."""
    store = ProfileStore()
    store.record_miss(detect(), make_workload(SHAPE))
    store.put(make_profile(device=make_device()))
    result = call("forget", "--missed", "--yes")
    assert result.exit_code == 0, result.output
    assert make_workload(SHAPE).key in result.stderr
    assert "1 misses forgotten" in result.stderr
    assert not store.missed(detect())
    assert len(store.profiles()) == 1
    assert "nothing to forget" in call("forget", "--missed", "--yes").stderr


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    """What ``tune`` is asked to measure on ``make_device()``, in place of measuring it."""
    asked: list[Workload] = []

    def tune(workloads: Any, **_: Any) -> list[Any]:
        asked.extend(workloads(make_device()).all)
        return []

    monkeypatch.setattr("autochunk.tuner.tune.tune", tune)
    return asked


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (["--missed"], {("float32", "forward"), ("bfloat16", "forward"), ("bfloat16", "training")}),
        (["--missed", "--dtype", "bfloat16"], {("bfloat16", "forward"), ("bfloat16", "training")}),
        (["--missed", "--mode", "forward"], {("float32", "forward"), ("bfloat16", "forward")}),
        (["--stale", "--dtype", "bfloat16", "--mode", "training"], {("bfloat16", "training")}),
        (["--dtype", "bfloat16", "--mode", "training"], {("bfloat16", "training")}),
    ],
)
def test_dtypes_and_modes_hold_for_what_is_stored(
    options: list[str], kinds: set[tuple[str, str]], asked: list[Workload]
) -> None:
    """What was missed or is stale is measured only so far as --dtype and --mode let it through."""
    store, older = ProfileStore(), make_device(jaxlib="0.1.0")
    for dtype, mode in (("float32", "forward"), ("bfloat16", "forward"), ("bfloat16", "training")):
        store.record_miss(make_device(), Workload.parse(SHAPE, dtype=dtype, mode=mode))
        store.put(make_profile(Workload.parse("t=64,k=8", dtype=dtype, mode=mode), older))
    call("tune", *options)
    assert {(workload.dtype, workload.mode) for workload in asked} == kinds


def test_an_interrupted_tune_of_what_is_stale_goes_on(asked: list[Workload]) -> None:
    """It leaves profiles that are no longer stale, and not complete."""
    ProfileStore().put(make_profile(make_workload("t=64,k=8"), make_device(), complete=False))
    ProfileStore().put(make_profile(make_workload("t=72,k=8"), make_device()))
    call("tune", "--stale")
    assert asked == [make_workload("t=64,k=8")]


def test_dtypes_and_modes_are_those_of_the_standard_set(asked: list[Workload]) -> None:
    """--dtype is repeatable, and holds where no shape is named."""
    call("tune", "--dtype", "float16", "--dtype", "bfloat16", "--mode", "forward")
    kinds = {(workload.dtype, workload.mode) for workload in asked}
    assert kinds == {("float16", "forward"), ("bfloat16", "forward")}
    assert len(asked) == 2 * len(EFFORT_SETTINGS["standard"].presets)


def test_stale_profiles_are_shown_forgotten_and_tuned_anew(tuned: list[dict[str, Any]]) -> None:
    """--stale means the same everywhere: measured on this machine with another jaxlib."""
    assert "No stale profiles" in call("show", "--stale").stdout
    (profile,) = ProfileStore().profiles()
    older = profile.device.model_copy(update={"jaxlib": "0.1.0"})
    ProfileStore().put(profile.model_copy(update={"device": older}))
    (row,) = json.loads(call("show", "--stale", "--json").stdout)
    assert row["shape"] == tuned[0]["shape"]
    again = call("tune", "--stale", "--effort", "quick", "--json")
    assert again.exit_code == 0, again.output
    assert len(json.loads(again.stdout)) == 1
    assert json.loads(call("show", "--stale", "--json").stdout) == []
    assert "nothing to forget" in call("forget", "--stale", "--yes").stderr


def test_doctor_ends_by_what_it_found(tuned: list[dict[str, Any]]) -> None:
    """Status 0 while nothing is wrong.

    --verify times what is stored; a store that others may write is wrong, with its cure.
    """
    healthy = call("doctor", "--verify", "1")
    assert "versions" in healthy.stdout
    assert tuned[0]["shape"] in healthy.stdout
    assert "page faults" in healthy.stdout
    ProfileStore().path.chmod(0o666)
    sick = call("doctor", "--json")
    assert sick.exit_code == 1
    problems = [finding for finding in json.loads(sick.stdout) if finding["level"] == "problem"]
    assert [problem["cure"] for problem in problems] == [f"chmod 600 {ProfileStore().path}"]


def damage() -> Path:
    path = ProfileStore().path
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 1000)
    return path


@pytest.mark.parametrize("command", [["show"], ["export", "-"]])
def test_a_damaged_store_is_told_and_left_alone(command: list[str]) -> None:
    """Commands that only read name the file and the cure; the file is not touched."""
    path = damage()
    result = call(*command)
    assert result.exit_code == 1, result.output
    assert str(path) in result.stderr
    assert "AUTOCHUNK_STORE" in result.stderr
    assert path.read_bytes() == b"this is no database" * 1000


def test_a_damaged_store_does_not_stop_a_tune() -> None:
    """It is set aside whole, under a name that is told, and work goes on in a new one."""
    from autochunk.errors import StoreWarning

    path = damage()
    with pytest.warns(StoreWarning, match="is kept as"):
        result = call("tune", "--shape", SHAPE, "--mode", "forward", "--effort", "quick")
    assert result.exit_code == 0, result.output
    (aside,) = path.parent.glob("*.damaged-*")
    assert aside.read_bytes() == b"this is no database" * 1000
    assert len(ProfileStore().profiles()) == 1


def test_explain_goes_on_without_a_damaged_store() -> None:
    """For looking up, a damaged layer is left out with a warning."""
    from autochunk.errors import StoreWarning

    damage()
    with pytest.warns(StoreWarning):
        result = call("explain", "--shape", SHAPE, "--mode", "forward")
    assert result.exit_code == 0
    assert "left out" in result.stdout


@pytest.mark.parametrize("devices", [(), ("--devices",)], ids=["workloads", "devices"])
def test_evaluate_tells_how_good_predictions_are(devices: tuple[str, ...], tmp_path: Path) -> None:
    """Of files, or of all that "auto" asks; a line for each device, and the worst workloads."""
    places: list[Path] = []
    for name in ("One/CPU", "Other/CPU"):
        shapes = ("t=256,h=4,k=32", "t=512,h=4,k=32", "t=1024,h=4,k=32")
        profiles = [make_profile(make_workload(one), make_device(kind=name)) for one in shapes]
        places.append(tmp_path / f"{len(places)}.json")
        places[-1].write_text(bundle.dump(profiles))
        ProfileStore().put_all(profiles)
    found = json.loads(call("evaluate", *map(str, places), *devices, "--json").stdout)
    assert [one["workloads"] for one in found["devices"]] == [3, 3]
    assert {one["best"] for one in found["workloads"]} == {"xla, 16 MB"}
    assert all(one["regret"] == 0 or one["chosen"] != one["best"] for one in found["workloads"])
    assert found == json.loads(call("evaluate", *devices, "--json").stdout)
    text = call("evaluate", *devices, "--worst", "2").stdout
    assert "One/CPU" in text
    assert text.count("attention:") == 2


def test_evaluate_without_profiles() -> None:
    """It says so."""
    result = call("evaluate")
    assert result.exit_code == 0
    assert "Too few profiles" in result.stdout
    assert json.loads(call("evaluate", "--json").stdout) == {"devices": [], "workloads": []}


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_ends_at_once_and_says_how_to_go_on(signal_number: int) -> None:
    """Whatever interrupts a tune ends it within seconds, with status 130 and the hint.

    Ctrl-C, SIGTERM (a scheduler) or SIGHUP (a lost connection); what was measured is stored.
    """
    options = "tune --shape b=1,t=1024,h=4,k=32 --effort thorough"
    # Where the tests ignore signals (nohup, a script's background), so would a process of theirs.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL);"
        "from autochunk.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *options.split()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if re.search(r"\b3/\d+ .* ms$", line):  # enough for a choice
                break
        asked = time.monotonic()
        process.send_signal(signal_number)
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
    options = "--missed --effort --timeout --json --preset --storage --verify --stale".split()
    for name in (*options, "AUTOCHUNK_STORE", "AUTOCHUNK_PROFILES"):
        assert name in text


def test_the_installed_command_runs() -> None:
    """The entry point of the package."""
    command = Path(sys.executable).with_name("autochunk")
    if not command.exists():
        pytest.skip("the package is not installed beside this interpreter")
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True, check=True)
    assert "autochunk" in done.stdout
