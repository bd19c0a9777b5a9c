"""A memory-time curve, and how workloads compare, drawn as SVG by matplotlib.

Why matplotlib, of the libraries that draw for a page: its figures are there without a script, in
print and where scripts are off, and 15 kB each, where Plotly's own script takes 4.8 MB of a page
that may use no network and Vega's 0.9 MB (with an 88 MB package to put it there). Every part can
have a name, by which the page's few lines of script move a mark, and its colors become the page's,
light or dark. A canvas, or a runtime that draws, would say nothing to a screen reader; this one
stands beside a table of the same figures.

Colors are drawn as the names of ``_COLORS`` and only then made CSS variables of the page; a figure
that stands alone brings its own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree as ET

from autochunk.errors import ReportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

# What each color is for: as matplotlib is given it, and in a light and a dark page. The hues are of
# Okabe and Ito's set (2008, "Color Universal Design"), darker or lighter for contrast.
_COLORS = {
    "ink": ("#010101", "#1c2024", "#e8eaed"),
    "soft": ("#020202", "#5c6670", "#a4adb8"),
    "rule": ("#030303", "#dfe3e8", "#343b44"),
    "path": ("#040404", "#9ec5e8", "#2f5e86"),
    "pick": ("#050505", "#c2410c", "#ff9d66"),
    "xla": ("#060606", "#0a66b0", "#6cb6ff"),
    "rows": ("#070707", "#00775a", "#3fc79e"),
    "fused": ("#080808", "#9a3b80", "#e79bcd"),
    "peer": ("#090909", "#8a6100", "#e3b341"),
    "paper": ("#0a0a0a", "#ffffff", "#14181d"),
}
_NAMES = {drawn: name for name, (drawn, *_) in _COLORS.items()}

# Each implementation's mark and color; those that this version does not know have the last.
_MARKS = {
    "dense": ("D", "ink", "dense attention"),
    "xla": ("o", "xla", "xla: slices of heads first"),
    "xla_rows": ("s", "rows", "xla_rows: slices of rows first"),
    "cudnn": ("^", "fused", "cudnn"),
    "tokamax_mosaic": ("v", "fused", "tokamax_mosaic"),
    "tokamax_triton": (">", "fused", "tokamax_triton"),
}
_OTHER = ("P", "soft", "another implementation")

_UNITS_PER_INCH = 72.0  # of matplotlib's SVG

_COLUMNS = 3  # of a legend

_LEAST_BYTES = 1e4
"""Plans that take less stand here: on an axis of logarithms nothing has no place."""


def color_css(scheme: str) -> str:
    """The colors as CSS variables, for "light" or "dark"."""
    place = {"light": 1, "dark": 2}[scheme]
    return "".join(f"--{name}:{shades[place]};" for name, shades in _COLORS.items())


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
    for place, plan in _timed(curve):
        _ring(axes, plan, f"ring-{place}")
    least, greatest = axes.get_xlim()
    axes.axvline(least, color=_ink("pick"), linewidth=1.5, linestyle=(0, (4, 3)), gid="budget")
    svg = _for_a_page(_svg(figure), prefix, label)
    width = axes.get_position().width * figure.get_figwidth() * _UNITS_PER_INCH
    return PageFigure(svg, least, greatest, width)


def curve_figure(curve: dict[str, Any], title: str) -> str:
    """The same as a file of its own, with the choice ringed."""
    figure, axes = _curve(curve, 4.1, 0.3)
    if curve["chosen"] is not None:
        _ring(axes, curve["plans"][curve["chosen"]], "chosen")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    return _alone(_svg(figure), title)


def overview_figure(rows: Sequence[dict[str, Any]], title: str) -> str:
    """How much faster than dense attention each workload's choice is, and 1000 MB, as a file.

    Raises:
      ReportError: matplotlib is not installed.
    """
    figure, axes = _figure(7.2, 1.3 + 0.24 * len(rows))
    figure.set_layout_engine("constrained")  # labels are as wide as they are
    for place, row in enumerate(rows):
        _draw_row(axes, -place, row)
    axes.axvline(1, color=_ink("ink"), linewidth=1)
    axes.set_xscale("log")
    _ticks(axes.xaxis, lambda value, _: f"{value:g}x")
    axes.set_xlabel("times as fast as dense attention")
    axes.set_yticks([-place for place in range(len(rows))], [_row_label(row) for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.margins(y=0.5 / max(1, len(rows)))
    _legend(figure)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    return _alone(_svg(figure), title)


# --- Parts of a curve -----------------------------------------------------------------------------


def _curve(curve: dict[str, Any], height: float, above: float) -> tuple[Figure, Axes]:
    """A figure of so many inches, some of which are left free above the axes."""
    figure, axes = _figure(6.6, height)
    _draw_curve(axes, curve)
    rows = _legend(figure)
    # Given here: an engine that finds them takes a third of the time of a page of many figures.
    margins = {"left": 0.125, "right": 0.985, "top": 1 - above / height}
    figure.subplots_adjust(**margins, bottom=(0.55 + 0.19 * rows) / height)
    return figure, axes


def _draw_curve(axes: Axes, curve: dict[str, Any]) -> None:
    least, greatest = _memory_limits(curve)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(least, greatest)
    axes.set_ylim(*_time_limits(curve))
    _draw_path(axes, curve, greatest)
    for name in dict.fromkeys(plan["implementation"] for _, plan in _timed(curve)):
        _draw_plans(axes, name, [one for _, one in _timed(curve) if one["implementation"] == name])
    _draw_baselines(axes, curve)
    for peer in curve["peers"]:
        _draw_peer(axes, peer)
    if any(plan["status"] == "pruned" for _, plan in _timed(curve)):
        hollow = {"facecolors": _ink("paper"), "edgecolors": _ink("soft"), "linewidth": 1.3}
        axes.scatter([], [], s=30, label="hollow: given up early", **hollow)
    _ticks(axes.xaxis, lambda value, _: bytes_text(value))
    _ticks(axes.yaxis, lambda value, _: seconds_text(value))
    axes.set_xlabel("working memory")
    axes.set_ylabel("time")


def _draw_path(axes: Axes, curve: dict[str, Any], end: float) -> None:
    """The staircase that a memory budget walks along."""
    steps = [(one["from_bytes"], curve["plans"][one["plan"]]["seconds"]) for one in curve["picks"]]
    if steps:
        x, y = zip(*steps, (end, steps[-1][1]), strict=True)
        x = tuple(max(one, _LEAST_BYTES) for one in x)
        label = "best within a memory budget"
        axes.step(x, y, where="post", color=_ink("path"), linewidth=5, zorder=1, label=label)


def _draw_plans(axes: Axes, name: str, plans: Sequence[dict[str, Any]]) -> None:
    """One implementation's plans, with bars from the first to the third quartile."""
    marker, color, label = _MARKS.get(name, _OTHER)
    shade = _ink(color)
    x, y = [_x(plan) for plan in plans], [plan["seconds"] for plan in plans]
    below = [max(0.0, plan["seconds"] - plan["low"]) for plan in plans]
    above = [max(0.0, plan["high"] - plan["seconds"]) for plan in plans]
    axes.errorbar(
        x, y, yerr=(below, above), fmt="none", ecolor=shade, elinewidth=1.2, capsize=2, zorder=2
    )
    filled = [shade if plan["status"] == "ok" else _ink("paper") for plan in plans]
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
            given = {"linewidth": 0.8, "linestyle": ":", "zorder": 1}
            axes.axhline(plan["seconds"], color=_ink("soft"), **given)
        axes.annotate(
            text,
            (_x(plan), plan["high" if above else "low"]),
            xytext=(0, 7 if above else -7),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
            color=_ink("ink"),
        )


