"""A curve in a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from factories import CURVE, make_measurement, make_profile

from autochunk.errors import ReportError
from autochunk.report.curve import curve_record
from autochunk.report.scales import ticks
from autochunk.report.terminal import curve_text
from autochunk.store import bundle

SHIPPED = Path(__file__).resolve().parents[2] / "profiles"


def test_a_curve_is_drawn() -> None:
    """The choice, the other plans by their letters, axes with units, and what budgets run."""
    text = curve_text(curve_record(make_profile()), "a title")
    for words in ("a title", "●", "D", "x xla", "r xla_rows", "ms┤", "MB", "chosen:", "10.1   xla"):
        assert words in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "\x1b" not in text


def test_lines_fit_80_columns() -> None:
    """Whatever was measured."""
    for file in SHIPPED.glob("*.json"):
        for profile in bundle.read(file).profiles[::8]:
            text = curve_text(curve_record(profile), "title")
            assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    "measurements",
    [
        CURVE[:1],
        (make_measurement("cudnn", None, 1.0, 0.0), CURVE[0]),
        (make_measurement("xla", 1.0, 0.0), CURVE[0]),  # a clock that is too coarse
        (make_measurement("new_kernel", None, 0.1), *CURVE),
    ],
    ids=["one plan", "no memory", "no time", "unknown plan"],
)
def test_unusual_curves_are_drawn(measurements: Any) -> None:
    """Logarithms of nothing are not taken."""
    assert "┤" in curve_text(curve_record(make_profile(measurements=measurements)), "title")


def test_nothing_to_draw_is_an_error() -> None:
    """Which says that no plan was timed."""
    failed = (make_measurement("dense", None, status="oom"),)
    with pytest.raises(ReportError, match="no plan could be timed"):
        curve_text(curve_record(make_profile(measurements=failed)), "title")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.9, 11, [1, 2, 5, 10]),
        (1e-3, 2.1e-3, [1e-3, 2e-3]),
        (1, 1e4, [1, 10, 100, 1e3, 1e4]),
        (1, 1e12, [1, 1e3, 1e6, 1e9, 1e12]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    """Few enough, round, and within the axis."""
    assert ticks(low, high, most=6) == pytest.approx(expected)
