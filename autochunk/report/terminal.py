"""A memory-time curve in a terminal, drawn by plotext.

Plotext is given logarithms, and the ticks that figures of a report have, too.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import Any

from autochunk.errors import ReportError
from autochunk.report.records import WHOLE
from autochunk.report.scales import (
    bytes_text,
    memory_limits,
    on_axis,
    seconds_text,
    steps,
    ticks,
    time_limits,
    timed,
)

_MARKS = {
    "dense": "D",
    WHOLE: "W",
    "chunks": "x",
    "xla": "x",
    "xla_rows": "r",
    "cudnn": "c",
    "tokamax_mosaic": "m",
    "tokamax_triton": "t",
}
_OTHER, _PEER, _CHOSEN, _PATH, _BAR = "+", "*", "●", "·", "│"
MOST_COLUMNS = 100
"""Wider than this a curve says no more."""

_ROWS = 20
_SOLID = "\N{NO-BREAK SPACE}"
_MOST_TICKS = 8


def curve_text(curve: dict[str, Any], title: str, columns: int = 80) -> str:
    """A memory-time curve as lines of plain text, and under it what each memory budget picks.

    Args:
      curve: a ``curve_record``.
      title: the line above it.
      columns: the width of a line.

    Raises:
      ReportError: plotext is not installed, or no plan was timed.
    """
    if not timed(curve):
        raise ReportError(f"{title}: no plan could be timed, so that there is no curve to plot")
    return "\n".join(
        [title, *_plot(curve, columns), "", *_legend(curve, columns), "", *_picks(curve)]
    )


def _plot(curve: dict[str, Any], columns: int) -> list[str]:
    try:
        import plotext
    except ImportError as error:
        raise ReportError.missing("plotext") from error
    figure = plotext.figure  # there is one of it
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(columns, _ROWS)
    for x, y, marker in _signals(curve):
        signal = figure.signal([*map(math.log10, x)], [*map(math.log10, y)], marker=marker)
        figure.draw(signal.lines() if marker in (_PATH, _BAR) else signal)
    axes = (("x", memory_limits, bytes_text), ("y", time_limits, seconds_text))
    for axis, limits, text in axes:
        low, high = limits(curve)
        marked = ticks(low, high, _MOST_TICKS)
        ruler = figure.ruler(axis)
        ruler.lim(math.log10(low), math.log10(high))
        ruler.ticks([*map(math.log10, marked)], [*map(text, marked)])
    text = plotext.uncolorize(str(figure.build()))
    figure.clear()
    return [line.rstrip() for line in text.splitlines()]


_Signal = tuple[list[float], list[float], str]


def _signals(curve: dict[str, Any]) -> Iterator[_Signal]:
    """(x, y, mark) of what is drawn; later ones lie on top."""
    yield from _path(curve)
    for _, plan in timed(curve):
        yield [on_axis(plan)] * 2, [plan["low"] or plan["seconds"], plan["high"]], _BAR
    for peer in curve["peers"]:
        yield [on_axis(peer)], [peer["seconds"]], _PEER
    for place, plan in timed(curve):
        mark = _CHOSEN if place == curve["chosen"] else _mark(plan)
        yield [on_axis(plan)], [plan["seconds"]], mark


def _path(curve: dict[str, Any]) -> Iterator[_Signal]:
    """The staircase that a memory budget walks along."""
    found = steps(curve)
    if found:
        ends = [*(start for start, _ in found[1:]), memory_limits(curve)[1]]
        x = [one for (start, _), end in zip(found, ends, strict=True) for one in (start, end)]
        yield x, [seconds for _, seconds in found for _ in range(2)], _PATH


def _mark(plan: dict[str, Any]) -> str:
    return _MARKS.get(plan["implementation"], _OTHER)


def _legend(curve: dict[str, Any], columns: int) -> Iterator[str]:
    """What the marks are, two to a line."""
    names = dict.fromkeys(plan["implementation"] for _, plan in timed(curve))
    marks = [f"{_MARKS.get(name, _OTHER)} {name}" for name in names]
    if curve["chosen"] is not None:
        marks.insert(0, f"{_CHOSEN} chosen: {curve['plans'][curve['chosen']]['plan']}")
    marks += [f"{_PEER} {peer['name']}" for peer in curve["peers"]]
    marks += [f"{_BAR} first to third quartile", f"{_PATH} best within a memory budget"]
    solid = "   ".join(one.replace(" ", _SOLID) for one in marks)
    yield from (line.replace(_SOLID, " ") for line in textwrap.wrap(solid, columns - 2))


def _picks(curve: dict[str, Any]) -> Iterator[str]:
    yield "memory_budget_mb   runs"
    for step in curve["picks"]:
        plan = curve["plans"][step["plan"]]
        enough = math.floor(step["from_bytes"] / 1e5 + 1) / 10  # rounded up
        yield f"{enough:16.1f}   {plan['plan']}: {seconds_text(plan['seconds'])}"
