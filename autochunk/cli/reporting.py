"""The command that makes pictures: ``report``."""

from __future__ import annotations

import collections
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from autochunk.cli.options import Filters, filter_options, json_option, store_option
from autochunk.cli.printing import print_file, print_json, print_parts, say
from autochunk.device import detect
from autochunk.errors import ReportError
from autochunk.report.comparison import USUAL_LIMIT, comparison, earlier, slower
from autochunk.report.overview import report_record
from autochunk.report.peers import read_peers
from autochunk.report.sources import Source, read, read_store
from autochunk.report.tables import changes_table
from autochunk.store import files
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore

_DEFAULT_FILE = "autochunk-report.html"
_MANY_FIGURES = 100  # take some seconds


def _share(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """A share such as 5% or 0.05; of 5 nobody means 500%."""
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?%|0(\.\d{1,6})?", text, re.ASCII):
        raise click.BadParameter(f"{text!r} is no share such as 5% or 0.05")
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


@click.command()
@click.argument("file", metavar="[FILE.html|FILE.svg|-]", required=False)
@click.option(
    "--from",
    "places",
    multiple=True,
    metavar="PLACE",
    help="A store, a bundle (file or URL), a folder of bundles, or a storage that machines tune "
    "through; the default is the user's store. Repeatable.",
)
@click.option(
    "--against",
    metavar="PLACE",
    help="Compare with earlier results or another machine's, and print what changed.",
)
@click.option(
    "--fail-if-slower",
    "limit",
    callback=_share,
    metavar="SHARE",
    help="With --against: exit status 1 if a chosen plan surely takes longer (95% confidence), and "
    "by more than this share, such as 5%, or if a workload has no plan any more.",
)
@click.option(
    "--peers",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="BENCH.json",
    help="Mark other libraries, as `autochunk bench --json` timed them on this machine.",
)
@click.option(
    "--figures",
    type=click.IntRange(min=0),
    metavar="COUNT",
    help="Draw at most so many curves on a page, of what was measured last; the default is 300. "
    "Tables have all workloads.",
)
@filter_options
@store_option
@json_option
def report(
    file: str | None,
    places: tuple[str, ...],
    against: str | None,
    limit: float | None,
    peers: Path | None,
    figures: int | None,
    filters: Filters,
    store: Path | None,
    as_json: bool,
) -> None:
    """Draw what was measured, as an HTML page or a figure.

    The page is one file that needs no network, autochunk-report.html unless named. FILE.svg is a
    figure: one workload's time against memory, or a comparison of several.

    With --against it prints what changed, and writes a file only if one is named. Drawing needs the
    extra autochunk[report]; --json and --against do not.
    """
    if limit is not None and against is None:
        raise click.UsageError("--fail-if-slower needs --against: slower than what?")
    now = detect()
    sources = [read(place, now) for place in places] or [read_store(ProfileStore(store), now)]
    sources = [_only(source, filters) for source in sources]
    profiles = [profile for source in sources for profile in source.profiles]
    before = None if against is None else _only(read(against, now), filters)
    found = {} if before is None else earlier(before.profiles, profiles)
    record = report_record(sources, now, read_peers(peers) if peers else None, found)
    record |= _compared(before, profiles, USUAL_LIMIT if limit is None else limit)
    if as_json:
        print_json(record)
    elif record["changes"] is not None:
        print_parts(changes_table(record["changes"]))
    if file is not None or not (as_json or against):
        _write(file or _DEFAULT_FILE, record, figures)
    _fail(record["changes"] or (), limit)


def _only(source: Source, filters: Filters) -> Source:
    """The same without what the filters leave out."""
    if not filters:
        return source
    return source._replace(profiles=tuple(filters.select(source.profiles)), misses={})


def _compared(before: Source | None, profiles: Sequence[Profile], limit: float) -> dict[str, Any]:
    """What a report's record has of changes."""
    if before is None:
        return {"changes": None}
    changes = comparison(before.profiles, profiles, limit)
    counts = dict(collections.Counter(one["verdict"] for one in changes))
    return {"changes": changes, "against": before.name, "limit": limit, "counts": counts}


def _write(file: str, record: dict[str, Any], figures: int | None) -> None:
    text = _figure(record) if file.endswith(".svg") else _page(record, figures)
    if file == "-":
        print_file(text)
    else:
        files.write(file, text)
        say(f"{file}: {len(text.encode()) / 1e6:.2f} MB.", err=True)


def _page(record: dict[str, Any], figures: int | None) -> str:
    from autochunk.report.page import USUAL_FIGURES, report_html, workload_count

    figures, count = USUAL_FIGURES if figures is None else figures, workload_count(record)
    if count > figures:
        say(
            f"Drawing {figures} of {count} workloads, those measured last; tables have all. For "
            "others choose with --device, --shape, --dtype and --mode, or give --figures.",
            err=True,
        )
    elif count > _MANY_FIGURES:
        say(f"Drawing {count} workloads, about 20 in a second.", err=True)
    return report_html(record, figures)


def _figure(record: dict[str, Any]) -> str:
    """A figure of one workload's curve; of several, how they compare on each device."""
    from autochunk.report.drawing import curve_figure, overview_figure

    devices = [device for device in record["devices"] if device["workloads"]]
    if len(devices) != 1:
        raise ReportError(
            f"a figure is of one device; these profiles are of {len(devices)}. Choose with "
            "--device, --shape, --dtype and --mode"
        )
    (device,) = devices
    rows = device["workloads"]
    if len(rows) > 1:
        return overview_figure(rows, device["device"])
    (row,) = rows
    title = f"{row['shape']} {row['dtype']} {row['mode']}"
    return curve_figure(row["curve"], title, device["device"])


def _fail(changes: Iterable[dict[str, Any]], limit: float | None) -> None:
    if limit is None:
        return
    worse = slower(changes)
    if worse:
        say(f"{len(worse)} workloads got slower by more than {100 * limit:g}%.", err=True)
        sys.exit(1)