def _draw_peer(axes: Axes, peer: dict[str, Any]) -> None:
    place = (max(peer["temp_bytes"], _LEAST_BYTES), peer["seconds"])
    axes.scatter(*place, marker="*", color=_ink("peer"), s=55, zorder=3)
    given = {"fontsize": 8, "color": _ink("peer"), "textcoords": "offset points"}
    axes.annotate(peer["name"], place, xytext=(6, 3), **given)


def _ring(axes: Axes, plan: dict[str, Any], gid: str) -> None:
    axes.plot(
        [_x(plan)],
        [plan["seconds"]],
        marker="o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor=_ink("pick"),
        markeredgewidth=2,
        linestyle="none",
        zorder=4,
        gid=gid,
    )


def _timed(curve: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return [(i, one) for i, one in enumerate(curve["plans"]) if one["seconds"]]


def _x(plan: dict[str, Any]) -> float:
    return max(float(plan["temp_bytes"] or 0), _LEAST_BYTES)


def _memory_limits(curve: dict[str, Any]) -> tuple[float, float]:
    found = [_x(one) for _, one in _timed(curve)]
    found += [max(float(one["temp_bytes"]), _LEAST_BYTES) for one in curve["peers"]]
    return _around(found)


def _time_limits(curve: dict[str, Any]) -> tuple[float, float]:
    timed = [one for _, one in _timed(curve)]
    found = [one[name] for one in timed for name in ("low", "seconds", "high") if one[name] > 0]
    return _around([*found, *(one["seconds"] for one in curve["peers"])])


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis of logarithms, with room at the ends, and for a tick or two."""
    least, greatest = min(values), max(values)
    room = max((greatest / least) ** 0.07, (2 / (greatest / least)) ** 0.5, 1.15)
    return least / room, greatest * room


# --- Parts of an overview -------------------------------------------------------------------------


def _draw_row(axes: Axes, y: float, row: dict[str, Any]) -> None:
    chosen, default = row["speedup_vs_dense"], row["speedup_vs_default"]
    if not chosen:
        return
    first = y == 0
    axes.plot([1, chosen], [y, y], color=_ink("path"), linewidth=4, zorder=1)
    label = "the plan that was chosen" if first else None
    axes.scatter([chosen], [y], color=_ink("xla"), s=34, zorder=3, label=label)
    if default:
        label = "a fixed limit of 1000 MB" if first else None
        given = {"marker": "o", "facecolors": _ink("paper"), "edgecolors": _ink("pick")}
        axes.scatter([chosen / default], [y], s=26, zorder=2, label=label, **given)


def _row_label(row: dict[str, Any]) -> str:
    return f"{row['shape']} {row['dtype']} {row['mode']}"


# --- Matplotlib -----------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError.missing("matplotlib") from error
    matplotlib.rcParams.update(_STYLE)
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(which="major", color=_ink("rule"), linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _ink(name: str) -> str:
    return _COLORS[name][0]


_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "autochunk",  # equal figures, equal bytes
    "text.parse_math": False,  # a dollar sign is one
    "font.size": 9,
    "text.color": _ink("ink"),
    "axes.labelcolor": _ink("soft"),
    "axes.edgecolor": _ink("soft"),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _ink("soft"),
    "ytick.color": _ink("soft"),
    "legend.frameon": False,
}


def _ticks(axis: Any, text: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure) -> int:
    """A legend under the axes; returns how many rows it has."""
    given = {"ncols": _COLUMNS, "fontsize": 8, "handletextpad": 0.4, "columnspacing": 1.2}
    place = "outside lower left" if figure.get_layout_engine() else "lower left"
    legend = figure.legend(loc=place, borderaxespad=0.2, **given)
    return -(-len(legend.get_texts()) // _COLUMNS)


def bytes_text(value: float) -> str:
    """Bytes in the unit that suits them, of 10^3 to the next."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} B"


def seconds_text(value: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


# --- SVG ------------------------------------------------------------------------------------------


def _svg(figure: Figure) -> ET.Element:
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=nothing)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(text.getvalue())  # noqa: S314 - matplotlib wrote it just now
    for element in root.iter():
        element.tail = None
        if element.text and not element.text.strip():
            element.text = None
        for name, value in element.attrib.items():
            element.set(name, re.sub("#[0-9a-f]{6}", _variable, value))
    return root


def _variable(found: re.Match[str]) -> str:
    name = _NAMES.get(found[0])
    return f"var(--{name})" if name else found[0]


def _for_a_page(root: ET.Element, prefix: str, label: str) -> str:
    """Without a size of its own, and with ids that no other figure has."""
    for name in ("width", "height"):
        del root.attrib[name]
    used = {reference for element in root.iter() for reference in _references(element)}
    for element in root.iter():
        own = element.get("id", "")
        if own in used or own == "budget" or own.startswith("ring-"):
            element.set("id", prefix + own)
        else:
            element.attrib.pop("id", None)
        for name, value in element.attrib.items():
            if "#" in value:
                element.set(name, value.replace("#", f"#{prefix}"))
    root.set("role", "img")
    root.set("aria-label", label)
    return ET.tostring(root, encoding="unicode")


def _references(element: ET.Element) -> Iterator[str]:
    for value in element.attrib.values():
        yield from re.findall(r"#([\w.-]+)", value)


def _alone(root: ET.Element, title: str) -> str:
    """With the colors of both schemes, a background, and a name."""
    style, name = ET.Element(f"{{{_SVG}}}style"), ET.Element(f"{{{_SVG}}}title")
    dark = f"@media (prefers-color-scheme: dark) {{ svg {{ {color_css('dark')} }} }}"
    style.text = f"svg {{ {color_css('light')} background: var(--paper) }} {dark}"
    name.text = title
    root.insert(0, style)
    root.insert(0, name)
    return ET.tostring(root, encoding="unicode") + "\n"
