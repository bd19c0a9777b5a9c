"""Commands by which stored profiles come and go: ``export``, ``import`` and ``forget``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import click

from autochunk.cli.options import (
    Filters,
    filter_options,
    json_option,
    stale_option,
    store_option,
)
from autochunk.cli.printing import print_json, print_parts, say
from autochunk.device import detect
from autochunk.errors import ArgumentError, DeviceError
from autochunk.report.records import import_records
from autochunk.report.text import import_text
from autochunk.store import bundle, files, merge
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore

# --- export and import ----------------------------------------------------------------------------


@click.command()
@click.argument("place", metavar="FILE|URL|-")
@filter_options
@click.option("--note", default="", metavar="TEXT", help="A line of text for whoever imports them.")
@click.option(
    "--storage",
    metavar="URL|FILE",
    help="Export the profiles that machines have tuned together there, not the store's.",
)
@store_option
def export(
    place: str, filters: Filters, note: str, storage: str | None, store: Path | None
) -> None:
    """Write profiles to a bundle, a file that other machines read.

    A name that ends in .gz is compressed, a URL is uploaded to, - is standard output.
    """
    found, unfinished = _exportable(storage, store)
    profiles = filters.select(found)
    if found and not profiles:
        raise ArgumentError(
            f"none of the {len(found)} profiles passes these filters, and nothing was written; "
            "`autochunk show` lists them"
        )
    text = bundle.dump(profiles, note)
    if place == "-":
        say(text, end="")
    else:
        files.write(place, text)
    summary = f"{len(profiles)} profiles exported"
    if left_out := len(found) - len(profiles):
        summary += f", {left_out} left out"
    if unfinished:
        summary += f", {unfinished} not finished"
    say(f"{summary}.", err=True)


def _exportable(storage: str | None, store: Path | None) -> tuple[list[Profile], int]:
    """The profiles there are, and how many are not finished."""
    if storage is None:
        return ProfileStore(store).profiles(), 0
    from autochunk.tuner.study import Storage

    return Storage(storage, make=False).profiles()


@click.command("import")
@click.argument("place", metavar="FILE|URL|-")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option(
    "--prefer",
    type=click.Choice(merge.PREFERENCES),
    default="best-effort",
    show_default=True,
    help="Which of two different profiles of one device and workload stays: the newest, the one of "
    "best effort (complete, thorough, then newest), the bundle's (theirs) or the store's (ours).",
)
@store_option
@json_option
def import_(
    place: str, dry_run: bool, prefer: merge.Preference, store: Path | None, as_json: bool
) -> None:
    """Add the profiles of a bundle to the store.

    The bundle is a file, a URL, or - for standard input. After an error none of it is added.
    """
    plan = merge.merge(ProfileStore(store), bundle.read(place), prefer, dry_run)
    here = None
    with contextlib.suppress(DeviceError):  # profiles may be brought where nothing computes
        here = detect()
    if as_json:
        print_json(import_records(plan, here))
    else:
        print_parts(import_text(plan, dry_run, here))


# --- forget ---------------------------------------------------------------------------------------


@click.command()
@filter_options
@stale_option
@click.option(
    "--older-than",
    type=click.IntRange(0),
    metavar="DAYS",
    help="Only those measured more than so many days ago.",
)
@click.option(
    "--unreadable",
    is_flag=True,
    help="Delete only the rows of the store that no version can read.",
)
@click.option(
    "--missed",
    is_flag=True,
    help='Delete only the list of what "auto" found no profile for on this machine.',
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@store_option
def forget(
    filters: Filters,
    stale: bool,
    older_than: int | None,
    unreadable: bool,
    missed: bool,
    yes: bool,
    store: Path | None,
) -> None:
    """Delete profiles from the store, after asking.

    It deletes those that fit every option given.
    """
    profile_store = ProfileStore(store)
    if unreadable:
        _forget(profile_store.unreadable(), "rows", profile_store.forget_unreadable, yes)
    elif missed:
        now = detect()
        names = [workload.key for workload in profile_store.missed(now)]
        names += [call.key for call in profile_store.missed_functions(now)]
        _forget(names, "misses", lambda: profile_store.forget_missed(now), yes)
    elif filters or stale or older_than is not None:
        chosen = _chosen(filters.select(profile_store.profiles()), stale, older_than)
        names = [f"{profile.device.key} | {profile.workload}" for profile in chosen]
        _forget(names, "profiles", lambda: profile_store.forget(chosen), yes)
    else:
        raise click.UsageError(
            "name what to forget: --device, --shape, --dtype, --mode, --stale, --older-than, "
            "--unreadable or --missed (all profiles: --older-than 0)"
        )


def _chosen(profiles: list[Profile], stale: bool, older_than: int | None) -> list[Profile]:
    if stale:
        now = detect()
        profiles = [profile for profile in profiles if profile.stale_reasons(now)]
    if older_than is not None:
        profiles = [profile for profile in profiles if profile.age_days() >= older_than]
    return profiles


def _forget(names: list[str], what: str, forget_them: Callable[[], int], yes: bool) -> None:
    """Says what goes, asks, and lets it go."""
    if not names:
        say("There is nothing to forget.", err=True)
        return
    for name in names:
        say(name, err=True)
    if yes or click.confirm(f"Forget these {len(names)}?", err=True):
        say(f"{forget_them()} {what} forgotten.", err=True)
