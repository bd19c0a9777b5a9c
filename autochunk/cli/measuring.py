"""Commands that measure: ``tune`` and ``bench``."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from autochunk.cli.options import Wanted, json_option, shape_or_preset_options, store_option
from autochunk.cli.printing import make_console, print_json, print_profiles
from autochunk.device import Device, detect
from autochunk.nvidia import visible_gpus
from autochunk.report.progress import TuneProgress
from autochunk.report.records import bench_record, profile_row
from autochunk.report.tables import SCATTERED, bench_table
from autochunk.resolution.settings import use
from autochunk.store.profile import EFFORTS, Effort
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.workload import Workload

_TIMEOUTS = ", ".join(
    f"{settings.timeout:g} s {effort}" if settings.timeout else f"none {effort}"
    for effort, settings in EFFORT_SETTINGS.items()
)


# --- tune -----------------------------------------------------------------------------------------


@click.command()
@shape_or_preset_options
@click.option("--missed", is_flag=True, help='What "auto" found no profile for on this machine.')
@click.option("--effort", type=click.Choice(EFFORTS), default="standard", show_default=True)
@click.option(
    "--timeout",
    type=float,
    metavar="SECONDS",
    help=f"Time for all of it; the default is the effort's: {_TIMEOUTS}.",
)
@click.option(
    "--memory-budget-mb",
    type=float,
    metavar="MB",
    help="Most working memory that a measurement may take; the default is 80% of what is free. "
    "What does not fit is measured later only by --force.",
)
@click.option(
    "--stale",
    is_flag=True,
    help="What was measured on this machine with other versions, or was not finished.",
)
@click.option("--force", is_flag=True, help="Measure again what is stored.")
@click.option(
    "--devices",
    metavar="all|LIST",
    help="GPUs to share the work, such as 0,1; they must be alike. The default is jax's default "
    "device.",
)
@click.option(
    "--storage",
    metavar="URL|FILE",
    help="Tune together with other machines: a database (postgresql://user@host/name) or a "
    "journal file that all reach.",
)
@store_option
@json_option
def tune(
    wanted: Wanted,
    missed: bool,
    effort: Effort,
    timeout: float | None,
    memory_budget_mb: float | None,
    stale: bool,
    force: bool,
    devices: str | None,
    storage: str | None,
    store: Path | None,
    as_json: bool,
) -> None:
    """Measure this machine and keep what is best.

    Without --shape, --preset, --missed or --stale: what "auto" has missed here, then a standard set
    of shapes, on a CPU in float32, on a GPU in bfloat16 and (not when quick) float32, and with
    thorough effort in these and float16.
    """
    from autochunk.tuner.tune import stale_or_unfinished, standard_workloads
    from autochunk.tuner.tune import tune as run

    profile_store = ProfileStore(store)
    named = wanted.named()
    workloads: list[Workload] = []

    def choose(device: Device) -> list[Workload]:
        if not (named or missed or stale):
            workloads.extend(
                standard_workloads(profile_store, device, effort, wanted.dtypes, wanted.modes)
            )
        workloads.extend(named)
        if missed:
            found = wanted.among(profile_store.missed(device))
            workloads.extend(_or_say(found, '"auto" has missed nothing'))
        if stale:
            found = wanted.among(stale_or_unfinished(profile_store, device))
            workloads.extend(_or_say(found, "Nothing stored is stale or unfinished"))
        return workloads

    try:
        with _ended_like_ctrl_c(), TuneProgress(make_console(stderr=True)) as progress:
            profiles = run(
                choose,
                effort=effort,
                timeout=timeout,
                force=force,
                store=profile_store,
                memory_budget_mb=memory_budget_mb,
                on_event=progress,
                gpus=visible_gpus(devices) if devices else (),
                storage=storage,
            )
    except KeyboardInterrupt:
        click.echo(
            "Interrupted. What was measured is kept; the same command goes on from here.", err=True
        )
        sys.exit(130)
    rows = [profile_row(profile) for profile in profiles]
    print_profiles(rows, as_json)
    if scattered := [row for row in rows if (row["spread"] or 0.0) > SCATTERED]:
        click.echo(
            f"The times of {len(scattered)} workloads scatter by more than {SCATTERED:.0%}: small "
            "differences between plans cannot be seen. It helps to end other work on this machine, "
            "to keep its clocks from changing, or to give this process cores of its own; then tune "
            "again with --force.",
            err=True,
        )
    if workloads and not profiles:
        sys.exit(1)


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """What was measured is kept, too, when a scheduler (SIGTERM) or a lost connection ends it."""
    ending = [
        number
        for name in ("SIGTERM", "SIGHUP")
        if (number := getattr(signal, name, None))
        and signal.getsignal(number) is not signal.SIG_IGN  # as nohup has SIGHUP
    ]
    before = {number: signal.signal(number, signal.default_int_handler) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _or_say(found: list[Workload], nothing: str) -> list[Workload]:
    if not found:
        click.echo(f"{nothing} on this machine, of these dtypes and modes.", err=True)
    return found


# --- bench ----------------------------------------------------------------------------------------


@click.command()
@shape_or_preset_options
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=10,
    show_default=True,
    help="How often each contender is timed.",
)
@store_option
@json_option
def bench(wanted: Wanted, rounds: int, store: Path | None, as_json: bool) -> None:
    """Say what tuning bought: "auto" against haiku's dense attention, the 1000 MB default and
    others, in one run.

    Without --shape or --preset: every workload that the store has a profile of, for this machine.
    """  # noqa: D205
    from autochunk.tuner.bench import bench as run

    workloads = wanted.named() or wanted.among(_tuned_here(store))
    if not workloads:
        raise click.UsageError(
            "the store has no such profile of this machine; name a --shape or a --preset, or run "
            "`autochunk tune`"
        )
    results = []
    for workload in workloads:
        with use(store=store):
            records = [bench_record(contender) for contender in run(workload, rounds=rounds)]
        results.append({"workload": workload.key, "contenders": records})
        if not as_json:
            title = f"\n{workload.shape} {workload.dtype} {workload.mode}"
            make_console().print(bench_table(records, title))
    if as_json:
        print_json(results)


def _tuned_here(store: Path | None) -> list[Workload]:
    return [profile.parsed_workload() for profile in ProfileStore(store).profiles(detect())]
