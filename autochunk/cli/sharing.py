"""Commands by which machines of one kind work for each other: ``sync``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from autochunk.cli.options import json_option, store_option
from autochunk.cli.printing import print_json, say
from autochunk.device import detect
from autochunk.errors import StorageError
from autochunk.report.records import synced_record
from autochunk.report.text import synced_text
from autochunk.store.profiles import ProfileStore
from autochunk.store.remote import without_password

_AWAY = 3  # exit status; 1 is for other errors, 2 for a wrong command line


@click.command()
@click.option(
    "--storage",
    required=True,
    metavar="URL|FILE",
    help="A database (postgresql://user@host/name) or a journal file that all machines reach, as "
    "of `autochunk tune --storage`.",
)
@store_option
@json_option
def sync(storage: str, store: Path | None, as_json: bool) -> None:
    """Take the profiles that other machines have for this kind of device, hand in this one's, and
    tell what "auto" has missed here, for a machine that has time to measure it.

    Nothing better is overwritten, and any number may do it at the same time, as from a job's
    prolog, epilog or cron.

    Exit status: 0 if it is done, 3 if the storage cannot be used (one line says why; it is waited
    for some ten seconds, and what was taken before is kept), 1 on another error.
    """  # noqa: D205
    from autochunk.tuner.sync import open_hub
    from autochunk.tuner.sync import sync as run

    try:
        found = run(ProfileStore(store), open_hub(storage), detect())
    except StorageError as error:
        say(f"Error: {error}", err=True)
        sys.exit(_AWAY)
    place = without_password(storage)
    if as_json:
        print_json(synced_record(found, place))
    else:
        say(synced_text(found, place))
