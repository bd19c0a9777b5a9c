"""The tables of figures: a line for each profile or contender."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table
from rich.text import Text

_PROFILE_COLUMNS = (
    "workload",
    "mode",
    "chosen plan",
    "time vs dense",
    "vs 1000 MB",
    "memory vs dense",
    "spread",
    "notes",
)


def profile_table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> Table:
    """The table that ends ``autochunk tune`` and that ``autochunk show`` prints."""
    table = Table(box=MARKDOWN if markdown else None, pad_edge=markdown, header_style="bold")
    for title in _PROFILE_COLUMNS:
        table.add_column(title, overflow="fold", no_wrap=title in ("mode", "spread"))
    for row in rows:
        dtype = "" if row["dtype"] == "float32" else f" {row['dtype']}"
        table.add_row(
            row["shape"] + dtype,
            row["mode"],
            row["plan"] or "none",
            _faster(row["speedup_vs_dense"]),
            _faster(row["speedup_vs_default"]),
            _memory(row["temp_bytes"], row["memory_vs_dense"]),
            _percent(row["spread"]),
            _notes(row),
        )
    return table


def bench_table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """The table of ``autochunk bench``."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("", "time", "vs haiku dense", "spread", "memory", ""):
        table.add_column(name)
    for record in records:
        seconds, ratio = record["seconds"], record["ratio"]
        table.add_row(
            record["name"],
            "-" if seconds is None else f"{seconds * 1e3:.2f} ms",
            _faster(1 / ratio if ratio else None),
            _percent(record["spread"]),
            _memory(record["temp_bytes"]),
            Text(record["detail"]),
        )
    return table


def _faster(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _memory(temp_bytes: int | None, share: float | None = None) -> str:
    if temp_bytes is None:
        return "-"
    text = f"{temp_bytes / 1e6:.0f} MB"
    if share is None or share < 1 / 9999:
        return text
    return f"{text} (1/{1 / share:.1f})" if share < 1 else f"{text} ({share:.1f}x)"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"±{value:.1%}"


def _notes(row: dict[str, Any]) -> str:
    notes = [] if row["complete"] else ["unfinished"]
    if row["stale"]:
        notes.append("stale: " + "; ".join(row["stale"]))
    if row["plan"] is None:
        notes.append(row["reason"])
    return "; ".join(notes)
