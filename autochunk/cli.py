"""The ``autochunk`` command: reads arguments, calls the library, prints; no logic of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import autochunk
from autochunk import report
from autochunk.device import Device, detect, visible_gpus
from autochunk.errors import ArgumentError, AutochunkError
from autochunk.store import bundle, layers, merge
from autochunk.store.database import ProfileStore
from autochunk.store.profile import EFFORTS, Effort
from autochunk.store.resolve import resolve, use
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.presets import PRESETS
from autochunk.workload import DTYPES, MODES, DType, Mode, Workload, of_kind, workloads_of

_ONE_LINE = 1000  # columns; Markdown's rows must not be broken
_TIMEOUTS = ", ".join(
    f"{f'{settings.timeout:g} s' if settings.timeout else 'none'} {effort}"
    for effort, settings in EFFORT_SETTINGS.items()
)
_EXAMPLE = "b=1,t=4096,s=4096,h=8,k=64"


class _Commands(click.Group):
    """Turns autochunk's own errors into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AutochunkError as error:
            raise click.ClickException(str(error)) from error


def _shape_options(required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """--shape, --dtype and --mode."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option(
                "--mode", type=click.Choice([*MODES, "both"]), default="both", show_default=True
            ),
            click.option(
                "--dtype",
                "dtypes",
                multiple=True,
                type=click.Choice(DTYPES),
                help="Repeatable. The default for a shape or preset is float32.",
            ),
            click.option(
                "--shape",
                "shapes",
                multiple=True,
                required=required,
                metavar="SHAPE",
                help=f"A workload such as {_EXAMPLE}: batch, T', T, heads, key size; also v=, "
                "kv_heads=, causal=yes, mask=b1ts, bias=1hts. s is t and b is 1 when left out. "
                "Repeatable.",
            ),
        ):
            command = option(command)
        return command

    return decorate


_store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Profile store file; the default is the user's own, or AUTOCHUNK_STORE.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def _modes(mode: str) -> tuple[Mode, ...]:
    return MODES if mode == "both" else (mode,)  # type: ignore[return-value]


def _workloads(shapes: tuple[str, ...], dtypes: tuple[DType, ...], mode: str) -> list[Workload]:
    return workloads_of(shapes, dtypes or ("float32",), _modes(mode))


def _with_presets(shapes: tuple[str, ...], presets: tuple[str, ...]) -> tuple[str, ...]:
    return (*shapes, *(PRESETS[preset] for preset in presets))


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    # A table in a file or a pipe is for reading too: give it room instead of 80 columns.
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=180)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(autochunk.__version__, package_name="autochunk")
def main() -> None:
    """Attention that never holds more logits than it should, tuned once for each machine."""
    # What only looks at a GPU must not take three quarters of its memory, as jax does unless told.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@main.command()
@_shape_options(required=False)
@click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(list(PRESETS)),
    help="A named shape, of a family of models. Repeatable.",
)
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
    help=(
        "Most working memory that a measurement may take; the default is 80% of what is free. "
        "What does not fit is measured later only by --force."
    ),
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
    help=(
        "GPUs to share the work, such as 0,1; they must be alike. The default is jax's default "
        "device."
    ),
)
@click.option(
    "--storage",
    metavar="URL|FILE",
    help=(
        "Tune together with other machines: a database (postgresql://user@host/name) or a journal "
        "file that all reach."
    ),
)
@_store_option
@_json_option
def tune(
    shapes: tuple[str, ...],
    dtypes: tuple[DType, ...],
    mode: str,
    presets: tuple[str, ...],
    missed: bool,
    stale: bool,
    effort: Effort,
    timeout: float | None,
    memory_budget_mb: float | None,
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
    from autochunk.tuner.tune import standard_workloads
    from autochunk.tuner.tune import tune as run

    profile_store = ProfileStore(store)
    named = _workloads(_with_presets(shapes, presets), dtypes, mode)
    workloads: list[Workload] = []

    def choose(device: Device) -> list[Workload]:
        if not (named or missed or stale):
            workloads.extend(
                standard_workloads(profile_store, device, effort, dtypes, _modes(mode))
            )
        workloads.extend(named)
        if missed:
            workloads.extend(
                _or_say(
                    of_kind(profile_store.missed(device), dtypes, _modes(mode)),
                    '"auto" has missed nothing',
                )
            )
        if stale:
            workloads.extend(
                _or_say(
                    of_kind(_stale_or_unfinished(profile_store, device), dtypes, _modes(mode)),
                    "Nothing stored is stale or unfinished",
                )
            )
        return workloads

    try:
        with _ended_like_ctrl_c(), report.TuneProgress(_console(stderr=True)) as progress:
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
    _print_profiles([report.profile_row(profile) for profile in profiles], as_json)
    if workloads and not profiles:
        sys.exit(1)


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Schedulers end a job by SIGTERM, a lost connection by SIGHUP (which nohup has ignored).

    What was measured is to be kept then, too.
    """
    ending = [
        number
        for name in ("SIGTERM", "SIGHUP")
        if (number := getattr(signal, name, None))
        and signal.getsignal(number) is not signal.SIG_IGN
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


def _stale_or_unfinished(store: ProfileStore, device: Device) -> list[Workload]:
    """What is unfinished, too.

    A --stale that was interrupted may have left it in place of what was stale.
    """
    return [
        profile.parsed_workload()
        for profile in store.profiles(device)
        if profile.device.stale_reasons(device) or not profile.complete
    ]


@main.command()
@click.argument("place", metavar="[FILE|URL|-]", required=False)
@click.option(
    "--stale",
    is_flag=True,
    help="Only those of this machine that were measured with other versions.",
)
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@_store_option
@_json_option
def show(place: str | None, stale: bool, markdown: bool, store: Path | None, as_json: bool) -> None:
    """List the profiles in the store, or in a bundle."""
    if place is not None and store is not None:
        raise click.UsageError("name a bundle or --store, not both")
    profile_store = ProfileStore(store)
    now = detect()
    profiles = profile_store.profiles() if place is None else bundle.read(place).profiles
    rows = [
        report.profile_row(profile, now if profile.device.key == now.key else None)
        for profile in profiles
    ]
    rows = [row for row in rows if row["stale"] or not stale]
    if not rows and not as_json:
        click.echo(
            f"No {'stale ' if stale else ''}profiles in "
            f"{place or profile_store.path}.{'' if stale else ' `autochunk tune` makes some.'}"
        )
        return
    _print_profiles(rows, as_json, markdown)


def _print_profiles(rows: list[dict[str, Any]], as_json: bool, markdown: bool = False) -> None:
    if as_json:
        click.echo(report.as_json(rows))
        return
    console = Console(highlight=False, width=_ONE_LINE) if markdown else _console()
    for device in dict.fromkeys(row["device"] for row in rows):
        console.print(
            f"\n{'## ' if markdown else ''}{device}",
            style=None if markdown else "bold",
            markup=False,
        )
        console.print(
            report.profile_table([row for row in rows if row["device"] == device], markdown)
        )


@main.command()
@_shape_options(required=True)
@click.option("--implementation", help='As in the op; leaves "auto" less to choose.')
@click.option("--memory-budget-mb", type=float, metavar="MB", help="As in autochunk.use.")
@_store_option
@_json_option
def explain(
    shapes: tuple[str, ...],
    dtypes: tuple[DType, ...],
    mode: str,
    implementation: str | None,
    memory_budget_mb: float | None,
    store: Path | None,
    as_json: bool,
) -> None:
    """Say what "auto" would do for a shape, and why."""
    with use(memory_budget_mb=memory_budget_mb, store=store):
        resolutions = [
            resolve(workload, implementation) for workload in _workloads(shapes, dtypes, mode)
        ]
    every = layers.all_layers(store)
    for resolution in resolutions:
        accounts = [
            (layer.name, layers.account(layer, resolution.device, resolution.workload))
            for layer in every
        ]
        if not as_json:
            _console().print(report.resolution_text(resolution, accounts), "")
    if as_json:
        click.echo(
            report.as_json([report.resolution_record(resolution) for resolution in resolutions])
        )


@main.command()
@_shape_options(required=False)
@click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(list(PRESETS)),
    help="A named shape, of a family of models. Repeatable.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=10,
    show_default=True,
    help="How often each contender is timed.",
)
@_store_option
@_json_option
def bench(
    shapes: tuple[str, ...],
    dtypes: tuple[DType, ...],
    mode: str,
    presets: tuple[str, ...],
    rounds: int,
    store: Path | None,
    as_json: bool,
) -> None:
    """Say what tuning bought.

    "auto" against haiku's dense attention, the 1000 MB default and others, in one run.

    Without --shape or --preset: every workload that the store has a profile of, for this machine.
    """
    from autochunk.tuner.bench import bench as run

    named = _with_presets(shapes, presets)
    if named:
        workloads = _workloads(named, dtypes, mode)
    else:
        workloads = of_kind(
            (profile.parsed_workload() for profile in ProfileStore(store).profiles(detect())),
            dtypes,
            _modes(mode),
        )
    if not workloads:
        raise click.UsageError(
            "the store has no such profile of this machine; name a --shape or a --preset, or run "
            "`autochunk tune`"
        )
    results = []
    for workload in workloads:
        with use(store=store):
            records = [report.bench_record(contender) for contender in run(workload, rounds=rounds)]
        results.append({"workload": workload.key, "contenders": records})
        if not as_json:
            _console().print(
                report.bench_table(records, f"\n{workload.shape} {workload.dtype} {workload.mode}")
            )
    if as_json:
        click.echo(report.as_json(results))


def _filter_options(command: Callable[..., None]) -> Callable[..., None]:
    """--device, --shape, --dtype and --mode, which choose among profiles."""
    for option in (
        click.option("--mode", type=click.Choice(MODES), help="Only of this mode."),
        click.option("--dtype", type=click.Choice(DTYPES), help="Only of this dtype."),
        click.option(
            "--shape",
            "shapes",
            multiple=True,
            metavar="SHAPE",
            help="Only of workloads with these items, such as t=4096,h=8. Repeatable.",
        ),
        click.option(
            "--device",
            metavar="TEXT",
            help="Only of devices whose name has this in it, as `autochunk show` prints them.",
        ),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("place", metavar="FILE|URL|-")
@_filter_options
@click.option("--note", default="", metavar="TEXT", help="A line for whoever imports them.")
@click.option(
    "--storage",
    metavar="URL|FILE",
    help="The profiles that machines have tuned together there, in place of the store's.",
)
@_store_option
def export(
    place: str,
    device: str | None,
    shapes: tuple[str, ...],
    dtype: str | None,
    mode: str | None,
    note: str,
    storage: str | None,
    store: Path | None,
) -> None:
    """Write profiles to a bundle.

    A file (compressed if its name ends in .gz), a URL, or - for standard output.
    """
    unfinished = 0
    if storage is None:
        found = ProfileStore(store).profiles()
    else:
        from autochunk.tuner.study import Storage

        found, unfinished = Storage(storage, make=False).profiles()
    profiles = merge.select(found, device=device, shapes=shapes, dtype=dtype, mode=mode)
    if found and not profiles:
        raise ArgumentError(
            f"none of the {len(found)} profiles passes these filters, and nothing was written; "
            "`autochunk show` lists them"
        )
    text = bundle.dump(profiles, note)
    if place == "-":
        click.echo(text, nl=False)
    else:
        bundle.write(place, text)
    others = [
        f"{count} {what}"
        for count, what in ((len(found) - len(profiles), "left out"), (unfinished, "not finished"))
        if count
    ]
    click.echo(f"{', '.join([f'{len(profiles)} profiles exported', *others])}.", err=True)


@main.command("import")
@click.argument("place", metavar="FILE|URL|-")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option(
    "--prefer",
    type=click.Choice(merge.PREFERENCES),
    default="best-effort",
    show_default=True,
    help="Which of two different profiles of one device and workload stays: the newest, the one of "
    "best effort (complete, thorough, then newest), "
    "the bundle's (theirs) or the store's (ours).",
)
@_store_option
@_json_option
def import_(
    place: str, dry_run: bool, prefer: merge.Preference, store: Path | None, as_json: bool
) -> None:
    """Add the profiles of a bundle (a file, a URL, or - for standard input) to the store.

    All that --prefer lets in, or on an error none.
    """
    plan = merge.merge(ProfileStore(store), bundle.read(place), prefer, dry_run)
    if as_json:
        click.echo(report.as_json(report.import_records(plan)))
        return
    _console().print(report.import_text(plan, dry_run))


@main.command()
@_filter_options
@click.option(
    "--stale",
    is_flag=True,
    help="Only those of this machine that were measured with other versions.",
)
@click.option(
    "--older-than",
    type=click.IntRange(0),
    metavar="DAYS",
    help="Only those measured more than so many days ago.",
)
@click.option(
    "--unreadable",
    is_flag=True,
    help="Rows of the store that no version can read, and nothing else.",
)
@click.option(
    "--missed",
    is_flag=True,
    help='What "auto" found no profile for on this machine, and nothing else.',
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@_store_option
def forget(
    device: str | None,
    shapes: tuple[str, ...],
    dtype: str | None,
    mode: str | None,
    stale: bool,
    older_than: int | None,
    unreadable: bool,
    missed: bool,
    yes: bool,
    store: Path | None,
) -> None:
    """Delete profiles from the store: those that every option lets through. Asks first."""
    profile_store = ProfileStore(store)
    if unreadable:
        keys = profile_store.unreadable()
        if _agreed_to_forget(keys, yes):
            click.echo(f"{profile_store.forget_unreadable()} rows forgotten.", err=True)
        return
    if missed:
        if _agreed_to_forget([workload.key for workload in profile_store.missed(detect())], yes):
            click.echo(f"{profile_store.forget_missed(detect())} misses forgotten.", err=True)
        return
    if not (device or shapes or dtype or mode or stale or older_than is not None):
        options = (
            "--device, --shape, --dtype, --mode, --stale, --older-than, --unreadable or --missed"
        )
        raise click.UsageError(f"name what to forget: {options} (all profiles: --older-than 0)")
    chosen = merge.select(
        profile_store.profiles(), device=device, shapes=shapes, dtype=dtype, mode=mode
    )
    if stale:
        now = detect()
        chosen = [
            profile
            for profile in chosen
            if profile.device.key == now.key and profile.device.stale_reasons(now)
        ]
    if older_than is not None:
        chosen = [profile for profile in chosen if profile.age_days() >= older_than]
    if _agreed_to_forget([f"{profile.device.key} | {profile.workload}" for profile in chosen], yes):
        click.echo(f"{profile_store.forget(chosen)} profiles forgotten.", err=True)


def _agreed_to_forget(names: list[str], yes: bool) -> bool:
    if not names:
        click.echo("There is nothing to forget.", err=True)
        return False
    for name in names:
        click.echo(name, err=True)
    return yes or click.confirm(f"Forget these {len(names)}?", err=True)


@main.command()
@click.option(
    "--verify",
    "count",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Time N profiles of this machine again, first those tuned here, the oldest first.",
)
@_store_option
@_json_option
def doctor(count: int, store: Path | None, as_json: bool) -> None:
    """Look over the whole set-up, and say how to cure what is wrong with it.

    Exit status 1 if anything is.
    """
    from autochunk.doctor import examine

    findings = []
    for finding in examine(store, verify_count=count):
        findings.append(finding)
        if not as_json:
            _console().print(report.finding_text(finding))
    if as_json:
        click.echo(report.as_json([report.finding_record(finding) for finding in findings]))
    if any(finding.level == "problem" for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    main()
