"""What a measurement leaves behind, and how a choice follows from it.

A Profile keeps the whole curve of measurements, not only the winner: the choice is made when it is
read, so that a memory budget, or a better rule in a later version, needs no new measurement.
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from autochunk.device import Device
from autochunk.errors import ArgumentError, WorkloadError
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import (
    BYTES_PER_MB,
    DEFAULT_MAX_CHUNK_SIZE_MB,
    LogitsShape,
    Plan,
    causal_block,
    check_max_chunk_size_mb,
    cuts_blocks,
    same_slices,
)
from autochunk.workload import Workload

SCHEMA_VERSION: Literal[1] = 1

Status = Literal[
    "ok",
    "oom",
    "over_budget",
    "timeout",
    "crashed",
    "inaccurate",
    "unsupported",
    "pruned",
    "skipped",
]
Effort = Literal["quick", "standard", "thorough"]
EFFORTS: tuple[Effort, ...] = ("quick", "standard", "thorough")

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Without FailFast each wrong value of a hostile file is an error that takes memory.
_Times = Annotated[tuple[_Seconds, ...], FailFast()]
_Bytes = Annotated[int, Field(ge=0, le=2**60)]

# Times closer than this are equal for a user, however many repeats could tell them apart.
SAME_TIME = 0.01
# Times further apart than this are different, however noisy the machine was.
LARGEST_NOISE = 0.03

DENSE = Plan("dense", None)
DEFAULT = Plan("xla", DEFAULT_MAX_CHUNK_SIZE_MB)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measurement(_Record):
    """One plan, measured.

    Attributes:
      implementation, max_chunk_size_mb: the plan.
      status: "ok" and "pruned" carry times ("pruned" was given up early as too slow); the others
        say why there are none ("skipped": larger limits had got slower and slower).
      detail: what happened, in words, for a status other than "ok".
      seconds: device time of each repeat.
      ratios: each repeat over the anchor plan's time in the same round; rounds of one workload
        share the anchor, so these compare across plans.
      temp_bytes: working memory beyond arguments and results: the larger of XLA's figure and
        ``measured_bytes``.
      measured_bytes: working memory that the process or the device's allocator was seen to take,
        where that could be told.
      compile_seconds: time to compile.
      error: largest error of output and gradients relative to the largest reference value, against
        float64 on sampled rows.
    """

    implementation: str
    max_chunk_size_mb: float | None
    status: Status
    detail: str = Field(default="", max_length=2000)
    seconds: _Times = Field(default=(), max_length=1000)
    ratios: _Times = Field(default=(), max_length=1000)
    temp_bytes: _Bytes | None = None
    measured_bytes: _Bytes | None = None
    compile_seconds: _Seconds | None = None
    error: Annotated[float, Field(ge=0)] | None = None

    @field_validator("implementation")
    @classmethod
    def _known(cls, value: str) -> str:
        # A profile may come from a newer version; a plan it cannot run is kept and never chosen.
        if not value.isidentifier():
            raise ValueError(f"{value!r} is no implementation's name")
        return value

    @field_validator("max_chunk_size_mb")
    @classmethod
    def _usable(cls, value: float | None) -> float | None:
        limit = check_max_chunk_size_mb(value)
        assert limit != "auto"
        return limit

    @model_validator(mode="after")
    def _times_and_status(self) -> Measurement:
        if len(self.ratios) != len(self.seconds):
            raise ValueError(f"{len(self.seconds)} times but {len(self.ratios)} ratios")
        if self.status in ("ok", "pruned") and (not self.seconds or self.temp_bytes is None):
            raise ValueError(f"status {self.status} needs times and temp_bytes")
        return self

    @property
    def plan(self) -> Plan:
        """The plan that was measured."""
        return Plan(self.implementation, self.max_chunk_size_mb)

    @property
    def timed(self) -> bool:
        """Whether there are times to compare."""
        return self.status in ("ok", "pruned")

    @property
    def seconds_median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """Median time relative to the anchor plan."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> float:
        """Half the interquartile range of the ratios, relative to their median.

        0 for a single repeat.
        """
        return relative_spread(self.ratios) or 0.0

    @property
    def noise(self) -> float:
        """Standard error of the median ratio, relative to it.

        Normal approximation: 1.4826 makes a standard deviation of half the interquartile range,
        1.2533 the median's error of the mean's.
        """
        return 1.2533 * 1.4826 * self.spread / math.sqrt(len(self.ratios)) if self.ratios else 0.0


