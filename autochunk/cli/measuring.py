"""Commands that measure: ``tune`` and ``bench``."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from autochunk.cli.functions import say_of_stale_functions, tune_missed_functions
from autochunk.cli.options import Wanted, json_option, shape_or_preset_options, store_option
from autochunk.cli.printing import make_console, print_json, print_parts, print_profiles, say
from autochunk.device import Device, detect
from autochunk.nvidia import visible_gpus
from autochunk.plan import Plan
from autochunk.report.progress import TuneProgress
from autochunk.report.records import bench_record, memory_row, profile_row, rivals_record
from autochunk.report.tables import SCATTERED, bench_table, memory_table, rivals_table
from autochunk.resolution.settings import use
from autochunk.store import bundle
from autochunk.store.profile import EFFORTS, Effort, Profile
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.events import Ending, Event, Failed, LeftOut, OutOfTime
from autochunk.tuner.outcome import Tuned
from autochunk.workload import Workload, workloads_of

_TIMEOUTS = ", ".join(
    f"{settings.timeout:g} s {effort}" if settings.timeout else f"none {effort}"
    for effort, settings in EFFORT_SETTINGS.items()
)


_NOTHING, _PARTLY = 1, 3  # exit statuses; 2 is for a wrong command line


# --- tune -----------------------------------------------------------------------------------------


@click.command()
@shape_or_preset_options
@click.option(
    "--missed",
    is_flag=True,
    help='Measure what "auto" found no profile for here; of many, those that teach most.',
)
@click.option("--effort", type=click.Choice(EFFORTS), default="standard", show_default=True)
@click.option(
    "--timeout",
    type=float,
    metavar="SECONDS",
    help=f"Most time for all of it; the default depends on the effort: {_TIMEOUTS}.",
)
@click.option(
    "--memory-budget-mb",
    type=float,
    metavar="MB",
    help="Most working memory that a measurement may take; the default is 80% of what is free. "
    "A plan that does not fit is not measured later either, but for --force.",
)
@click.option(
    "--stale",
    is_flag=True,
    help="Measure again what was measured here with other versions, and finish what is unfinished.",
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

    Without --shape, --preset, --missed or --stale it measures what "auto" has missed here (in at
    most half of the time) and a standard set of shapes: on a CPU in float32, on a GPU in bfloat16
    and (not when quick) float32, with thorough effort in float16, too.

    Functions of autochunk.chunked that "auto" missed come first, in at most half of the time where
    anything else is to be measured. With --devices the GPUs share them; with --storage this machine
    measures its own alone, as their programs never leave it.

    If it is interrupted, the same command goes on where it stopped.

    Exit status: 0 if everything is measured; 3 if some of it could not be measured, or was left out
    for want of time; 1 if nothing is measured, or on an error; 130 if interrupted.
    """
    from autochunk.tuner.agenda import Wishes
    from autochunk.tuner.tune import missed as missed_on
    from autochunk.tuner.tune import stale_or_unfinished, usual_wishes
    from autochunk.tuner.tune import tune as run

    profile_store = ProfileStore(store)
    named = wanted.named()
    wishes: list[Workload] = []
    told: list[Event] = []
    functions, left_time = Tuned([], 0, 0), timeout
    gpus = visible_gpus(devices) if devices else ()
    only_missed = missed and not (named or stale)

    def choose(device: Device) -> Wishes:
        if not (named or missed or stale):
            usual = usual_wishes(profile_store, device, effort, wanted.dtypes, wanted.modes)
            wishes.extend(usual.all)
            return usual
        kinds = wanted.dtypes, wanted.modes
        misses = missed_on(profile_store, device, *kinds) if missed else {}
        old = wanted.among(stale_or_unfinished(profile_store, device)) if stale else []
        left = (stale and say_of_stale_functions(profile_store, device)) or bool(functions.wanted)
        if missed and not misses and not left:
            _say_nothing('"auto" has missed nothing')
        if stale and not old and not left:
            _say_nothing("Nothing stored is stale or unfinished")
        chosen = Wishes(named=[*named, *old], missed=misses)
        wishes.extend(chosen.all)
        return chosen

    try:
        if missed or stale or not named:
            with _ended_like_ctrl_c():
                functions, left_time = tune_missed_functions(
                    profile_store,
                    effort,
                    timeout,
                    memory_budget_mb,
                    known_only=stale and not missed,
                    dtypes=wanted.dtypes,
                    modes=wanted.modes,
                    gpus=gpus,
                    shared=storage is not None,
                    alone=only_missed and not profile_store.are_missed(functions=False),
                )
        with _ended_like_ctrl_c(), TuneProgress(make_console(stderr=True)) as progress:

            def tell(event: Event) -> None:
                told.append(event)
                progress(event)

            profiles = run(
                choose,
                effort=effort,
                timeout=left_time,
                force=force,
                store=profile_store,
                memory_budget_mb=memory_budget_mb,
                on_event=tell,
                gpus=gpus,
                storage=storage,
            )
    except KeyboardInterrupt:
        say("Interrupted. What was measured is kept; the same command goes on from here.", err=True)
        sys.exit(130)
    rows = [profile_row(profile) for profile in (*functions.profiles, *profiles)]
    print_profiles(rows, as_json)
    if scattered := [row for row in rows if (row["spread"] or 0.0) > SCATTERED]:
        say(
            f"The times of {len(scattered)} workloads scatter by more than {SCATTERED:.0%}: small "
            "differences between plans cannot be seen. It helps to end other work on this machine, "
            "to keep its clocks from changing, or to give this process cores of its own; then tune "
            "again with --force.",
            err=True,
        )
    left = len(_not_measured(wishes, profiles, told)) + functions.left
    if left:
        asked = len(set(wishes)) + functions.wanted
        say(f"{left} of {asked} workloads were not measured.", err=True)
        sys.exit(_NOTHING if left == asked else _PARTLY)


