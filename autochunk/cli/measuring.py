"""The command that measures: ``tune``."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from autochunk.cli.functions import say_of_stale_functions, tune_missed_functions
from autochunk.cli.options import Wanted, json_option, shape_or_preset_options, store_option
from autochunk.cli.printing import make_console, print_profiles, say
from autochunk.device import Device
from autochunk.nvidia import visible_gpus
from autochunk.report.progress import TuneProgress
from autochunk.report.records import profile_row
from autochunk.report.tables import SCATTERED
from autochunk.store.profile import EFFORTS, Effort, Profile
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.events import Ending, Event, Failed, LeftOut, OutOfTime
from autochunk.tuner.outcome import Tuned
from autochunk.workload import Workload

_TIMEOUTS = ", ".join(
    f"{settings.timeout:g} s {effort}" if settings.timeout else f"none {effort}"
    for effort, settings in EFFORT_SETTINGS.items()
)


_NOTHING, _PARTLY = 1, 3  # exit statuses; 2 is for a wrong command line


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
