"""The ``autochunk`` command: reads arguments, calls the library, prints; no logic of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import click
from rich.console import Console

import autochunk
from autochunk import report
from autochunk.device import detect, visible_gpus
from autochunk.errors import AutochunkError
from autochunk.store import bundle
from autochunk.store.database import ProfileStore
from autochunk.store.profile import EFFORTS
from autochunk.store.resolve import resolve, use
from autochunk.tuner.presets import PRESETS, preset_shapes
from autochunk.workload import DTYPES, MODES, Mode, Workload

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
            click.option("--mode", type=click.Choice([*MODES, "both"]), default="both", show_default=True),
            click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True),
            click.option(
                "--shape", "shapes", multiple=True, required=required, metavar="SHAPE",
                help=f"A workload such as {_EXAMPLE}: batch, T', T, heads, key size; also v=, kv_heads=, causal=yes, mask=b1ts, bias=1hts. "
                "s is t and b is 1 when left out. Repeatable.",
            ),
        ):  # fmt: skip
            command = option(command)
        return command

    return decorate


_store_option = click.option("--store", type=click.Path(path_type=Path), help="Profile store file; the default is the user's own, or AUTOCHUNK_STORE.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def _workloads(shapes: tuple[str, ...], dtype: str, mode: str) -> list[Workload]:
    modes: tuple[Mode, ...] = MODES if mode == "both" else (mode,)  # type: ignore[assignment]
    return [Workload.parse(shape, dtype=dtype, mode=each) for shape in shapes for each in modes]


def _with_presets(shapes: tuple[str, ...], presets: tuple[str, ...]) -> tuple[str, ...]:
    return (*shapes, *(shape for preset in presets for shape in preset_shapes(preset)))


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    # A table in a file or a pipe is for reading too: give it room instead of 80 columns.
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=180)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(autochunk.__version__, package_name="autochunk")
def main() -> None:
    """Attention that never holds more logits than it should, tuned once for each machine."""


@main.command()
@_shape_options(required=False)
@click.option("--preset", "presets", multiple=True, type=click.Choice(list(PRESETS)), help="A named family of shapes. Repeatable.")
@click.option("--missed", is_flag=True, help='What "auto" found no profile for on this machine.')
@click.option("--effort", type=click.Choice(EFFORTS), default="standard", show_default=True)
@click.option("--timeout", type=float, metavar="SECONDS", help="Time for all of it; the default is the effort's: 110 s quick, 570 s standard, none thorough.")
@click.option("--memory-budget-mb", type=float, metavar="MB", help="Most working memory that a measurement may take; the default is 80% of what is free.")
@click.option("--force", is_flag=True, help="Measure again what is stored.")
@click.option("--devices", metavar="all|LIST", help="GPUs to share the work, such as 0,1; they must be alike. The default is jax's default device.")
@_store_option
@_json_option
def tune(shapes: tuple[str, ...], dtype: str, mode: str, presets: tuple[str, ...], missed: bool, effort: str, timeout: float | None,
         memory_budget_mb: float | None, force: bool, devices: str | None, store: Path | None, as_json: bool) -> None:  # fmt: skip
    """Measure this machine and keep what is best.

    Without --shape, --preset or --missed: what "auto" has missed here, then a standard set of shapes.
    """
    from autochunk.tuner.tune import tune as run

    profile_store = ProfileStore(store)
    named = _with_presets(shapes, presets)
    workloads: list[Workload] | None = _workloads(named, dtype, mode)
    if missed:
        workloads = [*(workloads or []), *profile_store.missed(detect())]
        if not workloads:
            click.echo('"auto" has missed nothing on this machine.', err=True)
    elif not named:
        workloads = None
    try:
        with report.TuneProgress(_console(stderr=True)) as progress:
            profiles = run(
                workloads, effort=effort, timeout=timeout, force=force, store=profile_store, memory_budget_mb=memory_budget_mb, on_event=progress,  # type: ignore[arg-type]
                gpus=visible_gpus(devices) if devices else (),
            )  # fmt: skip
    except KeyboardInterrupt:
        click.echo("Interrupted. What was measured is kept; the same command goes on from here.", err=True)
        sys.exit(130)
    _print_profiles([report.profile_row(profile) for profile in profiles], as_json)
    if not profiles and workloads != []:
        sys.exit(1)


@main.command()
@_store_option
@_json_option
def show(store: Path | None, as_json: bool) -> None:
    """List the profiles in the store."""
    profile_store = ProfileStore(store)
    now = detect()
    profiles = profile_store.profiles()
    rows = [report.profile_row(profile, now if profile.device.key == now.key else None) for profile in profiles]
    if not rows and not as_json:
        click.echo(f"No profiles in {profile_store.path}. `autochunk tune` makes some.")
        return
    _print_profiles(rows, as_json)


def _print_profiles(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(report.as_json(rows))
        return
    console = _console()
    for device in dict.fromkeys(row["device"] for row in rows):
        console.print(f"\n{device}", style="bold", markup=False)
        console.print(report.profile_table([row for row in rows if row["device"] == device]))


@main.command()
@_shape_options(required=True)
@click.option("--implementation", help='As in the op; leaves "auto" less to choose.')
@click.option("--memory-budget-mb", type=float, metavar="MB", help="As in autochunk.use.")
@_store_option
@_json_option
def explain(shapes: tuple[str, ...], dtype: str, mode: str, implementation: str | None, memory_budget_mb: float | None, store: Path | None,
            as_json: bool) -> None:  # fmt: skip
    """Say what "auto" would do for a shape, and why."""
    with use(memory_budget_mb=memory_budget_mb, store=store):
        resolutions = [resolve(workload, implementation) for workload in _workloads(shapes, dtype, mode)]
    if as_json:
        click.echo(report.as_json([report.resolution_record(resolution) for resolution in resolutions]))
        return
    for resolution in resolutions:
        _console().print(report.resolution_text(resolution), "")


@main.command()
@_shape_options(required=False)
@click.option("--preset", "presets", multiple=True, type=click.Choice(list(PRESETS)), help="A named family of shapes. Repeatable.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=10, show_default=True, help="How often each contender is timed.")
@_store_option
@_json_option
def bench(shapes: tuple[str, ...], dtype: str, mode: str, presets: tuple[str, ...], rounds: int, store: Path | None, as_json: bool) -> None:
    """Say what tuning bought: "auto" against haiku's dense attention, the 1000 MB default and others, in one run.

    Without --shape or --preset: every workload that the store has a profile of, for this machine.
    """
    from autochunk.tuner.bench import bench as run

    named = _with_presets(shapes, presets)
    workloads = _workloads(named, dtype, mode) if named else [profile.parsed_workload() for profile in ProfileStore(store).profiles(detect())]
    if not workloads:
        raise click.UsageError("the store has no profile of this machine; name a --shape or a --preset, or run `autochunk tune`")
    results = []
    for workload in workloads:
        with use(store=store):
            records = [report.bench_record(contender) for contender in run(workload, rounds=rounds)]
        results.append({"workload": workload.key, "contenders": records})
        if not as_json:
            _console().print(report.bench_table(records, f"\n{workload.shape} {workload.dtype} {workload.mode}"))
    if as_json:
        click.echo(report.as_json(results))


@main.command()
@click.argument("file", type=click.File("w", lazy=True))
@_store_option
def export(file: IO[str], store: Path | None) -> None:
    """Write all profiles of the store to FILE (- is standard output)."""
    profiles = ProfileStore(store).profiles()
    file.write(bundle.dump(profiles))
    click.echo(f"{len(profiles)} profiles exported.", err=True)


@main.command("import")
@click.argument("file", type=click.File("rb"))
@_store_option
def import_(file: IO[bytes], store: Path | None) -> None:
    """Add the profiles in FILE (- is standard input) to the store; of two for one device and workload the later one stays."""
    found = bundle.load(file.read(bundle.MOST_BYTES + 1), getattr(file, "name", "standard input"))
    summary = bundle.merge(ProfileStore(store), found)
    click.echo(f"{summary.new} new, {summary.updated} updated, {summary.kept} kept as they were.", err=True)


if __name__ == "__main__":
    main()
