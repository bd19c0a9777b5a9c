"""How commands print: tables for people, JSON for scripts.

Whatever a text has in it, and whatever becomes of the output, a command does its work: what does
not print is escaped, what the output's encoding does not have is spelt, and output that cannot be
written is an error of one line.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from autochunk.report.tables import profile_table
from autochunk.text import printable

_ONE_LINE = 1000  # columns; Markdown's rows must not be broken
_FEWEST_COLUMNS = 60  # for tables; in fewer each row is a block of lines

# --- Characters -----------------------------------------------------------------------------------

_SPELT = {"±": "+-", "…": "...", "µ": "u", "│": "|", "─": "-", "·": ".", "●": "O"}
_SPELT |= dict.fromkeys("┤├┬┴┼┌┐└┘", "+")  # of plots


def prepare_streams() -> None:
    """Has characters spelt or escaped that the encoding of standard output or error lacks.

    A stream that was closed is one from and to nowhere.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    codecs.register_error("autochunk", _spelt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="autochunk")


def _spelt(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(_SPELT.get(char, ascii(char)[1:-1]) for char in wrong), error.end


class _Escaped:
    """What a renderable comes to, with all that does not print escaped."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            shown = segment.control or segment.text.isprintable()
            yield segment if shown else Segment(printable(segment.text), segment.style)


class _Escaping(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return list(map(_Escaped, renderables))


# --- Writing --------------------------------------------------------------------------------------


def make_console(stderr: bool = False, width: int | None = None) -> Console:
    """Where text and tables are printed."""
    # Brackets and colons in texts are neither markup nor emoji.
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "stderr": stderr}
    console = Console(width=width, **plain)
    if width is None and not console.is_terminal:
        # A table in a file or a pipe is for reading too: give it room instead of 80 columns.
        console = Console(width=180, **plain)
    console.push_render_hook(_Escaping())
    return console


def print_parts(*parts: Any) -> None:
    """Prints texts and tables for people."""
    console = make_console()
    with _written():
        console.print(*(_fitting(part, console.width) for part in parts), sep="\n")


def say(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Prints a text as it is; to standard error it never fails."""
    with contextlib.suppress(OSError) if err else _written():
        # By its name: of its own accord click writes UTF-8 where ASCII is asked for.
        click.echo(printable(text) + end, file=sys.stderr if err else sys.stdout, nl=False)


def print_json(data: Any) -> None:
    """Prints data for scripts."""
    say(json.dumps(data, indent=1, allow_nan=False))


def print_file(text: str) -> None:
    """Prints what would be a file's content, which is UTF-8 whatever else is printed."""
    with _written():
        click.echo(text.encode(), nl=False)


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
    console = make_console(width=_ONE_LINE if markdown else None)
    prefix, style = ("## ", "") if markdown else ("", "bold")
    for device in dict.fromkeys(row["device"] for row in rows):
        table = draw([row for row in rows if row["device"] == device], markdown)
        with _written():
            console.print(Text(f"\n{prefix}{device}", style), _fitting(table, console.width))


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """Makes one line of what the system says where output cannot be written."""
    try:
        yield
    except BrokenPipeError:  # who reads has seen enough, which click and rich see to
        raise
    except OSError as error:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # What is left of it must not fail once more when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.ClickException(
            f"the output cannot be written: {error.strerror or error}"
        ) from error


def _fitting(part: Any, columns: int) -> Any:
    """A table as blocks of lines where there is no room for it."""
    return _blocks(part) if isinstance(part, Table) and columns < _FEWEST_COLUMNS else part


def _blocks(table: Table) -> Group:
    """Each row of a table as lines of a title and a cell, without the empty ones."""
    titles = [column.header for column in table.columns]
    parts: list[Any] = [table.title] if table.title else []
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        block = Table.grid("", Column(overflow="fold"), padding=(0, 2))
        for title, cell in zip(titles, cells, strict=True):
            if str(cell):
                block.add_row(title, cell)
        parts += [block, ""]
    return Group(*parts, *([table.caption] if table.caption else []))
