"""``autochunk report`` and ``autochunk show --plot``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from factories import (
    CURVE,
    make_device,
    make_measurement,
    make_profile,
    make_workload,
    run_python,
)

from autochunk.cli import main
from autochunk.store import bundle
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore

OTHER = make_workload("t=64,k=8")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def bundle_of(path: Path, *profiles: Profile) -> Path:
    path.write_text(bundle.dump(profiles))
    return path


def slowed(factor: float) -> Profile:
    """The usual profile, all of whose plans take so many times as long."""
    slow = [
        make_measurement(
            one.implementation,
            one.max_chunk_size_mb,
            one.ratio,
            seconds=tuple(factor * seconds for seconds in one.seconds),
        )
        for one in CURVE
    ]
    return make_profile(measurements=slow)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_page_of_the_store(here: Path) -> None:
    """Without a name it is autochunk-report.html; how large it is, is told."""
    ProfileStore().put(make_profile())
    result = call("report")
    assert result.exit_code == 0, result.output
    assert "autochunk-report.html: 0.0" in result.stderr
    assert make_device().key in (here / "autochunk-report.html").read_text()


def test_a_page_of_many_says_what_it_draws(here: Path) -> None:
    """Before it takes its time, with what to do for the others."""
    place = bundle_of(here / "a.json", make_profile(), make_profile(OTHER))
    result = call("report", "-", "--from", place, "--figures", 1)
    assert "Drawing 1 of 2 workloads" in result.stderr
    assert "--shape" in result.stderr
    assert result.stdout.count("<svg") == 1
    assert "Drawing" not in call("report", "-", "--from", place).stderr


def test_a_page_of_several_places(here: Path) -> None:
    """Each is named in it; - is standard output."""
    first = bundle_of(here / "a.json", make_profile())
    second = bundle_of(here / "b.json", make_profile(device=make_device(kind="Second/1")))
    text = call("report", "-", "--from", first, "--from", second).stdout
    for words in (str(first), str(second), "Second/1", "Made/Up"):
        assert words in text


def test_a_figure(here: Path) -> None:
    """Of one workload its curve, of several how they compare; of two devices it is refused."""
    place = bundle_of(here / "a.json", make_profile(), make_profile(OTHER))
    call("report", "one.svg", "--from", place, "--shape", "t=64")
    assert "working memory" in (here / "one.svg").read_text()
    call("report", "all.svg", "--from", place)
    assert "times as fast as dense attention" in (here / "all.svg").read_text()
    more = bundle_of(here / "b.json", make_profile(device=make_device(kind="Second/1")))
    refused = call("report", "x.svg", "--from", place, "--from", more)
    assert refused.exit_code == 1
    assert "a figure is of one device; these profiles are of 2" in refused.stderr


def test_data_without_drawing(here: Path) -> None:
    """--json prints what a page is drawn from, and writes nothing."""
    ProfileStore().put(make_profile())
    record = json.loads(call("report", "--json").stdout)
    (device,) = record["devices"]
    assert device["workloads"][0]["curve"]["picks"][0]["from_bytes"] == 10_000_000
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("share", "factor", "status"),
    [("5%", 1.2, 1), ("0.05", 1.2, 1), ("30%", 1.2, 0), ("5%", 1.0, 0), ("5%", 0.5, 0)],
)
def test_a_check_fails_for_what_got_slower(
    share: str, factor: float, status: int, here: Path
) -> None:
    """By more than the share; what changed is printed either way."""
    then, now = bundle_of(here / "then", make_profile()), bundle_of(here / "now", slowed(factor))
    result = call("report", "--from", now, "--against", then, "--fail-if-slower", share)
    assert result.exit_code == status, result.output
    assert ("1 workloads got slower by more than" in result.stderr) == bool(status)
    assert "xla, 16 MB: " in result.stdout
    assert not (here / "autochunk-report.html").exists()


def test_a_page_of_what_changed(here: Path) -> None:
    """Named, it is written, even where the check fails."""
    then, now = bundle_of(here / "then", make_profile()), bundle_of(here / "now", slowed(2))
    options = ["--from", now, "--against", then, "--fail-if-slower", "5%"]
    assert call("report", "page.html", *options).exit_code == 1
    text = (here / "page.html").read_text()
    assert "What changed" in text
    assert "1 slower" in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("report --fail-if-slower 5%", "needs --against"),
        ("report --against x --fail-if-slower much", "'much' is no share such as 5% or 0.05"),
        ("report --against x --fail-if-slower 5", "'5' is no share such as 5% or 0.05"),
        (
            "report --against x --fail-if-slower \N{ARABIC-INDIC DIGIT FIVE}%",
            "is no share such as 5% or 0.05",
        ),
        ("report --from nothing.json", "No such file"),
        ("report --against nothing.json", "No such file"),
        ("report nowhere/report.html", "nowhere/report.html: No such file"),
        ("show --plot t=77", "no profile has these items"),
        ("show --plot q=77", "a filter of shapes is NAME=VALUE"),
    ],
)
def test_mistakes_are_told_in_a_line(line: str, words: str, here: Path) -> None:
    """What was required, and no traceback."""
    result = call(*line.split())
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert isinstance(result.exception, SystemExit)
    assert list(here.iterdir()) == []


def test_a_curve_is_plotted() -> None:
    """Of every profile with these items, of the store or of a bundle."""
    ProfileStore().put_all([make_profile(), make_profile(OTHER)])
    result = call("show", "--plot", "t=64")
    assert OTHER.shape in result.stdout
    assert make_workload().shape not in result.stdout
    assert "chosen:" in result.stdout.replace("\N{NO-BREAK SPACE}", " ")
    (record,) = json.loads(call("show", "--plot", "t=64", "--json").stdout)
    assert len(record["curve"]["plans"]) == len(CURVE)


def test_the_commands_load_no_drawing_library() -> None:
    """A check in CI, and every other command, do without the extra."""
    code = (
        "import sys\n"
        "from autochunk.cli import main\n"
        "main(['report', '--json'], standalone_mode=False)\n"
        "print({'matplotlib', 'jinja2', 'plotext'} & set(sys.modules), file=sys.stderr)\n"
        "assert not {'matplotlib', 'jinja2', 'plotext'} & set(sys.modules)"
    )
    run_python(code)
