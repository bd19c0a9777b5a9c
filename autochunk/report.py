"""What people and scripts are shown: pure functions from results to rows, then drawing."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from rich.box import MARKDOWN
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from autochunk.device import Device
from autochunk.store.merge import ImportPlan, Relation
from autochunk.store.profile import DEFAULT, DENSE, Measurement, Profile
from autochunk.store.resolve import Resolution

if TYPE_CHECKING:
    from autochunk.doctor import Finding
    from autochunk.tuner.bench import Contender
    from autochunk.tuner.tune import Event

# --- Data -----------------------------------------------------------------------------------------


def profile_row(profile: Profile, now: Device | None = None) -> dict[str, Any]:
    """One profile as a flat record.

    ``speedup_*`` are times of the baseline over that of the chosen plan; ``memory_vs_dense`` is the
    chosen plan's working memory over dense's; ``spread`` is half the interquartile range of the
    time ratio to dense, relative to it. None where a baseline could not be measured.
    """
    workload = profile.parsed_workload()
    choice = profile.choose()
    best = choice.measurement if choice else None
    dense, default = profile.baseline(DENSE), profile.baseline(DEFAULT)
    return {
        "workload": profile.workload,
        "shape": workload.shape,
        "dtype": workload.dtype,
        "mode": workload.mode,
        "device": profile.device.key,
        "plan": str(best.plan) if best else None,
        "implementation": best.implementation if best else None,
        "max_chunk_size_mb": best.max_chunk_size_mb if best else None,
        "seconds": best.seconds_median if best else None,
        "speedup_vs_dense": _over(dense, best),
        "speedup_vs_default": _over(default, best),
        "temp_bytes": best.temp_bytes if best else None,
        "memory_vs_dense": best.temp_bytes / dense.temp_bytes
        if best and dense and best.temp_bytes is not None and dense.temp_bytes
        else None,
        "spread": math.hypot(best.spread, dense.spread)
        if best and dense
        else best.spread
        if best
        else None,
        "repeats": len(best.ratios) if best else 0,
        "plans_measured": len(profile.measurements),
        "effort": profile.effort,
        "complete": profile.complete,
        "created": profile.created,
        "stale": profile.device.stale_reasons(now) if now else [],
        "reason": choice.reason if choice else "no plan could be measured",
    }


def _over(baseline: Measurement | None, best: Measurement | None) -> float | None:
    if baseline is None or best is None or not best.ratio:
        return None
    return 1.0 if baseline.plan == best.plan else baseline.ratio / best.ratio


def resolution_record(resolution: Resolution) -> dict[str, Any]:
    """A Resolution as plain data."""
    return {
        "workload": resolution.workload.key,
        "device": resolution.device.key,
        "implementation": resolution.plan.implementation,
        "max_chunk_size_mb": resolution.plan.max_chunk_size_mb,
        "match": resolution.match,
        "layer": resolution.layer,
        "reason": resolution.reason,
        "source": resolution.source,
        "stale": list(resolution.stale),
        "asked": [{"layer": layer, "answer": answer} for layer, answer in resolution.asked],
        "rejected": [{"plan": plan, "why": why} for plan, why in resolution.rejected],
    }


def import_records(plan: ImportPlan) -> list[dict[str, Any]]:
    """What an import does, as plain data."""
    return [
        {
            "device": entry.profile.device.key,
            "workload": entry.profile.workload,
            "relation": entry.relation,
            "taken": entry.taken,
            "reason": entry.reason,
        }
        for entry in plan.entries
    ]


def finding_record(finding: Finding) -> dict[str, Any]:
    """A doctor's finding as plain data."""
    return asdict(finding)


def bench_record(contender: Contender) -> dict[str, Any]:
    """A bench contender as plain data; ``ratio`` is time relative to haiku's dense attention."""
    return {
        "name": contender.name,
        "seconds": contender.seconds_median,
        "ratio": contender.ratio,
        "spread": contender.spread,
        "temp_bytes": contender.temp_bytes,
        "detail": contender.detail,
    }


# --- Drawing --------------------------------------------------------------------------------------