def relative_spread(values: Sequence[float]) -> float | None:
    """Half the interquartile range of positive values, relative to their median.

    None for fewer than two values or a median of zero.
    """
    if len(values) < 2:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle if middle else None


def slower_by(one: Measurement, other: Measurement) -> float:
    """By what fraction ``one`` is slower than ``other`` (0.1 is 10%).

    0 where their times cannot be told apart.
    """
    difference = one.ratio / other.ratio - 1 if other.ratio else 0.0
    noise = min(LARGEST_NOISE, max(SAME_TIME, 2 * math.hypot(one.noise, other.noise)))
    return difference if abs(difference) > noise else 0.0


class Choice(_Record):
    """The plan that a profile recommends, and why.

    Attributes:
      measurement: what was measured of it.
      reason: why this one, in words.
      rejected: the other plans, each with what spoke against it.
    """

    measurement: Measurement
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan itself."""
        return self.measurement.plan


class Profile(_Record):
    """All measurements of one workload on one device.

    Attributes:
      workload: canonical key text of the workload.
      device: where it was measured, and with which versions.
      measurements: one per plan; among them the baselines, haiku's dense attention and the 1000 MB
        default, unless they could not run.
      effort: how hard the tuner looked.
      complete: False where time ran out first.
      created: when, as an ISO 8601 text in UTC.
      autochunk: the version that measured.
    """

    schema_version: Literal[1]
    workload: str
    device: Device
    measurements: Annotated[tuple[Measurement, ...], FailFast()] = Field(max_length=10_000)
    effort: Effort
    complete: bool
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    autochunk: str

    @field_validator("workload")
    @classmethod
    def _canonical(cls, value: str) -> str:
        try:
            workload = Workload.parse(value)
        except WorkloadError as error:
            raise ValueError(str(error)) from None
        if workload.key != value:
            raise ValueError(
                f"not a canonical workload key: {value!r}; canonical is {workload.key!r}"
            )
        return value

    @field_validator("created")
    @classmethod
    def _a_time(cls, value: str) -> str:
        _parse_time(value)
        return value

    @property
    def key(self) -> tuple[str, str]:
        """(device key, workload key): of those there is one profile in a bundle and in a store."""
        return self.device.key, self.workload

    def parsed_workload(self) -> Workload:
        """The workload that was measured."""
        return Workload.parse(self.workload)

    def age_days(self) -> float:
        """Days since it was measured."""
        return (
            datetime.datetime.now(datetime.UTC) - _parse_time(self.created)
        ).total_seconds() / 86_400

    def baseline(self, plan: Plan) -> Measurement | None:
        """The measurement of a plan, or of one that comes to the same slices.

        None if it was not timed.
        """
        shape = sliced_shape(self.parsed_workload())
        timed = [m for m in self.measurements if m.timed]
        exact = [m for m in timed if m.plan == plan]
        same = exact or [m for m in timed if _same_slices(m.plan, plan, shape)]
        return same[0] if same else None

    def choose(
        self, *, memory_budget_mb: float | None = None, implementation: str | None = None
    ) -> Choice | None:
        """The best plan by the measurements; None if none can be recommended.

        The fastest whose working memory fits ``memory_budget_mb`` (10^6 bytes); among those whose
        times cannot be told from the fastest's, the one with least memory; never one slower than
        dense attention, where dense fits. ``implementation`` narrows the choice to one. A plan that
        was given up early was slower than another; it may be the best of those that a budget or an
        implementation leaves, and counts only there.
        """
        rejected: list[tuple[str, str]] = []
        fitting: list[Measurement] = []
        for measurement in self.measurements:
            objection = _objection(measurement, memory_budget_mb, implementation)
            if objection:
                rejected.append((str(measurement.plan), objection))
            else:
                fitting.append(measurement)
        if not fitting:
            return None
        # Ties end with the plan's name, so that the order of the measurements decides nothing.
        fastest = min(fitting, key=lambda m: (m.ratio, m.noise, str(m.plan)))
        equal = [m for m in fitting if not slower_by(m, fastest)]
        best = min(equal, key=_memory_then_time)
        dense = next((m for m in fitting if m.plan == DENSE), None)
        if dense is not None and slower_by(best, dense) > 0:
            best = min((m for m in equal if slower_by(m, dense) <= 0), key=_memory_then_time)
        rejected += [
            (str(other.plan), _comparison(other, best, fastest))
            for other in fitting
            if other is not best
        ]
        reason = (
            "fastest"
            if best is fastest
            else f"least memory of {len(equal)} plans whose times cannot be told apart"
        )
        return Choice(measurement=best, reason=reason, rejected=tuple(rejected))

    def least_memory(self, implementation: str | None = None) -> Measurement | None:
        """Of the plans that were timed, or of those of one implementation, the one that takes least
        working memory; None if there is none.
        """
        timed = [m for m in self.measurements if not _objection(m, math.inf, implementation)]
        return min(timed, key=_memory_then_time, default=None)


_TIME = "%Y-%m-%dT%H:%M:%SZ"


def utc_now() -> str:
    """The time as an ISO 8601 text in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime(_TIME)


