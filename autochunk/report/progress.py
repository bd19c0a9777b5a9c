"""A tune while it runs: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.tuner.events import (
    Awaited,
    DeviceFound,
    Disturbance,
    Ending,
    Event,
    Failed,
    Finished,
    LeftOut,
    Measured,
    OtherWork,
    OutOfTime,
    SharedGpu,
    Skipped,
    SlowedGpu,
    Started,
    Subject,
)
from autochunk.workload import Workload, key_items

_GOES_ON = "the same command goes on from here"


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
        self._best: dict[Workload, Measurement] = {}
        self._tasks: dict[Workload, TaskID] = {}

    def __enter__(self) -> TuneProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Takes one event, in whichever thread."""
        with self._lock:
            match event:
                case DeviceFound():
                    self._say(f"device: {event.device.key}")
                case OtherWork() | SharedGpu() | SlowedGpu():
                    self._say(
                        f"{_disturbance(event)}: what is close may have been told apart wrongly, "
                        "or not at all"
                    )
                case LeftOut():
                    for line in _left_out(event):
                        self._say(line)
                case Started():
                    self._started(event)
                case Measured():
                    self._measured(event)
                case _:
                    self._ended(event)

    def _started(self, event: Started) -> None:
        if not self._live:
            self._say(f"{_label(event)} ...")
        elif event.workload not in self._tasks:  # two workers may begin with one workload
            task = self._progress.add_task(_label(event), total=None, best="")
            self._tasks[event.workload] = task

    def _measured(self, event: Measured) -> None:
        measurement = event.measurement
        best = self._best.get(event.workload)
        if measurement.status == "ok" and (best is None or measurement.ratio < best.ratio):
            best = self._best[event.workload] = measurement
        task = self._tasks.get(event.workload)
        if task is not None:
            text = f"best {best.plan}, {_milliseconds(best)}" if best else ""
            self._progress.update(task, completed=event.done, total=event.total, best=text)
        else:
            result = _milliseconds(measurement) if measurement.timed else measurement.status
            self._say(f"  [{event.number}] {event.done}/{event.total} {measurement.plan}: {result}")

    def _ended(self, event: Ending) -> None:
        if event.workload in self._tasks:
            self._progress.remove_task(self._tasks.pop(event.workload))
        self._say(f"{_label(event)}: {_ending(event)}")

    def _say(self, line: str) -> None:
        # A full disk under a log is no reason to end hours of measuring.
        with contextlib.suppress(OSError):
            if self._live:
                self.console.print(line, highlight=False, markup=False)
            else:
                line = f"{time.monotonic() - self._start:6.1f} s  {line}"
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _disturbance(event: Disturbance) -> str:
    match event:
        case OtherWork():
            return f"other programs had {event.cores:.1f} of {event.of} cores meanwhile"
        case SharedGpu():
            programs = "another program" if event.programs == 1 else f"{event.programs} programs"
            return f"{programs} had the GPU in use as well"
        case SlowedGpu():
            return (
                f"the GPU's clocks were held down for {event.share:.0%} of the time "
                f"({event.reason})"
            )


def _left_out(event: LeftOut) -> Iterator[str]:
    if event.known:
        yield f'{len(event.known)} that "auto" missed need no measuring: their answer is known'
    if event.workloads:
        families = collections.Counter(_family(workload) for workload in event.workloads)
        each = "; ".join(f"{count} of {name}" for name, count in families.most_common())
        command = "`autochunk tune --missed`" if event.missed else "the same command"
        yield f"left out for want of time: {each}; {command} goes on from here"


def _family(workload: Workload) -> str:
    """What workloads that differ only in sizes have in common, but for what most calls have."""
    items = key_items(workload.family)  # the first of them is a dtype alone
    forms = [f"{name}={value}" for name, value in items.items() if value not in ("", "no", "none")]
    return " ".join([workload.dtype, *forms]).replace("mode=", "")


def _label(event: Subject) -> str:
    workload = event.workload
    return f"[{event.number}/{event.count}] {workload.shape} {workload.dtype} {workload.mode}"


def _milliseconds(measurement: Measurement) -> str:
    return f"{measurement.seconds_median * 1e3:.1f} ms"


def _ending(event: Ending) -> str:
    """What became of a workload; not measured is only what nothing is stored of."""
    match event:
        case Finished():
            return _result(event.profile)
        case Awaited():
            return "other workers are still at it"
        case Skipped(profile=profile, layer=layer):
            where = f"known from {layer}" if layer else "tuned before"
            return f"{where} ({profile.effort}, {profile.created}); --force measures again"
        case Failed():
            return f"{'failed' if event.profile else 'not measured'}: {event.detail}"
        case OutOfTime():
            return _out_of_time(event)


def _out_of_time(event: OutOfTime) -> str:
    if event.profile is None and event.measured is None:
        return f"not measured: out of time; {_GOES_ON}"
    stays = f"the profile from before stays ({event.profile.effort})" if event.profile else ""
    kept = stays or "nothing is stored"
    if event.measured == 0:  # nor would it be the next time
        return f"the time was too short for one plan, and {kept}; allow more (--timeout)"
    few = "" if stays else f" with {event.measured} plans measured, too few to choose from"
    return f"out of time{few}, and {kept}; {_GOES_ON}"


def _result(profile: Profile) -> str:
    choice = profile.choose()
    plan = str(choice.plan) if choice else "no plan could be measured"
    if profile.complete:
        return plan
    return f"{plan} (unfinished: out of time; {_GOES_ON})"
