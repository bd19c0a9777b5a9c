"""How commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from autochunk.report.tables import profile_table

_ONE_LINE = 1000  # columns; Markdown's rows must not be broken


def make_console(stderr: bool = False) -> Console:
    """Where text and tables are printed."""
    console = Console(stderr=stderr, highlight=False)
    # A table in a file or a pipe is for reading too: give it room instead of 80 columns.
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=180)


def print_json(data: Any) -> None:
    """Prints data for scripts."""
    click.echo(json.dumps(data, indent=1, allow_nan=False))


def print_profiles(
    rows: list[dict[str, Any]],
    as_json: bool,
    markdown: bool = False,
    draw: Callable[[Sequence[dict[str, Any]], bool], Table] = profile_table,
) -> None:
    """Prints profiles, or what ``draw`` makes a table of, device by device."""
    if as_json:
        print_json(rows)
        return
    console = Console(highlight=False, width=_ONE_LINE) if markdown else make_console()
    prefix, style = ("## ", None) if markdown else ("", "bold")
    for device in dict.fromkeys(row["device"] for row in rows):
        console.print(f"\n{prefix}{device}", style=style, markup=False)
        console.print(draw([row for row in rows if row["device"] == device], markdown))