def _parse_time(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)


def _memory_then_time(measurement: Measurement) -> tuple[int, float, str]:
    return measurement.temp_bytes or 0, measurement.ratio, str(measurement.plan)


def _same_slices(one: Plan, other: Plan, shape: LogitsShape) -> bool:
    """``same_slices``, of plans from a file: one that cannot run here is like no other."""
    try:
        return one.implementation in IMPLEMENTATIONS and same_slices(one, other, shape)
    except ArgumentError:  # its limit is too small for these sizes
        return False


def _objection(
    measurement: Measurement, memory_budget_mb: float | None, implementation: str | None
) -> str:
    """Why a measurement cannot be chosen at all; empty if it can."""
    if implementation is not None and measurement.implementation != implementation:
        return f"implementation={implementation!r} was asked for"
    if measurement.implementation not in IMPLEMENTATIONS:
        return "this version of autochunk has no such implementation"
    narrowed = memory_budget_mb is not None or implementation is not None
    if measurement.status == "pruned" and not narrowed:
        return f"given up early, {measurement.detail or 'too slow'}"
    if not measurement.timed:
        return (
            f"{measurement.status}: {measurement.detail}"
            if measurement.detail
            else measurement.status
        )
    if (
        memory_budget_mb is not None
        and (measurement.temp_bytes or 0) > memory_budget_mb * BYTES_PER_MB
    ):
        return (
            f"{(measurement.temp_bytes or 0) / 1e6:.0f} MB of working memory is over the budget "
            f"of {memory_budget_mb:g} MB"
        )
    return ""


def _comparison(other: Measurement, best: Measurement, fastest: Measurement) -> str:
    slower, memory = slower_by(other, best), (other.temp_bytes or 0) - (best.temp_bytes or 0)
    # two plans may each be near a third and not near each other
    if not slower and (behind := slower_by(other, fastest)):
        return f"{behind:+.0%} time against the fastest, {memory / 1e6:+.0f} MB of working memory"
    if not slower:
        return f"as fast, {memory / 1e6:+.0f} MB of working memory"
    return f"{slower:+.0%} time, {memory / 1e6:+.0f} MB of working memory"


def sliced_shape(workload: Workload) -> LogitsShape:
    """The sizes of what is cut into slices: the logits', or of causal attention one block's."""
    groups = workload.num_heads // workload.num_kv_heads
    shape = LogitsShape(
        workload.batch,
        workload.num_kv_heads,
        groups,
        workload.query_length,
        workload.key_length,
        workload.logits_itemsize,
    )
    return causal_block(shape) if cuts_blocks(workload.causal, workload.mask != "none") else shape


# What a terminal or a log shows as one line.
_ONE_LINE = r"^[^\p{Cc}\u{2028}\u{2029}]*$"


class Provenance(_Record):
    """Where a bundle comes from; all but ``autochunk`` and ``note`` follows from its profiles.

    Attributes:
      autochunk: the version that wrote it; "" of a bundle that was written before bundles said so.
      devices: keys of the devices that were measured.
      oldest, newest: when the first and the last of its profiles was created; None without
        profiles.
      profiles: how many it has.
      note: what whoever wrote it had to say, in one line.
    """

    autochunk: Annotated[str, Field(max_length=100, pattern=_ONE_LINE)] = ""
    devices: Annotated[tuple[str, ...], FailFast()] = ()
    oldest: str | None = None
    newest: str | None = None
    profiles: int = 0
    note: Annotated[str, Field(max_length=1000, pattern=_ONE_LINE)] = ""


class Bundle(_Record):
    """The profiles of a file that travels, read and checked.

    Attributes:
      schema_version: of the layout that the file had; older ones are brought up to date in reading.
      profiles: in the file's order, at most one of each device and workload.
      provenance: where they come from.
    """

    schema_version: int
    profiles: tuple[Profile, ...] = Field(max_length=1_000_000)
    provenance: Provenance = Provenance()
