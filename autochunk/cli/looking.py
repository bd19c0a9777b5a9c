"""Commands that look, and change nothing: ``show``, ``explain``, ``evaluate``, ``doctor``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from autochunk.cli.options import (
    Wanted,
    json_option,
    shape_or_preset_options,
    stale_option,
    store_option,
)
from autochunk.cli.printing import make_console, print_json, print_parts, print_profiles, say
from autochunk.device import detect
from autochunk.errors import ReportError, WorkloadError
from autochunk.functions import FunctionCall, is_function
from autochunk.report.curve import curve_record
from autochunk.report.evaluation import evaluation_record, evaluation_table, replays_table
from autochunk.report.records import (
    finding_record,
    function_record,
    memory_rows,
    profile_row,
    resolution_record,
)
from autochunk.report.tables import memory_table
from autochunk.report.terminal import MOST_COLUMNS, curve_text
from autochunk.report.text import finding_text, function_text, resolution_text
from autochunk.resolution.answer import Resolution
from autochunk.resolution.functions import resolve_function
from autochunk.resolution.layers import Layer, account, every_profile
from autochunk.resolution.places import all_layers
from autochunk.resolution.resolve import resolve
from autochunk.resolution.settings import use
from autochunk.store import bundle, merge
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore


@click.command()
@click.argument("place", metavar="[FILE|URL|-]", required=False)
@stale_option
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@click.option(
    "--memory",
    is_flag=True,
    help="Print the working memory of each plan, as XLA predicts it and as it was measured.",
)
@click.option(
    "--plot",
    "shapes",
    multiple=True,
    metavar="SHAPE",
    help="Plot time against memory of every plan, for workloads with these items, such as "
    "t=4096,mode=training, or of functions name=NAME. Repeatable. Needs the extra "
    "autochunk[report].",
)
@store_option
@json_option
def show(
    place: str | None,
    stale: bool,
    markdown: bool,
    memory: bool,
    shapes: tuple[str, ...],
    store: Path | None,
    as_json: bool,
) -> None:
    """List the profiles in the store, or in a bundle."""
    if place is not None and store is not None:
        raise click.UsageError("name a bundle or --store, not both")
    profile_store = ProfileStore(store)
    now = detect()
    profiles = profile_store.profiles() if place is None else bundle.read(place).profiles
    shown = [p for p in profiles if not stale or p.stale_reasons(now)]
    if shapes:
        _plot(merge.select(shown, shapes=shapes), as_json)
        return
    rows = [row for profile in shown for row in memory_rows(profile)] if memory else []
    if rows or (memory and as_json):
        print_profiles(rows, as_json, markdown, memory_table)
    elif memory and shown:
        say("None of these profiles has a plan that was timed.")
    elif shown or as_json:
        print_profiles([profile_row(profile, now) for profile in shown], as_json, markdown)
    elif stale:
        say(f"No stale profiles in {place or profile_store.path}.")
    elif place is None and (obstacle := profile_store.obstacle()):
        say(
            f"No profiles in {profile_store.path}, which cannot be made ({obstacle}): name another "
            "file by AUTOCHUNK_STORE or --store."
        )
    else:
        say(f"No profiles in {place or profile_store.path}. `autochunk tune` makes some.")


def _plot(profiles: Sequence[Profile], as_json: bool) -> None:
    """The memory-time curves of ``show --plot``; of no profile an error."""
    if not profiles:
        raise ReportError("no profile has these items; `autochunk show` lists those there are")
    records = [{**profile_row(profile), "curve": curve_record(profile)} for profile in profiles]
    if as_json:
        print_json(records)
        return
    console = make_console()
    for one in records:
        title = f"{one['shape']} {one['dtype']} {one['mode']}"
        columns = min(console.width, MOST_COLUMNS)
        say(f"{curve_text(one['curve'], title, columns)}\n")


@click.command()
@shape_or_preset_options
@click.option(
    "--function",
    metavar="NAME",
    help="Instead of a shape: functions with this in their name that were measured or missed here.",
)
@click.option("--implementation", help='Let "auto" choose this one only, such as cudnn.')
@click.option("--memory-budget-mb", type=float, metavar="MB", help="As in autochunk.use.")
@store_option
@json_option
def explain(
    wanted: Wanted,
    function: str | None,
    implementation: str | None,
    memory_budget_mb: float | None,
    store: Path | None,
    as_json: bool,
) -> None:
    """Say what "auto" would do for a shape, and why."""
    if not wanted.named() and function is None:
        raise click.UsageError("name a --shape, a --preset or a --function")
    with use(memory_budget_mb=memory_budget_mb, store=store):
        calls = [] if function is None else _functions(function, store)
        answers = [resolve_function(call) for call in calls]
        resolutions = [resolve(workload, implementation) for workload in wanted.named()]
    if as_json:
        print_json([*map(resolution_record, resolutions), *map(function_record, answers)])
        return
    for answer in answers:
        print_parts(function_text(answer), "")
    if function is not None and not answers:
        say(f"No function with {function!r} in its name was measured or missed here.")
    layers = all_layers(store)
    for resolution in resolutions:
        accounts = [(layer.name, _account(layer, resolution)) for layer in layers]
        print_parts(resolution_text(resolution, accounts), "")


def _account(layer: Layer, resolution: Resolution) -> str:
    text = account(layer, resolution.device, resolution.workload)
    obstacle = layer.obstacle() if isinstance(layer, ProfileStore) else ""
    return f"{text}, and cannot be made: {obstacle}" if obstacle else text


def _functions(name: str, store: Path | None) -> list[FunctionCall]:
    """Calls of functions with this in their name, that were measured or missed on this device."""
    device, own = detect(), ProfileStore(store)
    keys = {key for layer in all_layers(store) for key in layer.workloads(device)}
    calls = set(own.missed_functions(device))
    for key in filter(is_function, keys):
        with contextlib.suppress(WorkloadError):  # written by a newer version
            calls.add(FunctionCall.parse(key))
    ordered = sorted(calls, key=lambda call: call.key)
    return [call for call in ordered if name in call.name]


@click.command()
@click.argument("places", metavar="[FILE|URL]...", nargs=-1)
@click.option("--devices", is_flag=True, help="Leave out a whole device, not one workload.")
@click.option("--worst", type=click.IntRange(0), default=5, metavar="N", help="List the N worst.")
@store_option
@json_option
def evaluate(
    places: tuple[str, ...], devices: bool, worst: int, store: Path | None, as_json: bool
) -> None:
    """Say how good predictions for untuned shapes are.

    Each profile is left out and predicted from the others. The profiles are those of the bundles
    named, or else all that "auto" asks.
    """
    from autochunk.predict.evaluate import replay, summaries

    if places:
        profiles = [profile for place in places for profile in bundle.read(place).profiles]
    else:
        profiles = every_profile(all_layers(store))
    replays = replay(profiles, devices=devices)
    record = evaluation_record(summaries(replays), replays)
    if as_json:
        print_json(record)
        return
    if not replays:
        say("Too few profiles: one is predicted from others. `autochunk tune` makes some.")
        return
    print_parts(evaluation_table(record["devices"]))
    shown = sorted(record["workloads"], key=lambda one: -one["regret"])[:worst]
    if shown:
        print_parts("", replays_table(shown))


@click.command()
@click.option(
    "--verify",
    "count",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Time N profiles of this machine again, first those tuned here, the oldest first.",
)
@store_option
@json_option
def doctor(count: int, store: Path | None, as_json: bool) -> None:
    """Check the whole set-up, and say what to mend.

    Exit status 1 if anything is wrong.
    """
    from autochunk.doctor import examine
    from autochunk.tuner import page_faults

    findings = []
    for finding in examine(store, verify_count=count, page_faults=page_faults.cost):
        findings.append(finding)
        if not as_json:
            print_parts(finding_text(finding))
    if as_json:
        print_json([finding_record(finding) for finding in findings])
    if any(finding.level == "problem" for finding in findings):
        sys.exit(1)
