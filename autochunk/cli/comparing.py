"""The command that compares: ``bench``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from autochunk.cli.options import Wanted, json_option, shape_or_preset_options, store_option
from autochunk.cli.printing import print_json, print_parts
from autochunk.device import detect
from autochunk.plan import Plan
from autochunk.report.records import bench_record, memory_row, rivals_record
from autochunk.report.tables import bench_table, memory_table, rivals_table
from autochunk.resolution.settings import use
from autochunk.store import bundle
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.presets import workloads_of
from autochunk.workload import Workload

# Of ``bench --plans`` on a CPU.
_PROCESSES = 3


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
@click.option(
    "--processes",
    type=click.IntRange(1, 100),
    help="With --plans, --against or --in-layer: time each pair in so many processes, one after "
    "the other, and say what is in the middle: a process favours some plan in all its rounds.  "
    "[default: 3 on a CPU, else 1]",
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
    processes: int | None,
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
            records = _rivals(compared, rounds, processes, in_layer, as_json)
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
    compared: Iterable[tuple[Profile, Sequence[Plan]]],
    rounds: int,
    processes: int | None,
    in_layer: bool,
    as_json: bool,
) -> list[dict[str, Any]]:
    """The records of ``bench --plans``; its tables are printed as they come."""
    from autochunk.tuner.rivals import rivals, rivals_of_several

    results = []
    for profile, plans in compared:
        # This process has an accelerator's memory, and others would find none.
        several = processes or (_PROCESSES if profile.device.platform == "cpu" else 1)
        choice = profile.choose()
        if several == 1 or choice is None or {choice.plan}.issuperset(plans):
            found = rivals(profile, plans, rounds=rounds, in_layer=in_layer)
        else:
            found = rivals_of_several(
                profile, plans, processes=several, rounds=rounds, in_layer=in_layer
            )
        record = rivals_record(profile, found)
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
