"""A memory-time curve, and how workloads compare, drawn as SVG by matplotlib.

Why matplotlib, of the libraries that draw for a page: its figures are there without a script, in
print and where scripts are off, and 15 kB each, where Plotly's own script takes 4.8 MB of a page
that may use no network and Vega's 0.9 MB (with an 88 MB package to put it there). Every part can
have a name, by which the page's few lines of script move a mark, and its colors become the page's,
light or dark. A canvas, or a runtime that draws, would say nothing to a screen reader; this one
stands beside a table of the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
from autochunk.report.svg import alone, for_a_page, ink, printable, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each implementation's mark and color; those that this version does not know have the last.
_MARKS = {
    "dense": ("D", "ink", "dense attention"),
    "xla": ("o", "xla", "xla: slices of heads first"),
    "xla_rows": ("s", "rows", "xla_rows: slices of rows first"),
    WHOLE: ("D", "ink", "the whole call"),
    "chunks": ("o", "xla", "in chunks"),
    "cudnn": ("^", "fused", "cudnn"),
    "tokamax_mosaic": ("v", "fused", "tokamax_mosaic"),
    "tokamax_triton": (">", "fused", "tokamax_triton"),
}
_OTHER = ("P", "soft", "another implementation")

_UNITS_PER_INCH = 72.0  # of matplotlib's SVG

_COLUMNS = 3  # of a legend


class PageFigure(NamedTuple):
    """A figure for a page, and where a memory budget stands in it.

    Attributes:
      svg: an ``<svg>`` element.
      least, greatest: bytes at both ends of the axis of memory, which is one of logarithms.
      width: how far these ends are apart, in the figure's units.
    """

    svg: str
    least: float
    greatest: float
    width: float


@styled()
def curve_svg(curve: dict[str, Any], prefix: str, label: str) -> PageFigure:
    """A memory-time curve, to be put into a page.

    Args:
      curve: a ``curve_record`` with a plan that was timed.
      prefix: what the ids in the figure begin with.
      label: what it shows, in words, for those who do not see it.

    Returns:
      A figure in which each plan has a ring ``PREFIXring-PLACE``, shown where it has
      the class ``picked``, and the budget a line ``PREFIXbudget`` at the axis' left end.

    Raises:
      ReportError: matplotlib is not installed.
    """
    figure, axes = _curve(curve, 3.9, 0.1)
    for place, plan in timed(curve):
        _ring(axes, plan, f"ring-{place}")
    least, greatest = axes.get_xlim()
    axes.axvline(least, color=ink("pick"), linewidth=1.5, linestyle=(0, (4, 3)), gid="budget")
    svg = for_a_page(figure, prefix, label)
    width = axes.get_position().width * figure.get_figwidth() * _UNITS_PER_INCH
    return PageFigure(svg, least, greatest, width)


@styled()
def curve_figure(curve: dict[str, Any], title: str, device: str) -> str:
    """The same as a file of its own, with the choice ringed, and the device under the title."""
    figure, axes = _curve(curve, 4.3, 0.5)
    if curve["chosen"] in dict(timed(curve)):
        _ring(axes, curve["plans"][curve["chosen"]], "chosen")
    axes.set_title(printable(title), loc="left", fontweight="bold", fontsize=10, pad=18)
    given: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 8}
    axes.annotate(printable(device), (0, 1), (0, 6), color=ink("soft"), **given)
    return alone(figure, f"{title}, {device}")


@styled()
def overview_figure(rows: Sequence[dict[str, Any]], title: str) -> str:
    """How much faster than dense attention each workload's choice is, and 1000 MB, as a file.

    What dtype or mode all of them have is said in the title.

    Raises:
      ReportError: matplotlib is not installed.
    """
    labels = _row_labels(rows)
    longest = max(map(len, labels), default=0)
    figure, axes = _figure(4.5 + 0.06 * longest, 1.3 + 0.24 * len(rows))
    figure.set_layout_engine("constrained")  # labels are as wide as they are
    axes.scatter([], [], label="the plan that was chosen", **_CHOSEN)
    axes.scatter([], [], label="a fixed limit of 1000 MB", **_DEFAULT)
    for place, row in enumerate(rows):
        _draw_row(axes, place, row)
    axes.axvline(1, color=ink("ink"), linewidth=1)
    axes.set_xscale("log")
    _ticks(axes.xaxis, lambda value: f"{value:g}x")
    axes.set_xlabel("times as fast as dense attention")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axes.tick_params(axis="y", length=0, labelsize=8)
    _legend(figure)
    common = [rows[0][name] for name in ("dtype", "mode") if rows and not _differ(rows, name)]
    title = ", ".join([title, *common])
    figure.suptitle(printable(title), x=0.01, ha="left", fontweight="bold", fontsize=10)
    return alone(figure, title)


# --- Parts of a curve -----------------------------------------------------------------------------


def _curve(curve: dict[str, Any], height: float, above: float) -> tuple[Figure, Axes]:
    """A figure of so many inches, some of which are left free above the axes."""
    figure, axes = _figure(6.6, height)
    _draw_curve(axes, curve)
    rows = _legend(figure)
    # Given here: an engine that finds them takes a third of the time of a page of many figures.
    margins: Any = {"left": 0.125, "right": 0.985, "top": 1 - above / height}
    figure.subplots_adjust(**margins, bottom=(0.55 + 0.19 * rows) / height)
    return figure, axes


def _draw_curve(axes: Axes, curve: dict[str, Any]) -> None:
    least, greatest = memory_limits(curve)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(least, greatest)
    axes.set_ylim(*time_limits(curve))
    _draw_path(axes, curve, greatest)
    for name in dict.fromkeys(plan["implementation"] for _, plan in timed(curve)):
        _draw_plans(axes, name, [one for _, one in timed(curve) if one["implementation"] == name])
    _draw_baselines(axes, curve)
    for peer in curve["peers"]:
        _draw_peer(axes, peer)
    if any(plan["status"] == "pruned" for _, plan in timed(curve)):
        hollow: Any = {"facecolors": ink("paper"), "edgecolors": ink("soft"), "linewidth": 1.3}
        axes.scatter([], [], s=30, label="hollow: given up early", **hollow)
    _ticks(axes.xaxis, bytes_text)
    _ticks(axes.yaxis, seconds_text)
    axes.set_xlabel("working memory")
    axes.set_ylabel("time")


def _draw_path(axes: Axes, curve: dict[str, Any], end: float) -> None:
    """The staircase that a memory budget walks along, and that of before."""
    label = "best within a memory budget"
    _draw_steps(axes, steps(curve), end, color=ink("path"), linewidth=5, label=label)
    if before := curve["before"]:
        style: Any = {"color": ink("soft"), "linewidth": 1.5, "linestyle": (0, (5, 2))}
        _draw_steps(
            axes, before["steps"], end, label=f"before: {printable(before['label'])}", **style
        )


def _draw_steps(axes: Axes, found: Sequence[tuple[float, float]], end: float, **style: Any) -> None:
    if found:
        x, y = zip(*found, (end, found[-1][1]), strict=True)
        axes.step(x, y, where="post", zorder=1, **style)


def _draw_plans(axes: Axes, name: str, plans: Sequence[dict[str, Any]]) -> None:
    """One implementation's plans, with bars from the first to the third quartile."""
    marker, color, label = _MARKS.get(name, _OTHER)
    shade = ink(color)
    x, y = [on_axis(plan) for plan in plans], [plan["seconds"] for plan in plans]
    below = [max(0.0, plan["seconds"] - plan["low"]) for plan in plans]
    above = [max(0.0, plan["high"] - plan["seconds"]) for plan in plans]
    axes.errorbar(
        x, y, yerr=(below, above), fmt="none", ecolor=shade, elinewidth=1.2, capsize=2, zorder=2
    )
    filled = [shade if plan["status"] == "ok" else ink("paper") for plan in plans]
    axes.scatter([], [], marker=marker, color=shade, s=30, label=label)
    axes.scatter(x, y, marker=marker, c=filled, edgecolors=shade, s=30, linewidth=1.3, zorder=3)


