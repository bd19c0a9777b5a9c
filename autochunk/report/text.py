"""What is told in lines of text: why a plan, what an import did, what the doctor found."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Group
from rich.table import Table
from rich.text import Text

from autochunk.device import Device, difference
from autochunk.report.records import rejected_of
from autochunk.resolution.answer import Resolution
from autochunk.resolution.functions import FunctionResolution
from autochunk.store.merge import ImportEntry, ImportPlan, Relation

if TYPE_CHECKING:
    from autochunk.doctor import Finding
    from autochunk.tuner.sync import Synced

_MOST_DEVICES = 5  # that are told of one by one
_STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


def resolution_text(resolution: Resolution, accounts: Sequence[tuple[str, str]] = ()) -> Group:
    """The answer to "why did it pick that?"; ``accounts`` says of each layer what it has."""
    parts: list[Any] = [
        Text("\n".join(_answer(resolution))),
        Text("\nasked, in this order:"),
        _pairs(resolution.asked or [("use(...)", "answered")]),
    ]
    if accounts:
        parts += [Text("\nwhat each layer has:"), _pairs(accounts)]
    if resolution.rejected:
        parts += [Text("\nother plans:"), _pairs(resolution.rejected)]
    return Group(*parts)


def _answer(resolution: Resolution) -> Iterator[str]:
    plan, measured = resolution.plan, resolution.profile
    limit = "None" if plan.max_chunk_size_mb is None else f"{plan.max_chunk_size_mb:g}"
    stale = f", stale: {'; '.join(resolution.stale)}" if resolution.stale else ""
    yield f"workload  {resolution.workload.key}"
    yield f"device    {resolution.device.key}"
    yield f'"auto" is max_chunk_size_mb={limit}, implementation="{plan.implementation}"'
    yield f"because   {resolution.reason}"
    yield f"from      {resolution.layer} ({resolution.match}{stale})"
    if resolution.within is not None:
        timed = "no other plan that was timed to the end is faster by more"
        others = "another plan is hardly faster by more" if resolution.prediction else timed
        yield f"sure      within {resolution.within:.1%}: {others}"
    if measured is not None:
        versions = f"jaxlib {measured.device.jaxlib}, autochunk {measured.autochunk}"
        yield f"measured  {measured.created}, effort {measured.effort}, {versions}"


def function_text(answer: FunctionResolution) -> Group:
    """What "auto" means for a function, and why."""
    sizes = "by the rule" if answer.sizes is None else "x".join(map(str, answer.sizes))
    stale = f", stale: {'; '.join(answer.stale)}" if answer.stale else ""
    told = [
        f"function  {answer.workload.key}",
        f"device    {answer.device.key}",
        f'"auto" is chunk_size={sizes} of {answer.workload.lengths}',
        f"because   {answer.reason}",
        f"from      {answer.layer} ({answer.match}{stale})",
    ]
    asked = Text("\nasked, in this order:")
    parts: list[Text | Table] = [Text("\n".join(told)), asked, _pairs(answer.asked)]
    if rejected := rejected_of(answer):
        parts += [Text("\nother plans:"), _pairs(rejected)]
    return Group(*parts)


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for first, second in pairs:
        table.add_row(Text("  " + first), Text(second))
    return table


def import_text(plan: ImportPlan, dry_run: bool, here: Device | None = None) -> Group:
    """What an import did, or would do: the profiles worth telling of, and counts of all kinds.

    Also how many of them answer on the device ``here``, and in what the others' devices differ.
    """
    told = [entry for entry in plan.entries if entry.relation not in ("new", "same")]
    counts = ", ".join(f"{plan.count(relation)} {relation}" for relation in get_args(Relation))
    stored = f"{len(plan.taken)} of {len(plan.entries)} profiles"
    summary = Text(f"{counts}. {stored} {'would be' if dry_run else 'were'} stored.")
    answers = Text("\n".join(_answering(plan, here))) if here and plan.entries else ""
    return Group(*map(_entry, told), summary, answers)


def _answering(plan: ImportPlan, here: Device) -> Iterator[str]:
    """Which of the profiles are of this device; of the others' devices the most alike first."""
    counts = collections.Counter(entry.profile.device.key for entry in plan.entries)
    mine = counts.pop(here.key, 0)
    answer = "answer" if mine > 1 else "answers"
    yield f"{mine or 'None'} of them {answer} on this device, {here.key}."
    found = [(difference(key, here.key), key) for key in counts]
    found.sort(key=lambda one: (len(one[0]), one[1]))
    for differs, key in found[:_MOST_DEVICES]:
        fields = ", ".join(f"{name} ({its}, here {ours})" for name, (its, ours) in differs.items())
        yield f"{counts[key]} of a device that differs in {fields}"
    if others := found[_MOST_DEVICES:]:
        yield f"{sum(counts[key] for _, key in others)} of {len(others)} more devices"


def _entry(entry: ImportEntry) -> Text:
    """Two lines of what an import did with one profile."""
    done, profile = "stored" if entry.taken else "left out", entry.profile
    return Text(
        f"{entry.relation}, {done}: {profile.workload} | {profile.device.key}\n  {entry.reason}"
    )


def synced_text(found: Synced, place: str) -> str:
    """What ``sync`` moved to and from a storage, whose place has no password, in a line or two."""
    text = (
        f"{place}: {len(found.taken)} profiles taken, {len(found.handed_in)} handed in, "
        f"{len(found.missed)} misses told; {len(found.wishes)} workloads are missed on devices "
        "like this and not measured"
    )
    if found.newer:
        text += f"; {found.newer} profiles of a newer autochunk left there"
    return f"{text}."


def event_text(event: dict[str, Any]) -> str:
    """One line of what ``watch`` tells of an event."""
    names = ("time", "event", "detail", "workload")
    fields = [f"{name}={value}" for name, value in event.items() if name not in names and value]
    told = [event.get("workload"), event.get("detail"), ", ".join(fields)]
    return f"{event['time']} {event['event']}: {'; '.join(filter(None, told))}".rstrip(": ")


def status_text(services: Sequence[dict[str, Any]]) -> str:
    """What ``watch --status`` says: what a store's services do, have done, and will do."""
    if not services:
        return "No service has watched for this store."
    return "\n\n".join("\n".join(_service(found)) for found in services)


def _service(found: dict[str, Any]) -> Iterator[str]:
    runs = {True: "runs", False: "does not run", None: "is another machine's"}[found["runs"]]
    doing = [str(found.get(name, "")) for name in ("state", "kind", "workload", "detail")]
    yield f"process {found.get('process')} on {found.get('host')} {runs}"
    yield f"{found['written']} {' '.join(filter(None, doing))}"
    yield "done:"
    yield from (f"  {event_text(event)}" for event in found.get("events", [])[-20:])
    yield "to do:"
    todo = found.get("todo", ())
    jobs = [f"{job['kind']} {job['workload']}, wanted {job['wanted']}" for job in todo]
    yield from (f"  {job}" for job in jobs or ["nothing"])


def finding_text(finding: Finding) -> Text:
    """One line of ``autochunk doctor``, and its cure under it."""
    text = Text.assemble(
        (f"{finding.level:8}", _STYLES[finding.level]),
        (finding.subject, "bold"),
        f": {finding.detail}",
    )
    return text.append(f"\n        to do: {finding.cure}") if finding.cure else text
