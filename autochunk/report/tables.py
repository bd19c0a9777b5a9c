"""The tables of figures: a line for each profile or contender."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table
from rich.text import Text

from autochunk.report.scales import seconds_text

SCATTERED = 0.10
"""A spread from which on times say little: the warning threshold of the pyperf package."""

_PROFILE_COLUMNS = (
    "workload",
    "mode",
    "chosen plan",
    "speed-up vs dense",
    "speed-up vs 1000 MB",
    "memory (share of dense's)",
    "spread",
    "within",
    "notes",
)


def profile_table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> Table:
    """The table that ends ``autochunk tune`` and that ``autochunk show`` prints."""
    table = Table(box=MARKDOWN if markdown else None, pad_edge=markdown, header_style="bold")
    for title in _PROFILE_COLUMNS:
        table.add_column(title, overflow="fold", no_wrap=title in ("mode", "spread", "within"))
    for row in rows:
        table.add_row(
            _workload(row),
            row["mode"],
            row["plan"] or "none",
            faster_text(row["speedup_vs_dense"]),
            faster_text(row["speedup_vs_default"]),
            memory_text(row["temp_bytes"], row["memory_vs_dense"]),
            _percent(row["spread"]),
            within_text(row["within"]),
            notes_text(row),
        )
    return table


def memory_table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> Table:
    """The table of ``autochunk show --memory``."""
    table = Table(box=MARKDOWN if markdown else None, pad_edge=markdown, header_style="bold")
    for title in ("workload", "mode", "plan", "predicted", "measured", "measured / predicted"):
        table.add_column(title, overflow="fold", no_wrap=title == "mode")
    for row in rows:
        share = row["measured_vs_predicted"]
        table.add_row(
            _workload(row),
            row["mode"],
            row["plan"],
            memory_text(row["predicted_bytes"]),
            memory_text(row["measured_bytes"]),
            "-" if share is None else f"{share:.2f}",
        )
    return table


def bench_table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """The table of ``autochunk bench``."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("", "time", "speed-up vs haiku dense", "spread", "memory", ""):
        table.add_column(name)
    for record in records:
        seconds, ratio = record["seconds"], record["ratio"]
        table.add_row(
            record["name"],
            "-" if seconds is None else f"{seconds * 1e3:.2f} ms",
            faster_text(1 / ratio if ratio else None),
            _percent(record["spread"]),
            memory_text(record["temp_bytes"]),
            Text(record["detail"]),
        )
    return table


def rivals_table(record: dict[str, Any], title: str, in_layer: bool = False) -> Table:
    """The table of ``autochunk bench --plans``, fastest first."""
    correlation, contradiction = record["rank_correlation"], record["contradiction"]
    sure = record["sure_contradiction"]
    told = f"largest contradiction {contradiction:.1%}, by intervals that do not overlap {sure:.1%}"
    if correlation is not None:
        told = f"rank correlation with the profile {correlation:.2f}, {told}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.caption, table.caption_justify = told, "left"
    time = "step" if in_layer else "time"
    for name in ("plan", time, "slower when tuned", "slower now", "memory", ""):
        table.add_column(name)
    for one in sorted(record["plans"], key=lambda one: (one["slower"] or [0, math.inf])[1]):
        chosen = one["plan"] == record["chosen"]
        table.add_row(
            one["plan"],
            "-" if one["seconds"] is None else f"{one['seconds'] * 1e3:.2f} ms",
            "" if chosen else _bounds(one["stored"]),
            "" if chosen else _bounds(one["slower"]),
            memory_text(one["temp_bytes"]),
            Text("chosen" if chosen else one["detail"]),
        )
    return table


def changes_table(changes: Sequence[dict[str, Any]]) -> Table:
    """The table of ``autochunk report --against``."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "time", "workload", "mode", "then", "now"):
        table.add_column(name, overflow="fold")
    for one in changes:
        table.add_row(
            one["verdict"],
            _bounds(one["slower"]),
            Text(_workload(one)),
            one["mode"],
            *(Text(_side(one[side])) for side in ("then", "now")),
        )
    return table


def _side(one: dict[str, Any] | None) -> str:
    if one is None or one["plan"] is None:
        return "-" if one is None else "no plan"
    return f"{one['plan']}: {seconds_text(one['seconds'])}, jaxlib {one['jaxlib']}"


def _bounds(bounds: list[float | None] | None) -> str:
    """An interval of fractions: "+7% (+5% to +9%)"."""
    if bounds is None or bounds[1] is None:
        return "-"
    low, high = (f"{one:+.1%}" if one is not None else "?" for one in (bounds[0], bounds[2]))
    return f"{bounds[1]:+.1%} ({low} to {high})"


def _workload(row: dict[str, Any]) -> str:
    shape: str = row["shape"]
    return shape if row["dtype"] == "float32" else f"{shape} {row['dtype']}"


def faster_text(ratio: float | None) -> str:
    """How many times as fast: "2.10x"."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def memory_text(temp_bytes: int | None, share: float | None = None) -> str:
    """Megabytes, and what share of others' that is: "40 MB (1/10.0)"."""
    if temp_bytes is None:
        return "-"
    text = f"{temp_bytes / 1e6:.0f} MB"
    return text if share is None else f"{text} ({_fraction(share)})"


def _fraction(share: float) -> str:
    """Two digits of it, or more: 0.014, 0.25, 12.00."""
    return f"{share:.2f}" if share >= 0.1 else f"{share:.2g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"±{value:.1%}"


def within_text(value: float | None) -> str:
    """Per cent, rounded up."""
    return "-" if value is None else f"{math.ceil(100 * value)}%"


def notes_text(row: dict[str, Any]) -> str:
    """What a ``profile_row`` is to be taken with."""
    notes = [] if row["complete"] else ["unfinished"]
    if row["stale"]:
        notes.append("stale: " + "; ".join(row["stale"]))
    if (row["spread"] or 0.0) > SCATTERED:
        notes.append("scattered times")
    if row["plan"] is None:
        notes.append(row["reason"])
    return "; ".join(notes)