def _not_measured(
    wishes: Sequence[Workload], profiles: Sequence[Profile], told: Sequence[Event]
) -> set[Workload]:
    """What has no profile with a plan to run, or failed now, and need not stay as it is."""
    usable = {profile.workload for profile in profiles if profile.choose()}
    endings = {event.workload: event for event in told if isinstance(event, Ending)}
    known = {one for event in told if isinstance(event, LeftOut) for one in event.known}
    return {
        workload
        for workload in wishes
        if workload not in known
        and (workload.key not in usable or isinstance(endings.get(workload), Failed | OutOfTime))
    }


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


def _say_nothing(what: str) -> None:
    say(f"{what} on this machine, of these dtypes and modes.", err=True)


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
@click.option(
    "--beside",
    metavar="SHAPE",
    multiple=True,
    help='Time "auto" on this shape, too, in the same rounds, to see what a mask costs or a window '
    "saves. Repeatable.",
)
@click.option(
    "--plans",
    is_flag=True,
    help="Instead, time every plan that the profile has times for, beside the chosen one.",
)
@click.option(
    "--against",
    metavar="FILE|URL",
    help="Instead, time the chosen plans beside those that this bundle chooses for the same "
    "workloads; with --plans both.",
)
@click.option(
    "--in-layer",
    is_flag=True,
    help="As --plans, but time the step of a Transformer layer around the attention.",
)
@click.option(
    "--memory",
    is_flag=True,
    help="As --plans, but measure each plan's working memory, in a process of its own.",
)
@store_option
@json_option
def bench(
    wanted: Wanted,
    rounds: int,
    beside: tuple[str, ...],
    plans: bool,
    against: str | None,
    in_layer: bool,
    memory: bool,
    store: Path | None,
    as_json: bool,
) -> None:
    """Time "auto" against haiku, jax.nn and others, in one run.

    The others: haiku's dense attention, slices of 1000 MB, the pull request's loop, jax.nn, and
    torch and tokamax where they are installed. Memory is the working memory of a call, besides its
    inputs and outputs. Nothing is stored.

    Without --shape or --preset: every workload that the store has a profile of, for this machine.
    """
    here = ProfileStore(store).profiles(detect())
    profiles = {one.parsed_workload(): one for one in here if not one.function}
    workloads = wanted.named() or wanted.among(profiles)
    if not workloads:
        raise click.UsageError(
            "the store has no such profile of this machine; name a --shape or a --preset, or run "
            "`autochunk tune`"
        )
    if plans or in_layer or memory or against is not None:
        from autochunk.tuner.rivals import timed_plans

        others = _choices(against)
        untuned = [workload.key for workload in workloads if workload not in profiles]
        if untuned:
            raise click.UsageError(
                f"plans are compared with the one that a profile of this machine chooses; there is "
                f"none of {untuned[0]}. Run `autochunk tune` with the same --shape"
            )
        every = plans or against is None
        compared = [
            (
                profiles[workload],
                [*(timed_plans(profiles[workload]) if every else ()), *others.get(workload, ())],
            )
            for workload in workloads
        ]
        if memory:
            records = _memory(compared, as_json)
        else:
            records = _rivals(compared, rounds, in_layer, as_json)
    else:
        records = _contenders(workloads, rounds, beside, store, as_json)
    if as_json:
        print_json(records)


def _contenders(
    workloads: Sequence[Workload],
    rounds: int,
    beside: Sequence[str],
    store: Path | None,
    as_json: bool,
) -> list[dict[str, Any]]:
    """The records of ``bench``; its tables are printed as they come."""
    from autochunk.tuner.bench import bench as run

    results = []
    for workload in workloads:
        others = workloads_of(beside, (workload.dtype,), (workload.mode,))
        with use(store=store):
            found = run(workload, rounds=rounds, beside=others)
        records = [bench_record(contender) for contender in found]
        results.append({"workload": workload.key, "contenders": records})
        if not as_json:
            print_parts(bench_table(records, _title(workload)))
    return results


def _rivals(
    compared: Iterable[tuple[Profile, Sequence[Plan]]], rounds: int, in_layer: bool, as_json: bool
) -> list[dict[str, Any]]:
    """The records of ``bench --plans``; its tables are printed as they come."""
    from autochunk.tuner.rivals import rivals as run

    results = []
    for profile, plans in compared:
        record = rivals_record(profile, run(profile, plans, rounds=rounds, in_layer=in_layer))
        results.append(record)
        if not as_json:
            print_parts(rivals_table(record, _title(profile.parsed_workload()), in_layer))
    return results


def _memory(
    compared: Iterable[tuple[Profile, Sequence[Plan]]], as_json: bool
) -> list[dict[str, Any]]:
    """The records of ``bench --memory``; its tables are printed as they come."""
    from autochunk.tuner.memory import memory_of

    results = []
    for profile, plans in compared:
        found = memory_of(profile.parsed_workload(), dict.fromkeys(plans))
        rows = [memory_row(profile, plan, prepared) for plan, prepared in found]
        results.extend(rows)
        if not as_json:
            print_parts(memory_table(rows))
    return results


def _choices(place: str | None) -> dict[Workload, list[Plan]]:
    """What the profiles of a bundle choose, of whichever devices, by workload."""
    chosen: dict[Workload, list[Plan]] = {}
    for profile in bundle.read(place).profiles if place is not None else ():
        if not profile.function and (choice := profile.choose()):
            chosen.setdefault(profile.parsed_workload(), []).append(choice.plan)
    return chosen


def _title(workload: Workload) -> str:
    return f"\n{workload.shape} {workload.dtype} {workload.mode}"