def _draw_baselines(axes: Axes, curve: dict[str, Any]) -> None:
    """What a user would run without autochunk, and without a profile."""
    for name, text in (("dense", "dense"), ("default", "1000 MB")):
        if curve[name] is None:
            continue
        plan = curve["plans"][curve[name]]
        above = name == "dense"
        if above:
            given: Any = {"linewidth": 0.8, "linestyle": ":", "zorder": 1}
            axes.axhline(plan["seconds"], color=ink("soft"), **given)
        axes.annotate(
            WHOLE if plan["implementation"] == WHOLE else text,
            (on_axis(plan), plan["high" if above else "low"]),
            xytext=(0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
            color=ink("ink"),
            bbox={"facecolor": ink("paper"), "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )


def _draw_peer(axes: Axes, peer: dict[str, Any]) -> None:
    place = (on_axis(peer), peer["seconds"])
    axes.scatter(*place, marker="*", color=ink("peer"), s=55, zorder=3)
    least, greatest = axes.get_xlim()
    left = place[0] ** 2 > least * greatest  # of it there is more room
    axes.annotate(
        printable(peer["name"]),
        place,
        xytext=(-6 if left else 6, 3),
        textcoords="offset points",
        ha="right" if left else "left",
        fontsize=8,
        color=ink("peer"),
    )


def _ring(axes: Axes, plan: dict[str, Any], gid: str) -> None:
    axes.plot(
        [on_axis(plan)],
        [plan["seconds"]],
        marker="o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor=ink("pick"),
        markeredgewidth=2,
        linestyle="none",
        zorder=4,
        gid=gid,
    )


# --- Parts of an overview -------------------------------------------------------------------------


_CHOSEN: Any = {"color": ink("xla"), "s": 34, "zorder": 3}
_DEFAULT: Any = {"facecolors": ink("paper"), "edgecolors": ink("pick"), "s": 26, "zorder": 2}


def _draw_row(axes: Axes, y: float, row: dict[str, Any]) -> None:
    chosen, default = row["speedup_vs_dense"], row["speedup_vs_default"]
    if not chosen:
        return
    axes.plot([1, chosen], [y, y], color=ink("path"), linewidth=4, zorder=1)
    axes.scatter([chosen], [y], **_CHOSEN)
    if default:
        axes.scatter([chosen / default], [y], **_DEFAULT)


def _differ(rows: Sequence[dict[str, Any]], name: str) -> bool:
    return len({row[name] for row in rows}) > 1


def _row_labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a row is, but for what all have in common."""
    several = [name for name in ("dtype", "mode") if _differ(rows, name)]
    return [" ".join([row["shape"], *(row[name] for name in several)]) for row in rows]


# --- Matplotlib -----------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(which="major", color=ink("rule"), linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _ticks(axis: Any, text: Callable[[float], str]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(FixedLocator(ticks(low, high, most=9)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure) -> int:
    """A legend under the axes; returns how many rows it has."""
    given: Any = {"ncols": _COLUMNS, "fontsize": 8, "handletextpad": 0.4, "columnspacing": 1.2}
    place: Any = "outside lower left" if figure.get_layout_engine() else "lower left"
    legend = figure.legend(loc=place, borderaxespad=0.2, **given)
    return -(-len(legend.get_texts()) // _COLUMNS)
