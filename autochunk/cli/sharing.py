"""Commands that keep machines tuned, each for others of its kind: ``sync`` and ``watch``."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

from autochunk.cli.options import json_option, store_option
from autochunk.cli.printing import print_json, say
from autochunk.device import detect
from autochunk.errors import StorageError
from autochunk.plan import check_positive
from autochunk.report.records import synced_record
from autochunk.report.text import event_text, status_text, synced_text
from autochunk.store.profile import EFFORTS, Effort
from autochunk.store.profiles import ProfileStore
from autochunk.store.remote import without_password

# Exit statuses; 1 is for other errors, 2 for a wrong command line.
_AWAY = 3
_SOMETHING_LEFT = 3


@click.command()
@click.option(
    "--storage",
    required=True,
    metavar="URL|FILE",
    help="A database (postgresql://user@host/name) or a journal file that all machines reach; the "
    "same as for `autochunk tune --storage`.",
)
@store_option
@json_option
def sync(storage: str, store: Path | None, as_json: bool) -> None:
    """Swap profiles and misses with other machines of this kind.

    It takes the profiles that others have for this kind of device, hands in this one's, and hands
    in what "auto" has missed here, for a machine that has time to measure it. Nothing better is
    overwritten. Any number of machines may sync at the same time, as from a job's prolog, epilog or
    cron.

    Exit status: 0 if it is done; 3 if the storage cannot be used (one line says why, and what was
    swapped before stays); 1 on another error. A storage that is away at the start is an error at
    once; one that fails later is waited for, about ten seconds.
    """
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


@click.command()
@click.option("--once", is_flag=True, help="End when nothing is left to do, or others work.")
@click.option("--status", is_flag=True, help="Say what the service has done, does and will do.")
@click.option(
    "--idle-minutes",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    help="How long the device must be idle before anything is measured.",
)
@click.option(
    "--hours",
    metavar="FROM-TO",
    help="Hours of the day, local time, in which to measure, such as 22-6 or 22:30-6:15.",
)
@click.option(
    "--busy-cores",
    type=click.FloatRange(min=0),
    metavar="CORES",
    help="The device is busy when others use so many cores; the default is 0.3, for a GPU half of "
    "all cores.",
)
@click.option("--effort", type=click.Choice(EFFORTS), default="standard", show_default=True)
@click.option(
    "--memory-budget-mb",
    type=float,
    metavar="MB",
    help="Most working memory that a measurement may take; the default is 80% of what is free.",
)
@click.option(
    "--storage",
    metavar="URL|FILE",
    help="Sync with other machines there, and measure what they miss, too.",
)
@click.option(
    "--publish",
    metavar="FILE|FOLDER|URL",
    help="Add the profiles to this bundle, or to one for each kind of device in a folder.",
)
@store_option
@json_option
def watch(
    once: bool,
    status: bool,
    idle_minutes: float,
    hours: str | None,
    busy_cores: float | None,
    effort: Effort,
    memory_budget_mb: float | None,
    storage: str | None,
    publish: str | None,
    store: Path | None,
    as_json: bool,
) -> None:
    """Measure while the device is idle, as a service.

    It measures what "auto" has missed and what is stale or unfinished, the most wanted first, and
    times a sample of old profiles again. It gives way within a second when work arrives, and keeps
    what is measured.

    It watches jax's default device; on several GPUs run one for each, with CUDA_VISIBLE_DEVICES.
    Prints a line for each event, until it is told to stop (SIGTERM, Ctrl-C).

    Exit status: 0 when told to stop, or with --once when nothing is left to do; 3 with --once when
    something is left; 1 on an error, for example when another service watches the device.
    """
    stop = _told_to_stop()  # first: what follows takes a second to import and to start

    from autochunk.watch import record, service
    from autochunk.watch.idle import ALL_DAY, Hours

    profile_store = ProfileStore(store)
    if status:
        found = record.read_all(profile_store.path)
        print_json(found) if as_json else say(status_text(found))
        return
    check_positive("memory_budget_mb", memory_budget_mb, "MB")
    options = service.Options(
        effort=effort,
        idle_minutes=idle_minutes,
        hours=ALL_DAY if hours is None else Hours.parse(hours),
        once=once,
        busy_cores=busy_cores,
        memory_budget_mb=memory_budget_mb,
        storage=storage,
        publish=publish,
    )

    def tell(event: dict[str, Any]) -> None:
        say(json.dumps(event) if as_json else event_text(event))
        sys.stdout.flush()

    done = service.watch(profile_store, options, tell, stop)
    if once and not done:
        sys.exit(_SOMETHING_LEFT)


def _told_to_stop() -> threading.Event:
    """An event that is set when the process is told to end."""
    stop = threading.Event()

    def end(*_: object) -> None:
        # Not here: whoever waits for it may hold its lock.
        threading.Thread(target=stop.set).start()

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
            signal.signal(number, end)
    return stop
