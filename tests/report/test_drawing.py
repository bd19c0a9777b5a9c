"""Figures as files of their own: valid, the same each time, in the reader's colors."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from factories import CURVE, make_measurement, make_profile, make_workload, run_python

from autochunk.report.curve import curve_record
from autochunk.report.drawing import curve_figure, curve_svg, overview_figure
from autochunk.report.records import profile_row
from autochunk.report.scales import bytes_text, seconds_text

SVG = "{http://www.w3.org/2000/svg}"


def texts(figure: str) -> list[str]:
    return [one.text or "" for one in ET.fromstring(figure).iter(f"{SVG}text")]


def test_a_curve_as_a_file() -> None:
    """Title, both axes, dense as a mark; letters are letters; the same bytes each time."""
    first, second = (
        curve_figure(curve_record(make_profile()), "a title", "a device") for _ in range(2)
    )
    assert first == second
    for words in ("a title", "a device", "working memory", "dense", "100 MB"):
        assert words in texts(first)


def test_colors_are_the_readers() -> None:
    """Every color has a name, which light and dark give a value each."""
    figure = curve_figure(curve_record(make_profile()), "title", "device")
    style = ET.fromstring(figure).find(f"{SVG}style")
    assert style is not None
    assert style.text is not None
    light, _, dark = style.text.partition("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\((--\w+)\)", figure))
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--\w+):", scheme))
    drawn = figure.replace(style.text, "")
    assert re.findall(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", drawn) == []


@pytest.mark.parametrize(
    "title", ["<b>&amp;</b>", "$x^2$ \\alpha", "\ufffe\x00", "\N{CJK UNIFIED IDEOGRAPH-5B57}"]
)
def test_titles_are_text(title: str) -> None:
    """Neither markup nor mathematics, nor what XML has no place for."""
    printable = title if title.isprintable() else "??"
    assert printable in texts(curve_figure(curve_record(make_profile()), title, title))


@pytest.mark.parametrize(
    "measurements",
    [
        CURVE[:1],
        (make_measurement("cudnn", None, 1.0, 0.0), CURVE[0]),
        (make_measurement("xla", 1.0, 0.0), CURVE[0]),
        (make_measurement("new_kernel", None, 0.1, status="pruned"), *CURVE),
        (*CURVE, make_measurement("xla", 2.0, status="crashed")),
    ],
    ids=["one plan", "no memory", "no time", "unknown plan", "a failure"],
)
# But for what an older matplotlib calls that a newer pyparsing deprecates.
@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
def test_unusual_curves_are_drawn(measurements: Any) -> None:
    """No logarithm of nothing, and no warning."""
    curve = curve_record(make_profile(measurements=measurements))
    ET.fromstring(curve_figure(curve, "title", "device"))
    ET.fromstring(curve_svg(curve, "a-", "label").svg)


def test_peers_are_marked() -> None:
    """By their names."""
    peers = [{"name": "torch", "ratio": 0.3, "temp_bytes": 10**7}]
    assert "torch" in texts(curve_figure(curve_record(make_profile(), peers), "title", "device"))


def test_a_budget_stands_where_the_axis_says() -> None:
    """From the least to the greatest of all plans' memory, with room."""
    figure = curve_svg(curve_record(make_profile()), "a-", "label")
    assert figure.least < 10e6
    assert figure.greatest > 400e6
    assert 300 < figure.width < 475
    assert 'id="a-budget"' in figure.svg
    assert set(re.findall(r'id="a-ring-(\d)"', figure.svg)) == set("0123")


def test_how_workloads_compare() -> None:
    """A row for each, the choice and 1000 MB on one axis; what all have is in the title."""
    profiles = [make_profile(make_workload(shape)) for shape in ("t=64,k=8", "t=128,k=8")]
    failed = make_profile(make_workload("t=9,k=9", mode="training"), measurements=())
    rows = [profile_row(profile) for profile in (*profiles, failed)]
    shown = texts(overview_figure(rows, "title"))
    for row in rows:
        assert f"{row['shape']} {row['mode']}" in shown
    assert "2x" in shown
    assert "title, float32" in shown


def test_settings_of_matplotlib_are_left_alone() -> None:
    """A program that draws figures of its own goes on as before."""
    import matplotlib

    before = dict(matplotlib.rcParams)
    curve_figure(curve_record(make_profile()), "title", "device")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.05, "50 ms"), (123e-6, "123 µs"), (5e-9, "5 ns"), (0.0, "0 ns")],
)
def test_seconds(seconds: float, text: str) -> None:
    """In the unit that suits them."""
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (512, "512 B"), (2e3, "2 kB"), (4e7, "40 MB"), (2.16e9, "2.16 GB")],
)
def test_bytes(size: float, text: str) -> None:
    """In powers of 1000, as all megabytes here."""
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("missing", "statement"),
    [
        ("matplotlib", "from autochunk.report.drawing import overview_figure as f; f([], '')"),
        ("jinja2", "from autochunk.report.page import report_html as f; f({})"),
        (
            "plotext",
            "from factories import make_profile; from autochunk.report.curve import curve_record;"
            "from autochunk.report.terminal import curve_text as f;"
            "f(curve_record(make_profile()), '')",
        ),
    ],
)
def test_without_the_extra(missing: str, statement: str) -> None:
    """The error names what is missing and the extra that brings it."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from autochunk.errors import ReportError\n"
        f"try:\n    {statement}\nexcept ReportError as error:\n    print(error)"
    )
    expected = f"{missing} is not installed: pip install 'autochunk[report]' brings it"
    assert run_python(code).strip() == expected