def as_json(data: Any) -> str:
    """Data as JSON text for scripts."""
    return json.dumps(data, indent=1, allow_nan=False)


def profile_table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> Table:
    """The table that ends ``autochunk tune`` and that ``autochunk show`` prints."""
    table = Table(box=MARKDOWN if markdown else None, pad_edge=markdown, header_style="bold")
    for title in (
        "workload",
        "mode",
        "chosen plan",
        "time vs dense",
        "vs 1000 MB",
        "memory vs dense",
        "spread",
        "notes",
    ):
        table.add_column(title, overflow="fold", no_wrap=title in ("mode", "spread"))
    for row in rows:
        dtype = "" if row["dtype"] == "float32" else f" {row['dtype']}"
        table.add_row(
            row["shape"] + dtype,
            row["mode"],
            row["plan"] or "none",
            faster(row["speedup_vs_dense"]),
            faster(row["speedup_vs_default"]),
            _memory(row["temp_bytes"], row["memory_vs_dense"]),
            _percent(row["spread"]),
            _notes(row),
        )
    return table


def faster(ratio: float | None) -> str:
    """A speed-up such as ``2.10x``."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def _memory(temp_bytes: int | None, share: float | None) -> str:
    if temp_bytes is None:
        return "-"
    text = f"{temp_bytes / 1e6:.0f} MB"
    if share is None or share < 1 / 9999:
        return text
    return f"{text} (1/{1 / share:.1f})" if share < 1 else f"{text} ({share:.1f}x)"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"±{value:.1%}"


def _notes(row: dict[str, Any]) -> str:
    notes = [] if row["complete"] else ["unfinished"]
    if row["stale"]:
        notes.append("stale: " + "; ".join(row["stale"]))
    if row["plan"] is None:
        notes.append(row["reason"])
    return "; ".join(notes)


def resolution_text(resolution: Resolution, accounts: Sequence[tuple[str, str]] = ()) -> Group:
    """The answer to "why did it pick that?"; ``accounts`` says of each layer what it has."""
    plan = resolution.plan
    lines = [
        f"workload  {resolution.workload.key}",
        f"device    {resolution.device.key}",
        '"auto" is '
        f"max_chunk_size_mb={plan.max_chunk_size_mb if plan.max_chunk_size_mb is None else format(plan.max_chunk_size_mb, 'g')}, "
        f'implementation="{plan.implementation}"',
        f"because   {resolution.reason}",
        f"from      {resolution.layer} "
        f"({resolution.match}{', stale: ' + '; '.join(resolution.stale) if resolution.stale else ''})",
    ]
    if resolution.profile is not None:
        measured = resolution.profile
        lines.append(
            f"measured  {measured.created}, effort {measured.effort}, jaxlib "
            f"{measured.device.jaxlib}, autochunk {measured.autochunk}"
        )
    parts: list[Any] = [
        Text("\n".join(lines)),
        Text("\nasked, in this order:"),
        _pairs(resolution.asked or [("use(...)", "answered")]),
    ]
    if accounts:
        parts += [Text("\nwhat each layer has:"), _pairs(accounts)]
    if resolution.rejected:
        parts += [Text("\nother plans:"), _pairs(resolution.rejected)]
    return Group(*parts)


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for first, second in pairs:
        table.add_row(Text("  " + first), Text(second))
    return table


def import_text(plan: ImportPlan, dry_run: bool) -> Group:
    """What an import did, or would do.

    Each profile that is not simply new or the same, and how many there are of each kind.
    """
    told = [entry for entry in plan.entries if entry.relation not in ("new", "same")]
    table = Table(box=None, show_header=False, pad_edge=False)
    for entry in told:
        table.add_row(
            entry.relation,
            "stored" if entry.taken else "left out",
            Text(entry.profile.workload),
            Text(entry.profile.device.key),
            Text(entry.reason),
        )
    counts = ", ".join(f"{plan.count(relation)} {relation}" for relation in get_args(Relation))
    stored = (
        f"{len(plan.taken)} of {len(plan.entries)} profiles {'would be' if dry_run else 'were'} "
        "stored."
    )
    return Group(*([table] if told else []), Text(f"{counts}. {stored}"))


def finding_text(finding: Finding) -> Text:
    """One line of ``autochunk doctor``, and its cure under it."""
    style = {"ok": "green", "note": "yellow", "problem": "red"}[finding.level]
    text = Text.assemble(
        (f"{finding.level:8}", style), (finding.subject, "bold"), f": {finding.detail}"
    )
    return text.append(f"\n        to do: {finding.cure}") if finding.cure else text


def bench_table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """The table of ``autochunk bench``."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("", "time", "vs haiku dense", "spread", "memory", ""):
        table.add_column(name)
    for record in records:
        time_text = "-" if record["seconds"] is None else f"{record['seconds'] * 1e3:.2f} ms"
        memory = "-" if record["temp_bytes"] is None else f"{record['temp_bytes'] / 1e6:.0f} MB"
        speedup = faster(1 / record["ratio"] if record["ratio"] else None)
        table.add_row(
            record["name"],
            time_text,
            speedup,
            _percent(record["spread"]),
            memory,
            Text(record["detail"]),
        )
    return table


