"""What ``autochunk evaluate`` tells: as plain data, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from autochunk.predict.evaluate import Replay, Summary

_COLUMNS = (
    "device",
    "workloads",
    "regret, median",
    "nine in ten",
    "worst",
    "against dense",
    "memory",
    "too small",
    "sure",
)


def evaluation_record(summaries: Sequence[Summary], replays: Sequence[Replay]) -> dict[str, Any]:
    """Summaries and each replay as plain data; all but counts are fractions."""
    return {
        "devices": [asdict(one) for one in summaries],
        "workloads": [replay_record(one) for one in replays],
    }


def replay_record(replay: Replay) -> dict[str, Any]:
    """One replay as plain data; ``rounds`` is how often the chosen plan was timed."""
    return {
        "device": replay.profile.device.key,
        "workload": replay.profile.workload,
        "chosen": str(replay.chosen.plan),
        "best": str(replay.best.plan),
        "regret": replay.regret,
        "rounds": len(replay.chosen.ratios),
        "within": replay.within,
        "against_dense": replay.against_dense,
        "seconds_error": replay.seconds,
        "memory_errors": list(replay.memory),
    }


def evaluation_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """A line for each device."""
    table = _table(_COLUMNS)
    for one in summaries:
        dense = one["against_dense"]
        table.add_row(
            Text(one["device"]),
            str(one["workloads"]),
            *(f"{regret:.1%}" for regret in one["regret"]),
            "-" if dense is None else f"{dense:+.0%}",
            f"{one['memory']:.0%}",
            f"{one['memory_under']:.0%}",
            f"{one['sure']:.0%}",
        )
    table.caption_justify = "left"
    table.caption = (
        "regret: the chosen plan's measured time over the best one's; against dense: of the worst "
        "choice;\nmemory: median error; too small: plans of whose memory a quarter was missed; "
        "sure: no plan faster than predicted"
    )
    return table


def replays_table(records: Sequence[dict[str, Any]]) -> Table:
    """A line for each workload."""
    table = _table(("regret", "predicted", "rounds", "chosen", "best", "workload"))
    for one in records:
        table.add_row(
            f"{one['regret']:.1%}",
            f"{one['within']:.1%}",
            str(one["rounds"]),
            one["chosen"],
            one["best"],
            Text(one["workload"]),
        )
    return table


def _table(titles: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table