class TuneProgress:
    """Shows the events of a tune: a live display in a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._start = time.monotonic()
        self._lock = threading.Lock()  # several GPUs tell of their workloads at the same time
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[best]}"),
            console=console,
        )
        self._live = (
            Live(self._progress, console=console, transient=True) if console.is_terminal else None
        )
        self._best: dict[Any, Measurement] = {}
        self._tasks: dict[Any, TaskID] = {}

    def __enter__(self) -> TuneProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Takes one event, in whichever thread."""
        label = (
            f"[{event.number}/{event.count}] {event.workload.shape} {event.workload.dtype} "
            f"{event.workload.mode}"
            if event.workload
            else ""
        )
        with self._lock:
            if event.kind == "device":
                assert event.device is not None
                self._say(f"device: {event.device.key}")
            elif event.kind == "measured":
                self._measured(event)
            elif event.kind != "start":
                if event.workload in self._tasks:
                    self._progress.remove_task(self._tasks.pop(event.workload))
                self._say(f"{label}: {self._ending(event)}")
            elif not self._live:
                self._say(f"{label} ...")
            elif event.workload not in self._tasks:  # two workers may begin with one workload
                self._tasks[event.workload] = self._progress.add_task(label, total=None, best="")

    def _measured(self, event: Event) -> None:
        measurement = event.measurement
        assert measurement is not None
        best = self._best.get(event.workload)
        if measurement.status == "ok" and (best is None or measurement.ratio < best.ratio):
            best = self._best[event.workload] = measurement
        if event.workload in self._tasks:
            text = f"best {best.plan}, {best.seconds_median * 1e3:.1f} ms" if best else ""
            self._progress.update(
                self._tasks[event.workload], completed=event.done, total=event.total, best=text
            )
        else:
            result = (
                f"{measurement.seconds_median * 1e3:.1f} ms"
                if measurement.timed
                else measurement.status
            )
            self._say(f"  [{event.number}] {event.done}/{event.total} {measurement.plan}: {result}")

    def _ending(self, event: Event) -> str:
        if event.kind == "awaited":
            return "other workers are still at it"
        if event.kind == "failed":
            return f"{'failed' if event.profile else 'not measured'}: {event.detail}"
        if event.kind == "out_of_time":
            stays = (
                f"out of time, and the profile from before stays ({event.profile.effort})"
                if event.profile
                else "not measured: out of time"
            )
            return f"{stays}; the same command goes on from here"
        assert event.profile is not None
        if event.kind == "skipped":
            return (
                f"tuned before ({event.profile.effort}, {event.profile.created}); --force "
                "measures again"
            )
        choice = event.profile.choose()
        result = str(choice.plan) if choice else "no plan could be measured"
        return (
            result
            if event.profile.complete
            else f"{result} (unfinished: out of time; the same command goes on from here)"
        )

    def _say(self, line: str) -> None:
        if self._live:
            self.console.print(line, highlight=False, markup=False)
        else:
            self.console.print(
                f"{time.monotonic() - self._start:6.1f} s  {line}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
