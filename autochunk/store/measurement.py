"""One plan, measured: times, memory and error as they were, or why there are none."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from autochunk.plan import Plan, check_max_chunk_size_mb

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

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ENOUGH_JOINT = 6
"""Fewer joint rounds than this are not compared by themselves."""

# Without FailFast each wrong value of a hostile file is an error that takes memory.
_Times = Annotated[tuple[_Seconds, ...], FailFast()]
_Bytes = Annotated[int, Field(ge=0, le=2**60)]
_Size = Annotated[int, Field(ge=1, le=2**40)]


class Record(BaseModel):
    """Data that is kept: it does not change, and a field that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measurement(Record):
    """One plan, measured.

    Attributes:
      implementation, max_chunk_size_mb, chunk_sizes: the plan; the last is of functions that are
        not attention.
      status: "ok" and "pruned" carry times ("pruned" was given up early as too slow); the others
        say why there are none ("skipped": larger limits were already slower and slower).
      detail: what happened, in words, for a status other than "ok".
      seconds: device time of each repeat.
      ratios: each repeat over the anchor plan's time in the same round; rounds of one workload
        share the anchor, so these compare across plans.
      joint: how many of the repeats, the last ones, are of joint rounds, in which all plans that
        could still win were timed. Two plans' joint rounds are the same rounds, from the first on.
      temp_bytes: working memory beyond arguments and results: the larger of ``predicted_bytes`` and
        ``measured_bytes``, as far as a GPU's allocator can tell.
      predicted_bytes: working memory by XLA's own account; None in profiles of before it was kept.
      measured_bytes: working memory as measured on the process or the device's allocator; None
        where neither could tell.
      compile_seconds: time to compile.
      error: largest error of output and gradients relative to the largest reference value, against
        float64 on sampled rows.

    Example:
      >>> import autochunk
      >>> one = autochunk.Measurement(
      ...     implementation="xla",
      ...     max_chunk_size_mb=16,
      ...     status="ok",
      ...     seconds=(0.21, 0.20, 0.23),
      ...     ratios=(0.5, 0.49, 0.52),
      ...     temp_bytes=40_000_000,
      ... )
      >>> print(one.plan, one.seconds_median, one.ratio)
      xla, 16 MB 0.21 0.5
    """

    implementation: str = Field(max_length=200)
    max_chunk_size_mb: float | None
    status: Status
    detail: str = Field(default="", max_length=2000)
    seconds: _Times = Field(default=(), max_length=1000)
    ratios: _Times = Field(default=(), max_length=1000)
    joint: Annotated[int, Field(ge=0)] = 0
    temp_bytes: _Bytes | None = None
    predicted_bytes: _Bytes | None = None
    measured_bytes: _Bytes | None = None
    compile_seconds: _Seconds | None = None
    error: Annotated[float, Field(ge=0)] | None = None
    chunk_sizes: tuple[_Size, ...] | None = Field(default=None, min_length=1, max_length=8)

    @model_serializer(mode="wrap")
    def _without_what_attention_lacks(self, rest: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = rest(self)
        if self.chunk_sizes is None:  # profiles of attention are as older versions read them
            found.pop("chunk_sizes", None)
        return found

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
        if self.joint > len(self.ratios):
            raise ValueError(f"{self.joint} joint rounds but {len(self.ratios)} ratios")
        if self.status in ("ok", "pruned") and (not self.seconds or self.temp_bytes is None):
            raise ValueError(f"status {self.status} needs times and temp_bytes")
        return self

    @property
    def plan(self) -> Plan:
        """The plan that was measured."""
        return Plan(self.implementation, self.max_chunk_size_mb, self.chunk_sizes)

    @property
    def timed(self) -> bool:
        """Whether there are times to compare."""
        return self.status in ("ok", "pruned")

    @property
    def seconds_median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.seconds)

    @property
    def joint_ratios(self) -> tuple[float, ...]:
        """Those of joint rounds; the anchor's own are one."""
        return self.ratios[len(self.ratios) - self.joint :]

    @property
    def own_ratios(self) -> tuple[float, ...]:
        """Those of rounds beside the anchor only; all, where these are no more than joint ones."""
        return self._alone if len(self._alone) > self.joint else self.ratios

    @property
    def ratio(self) -> float:
        """Median time relative to the anchor plan, of the rounds that say most."""
        return statistics.median(self.ratios[self.telling])

    @property
    def telling(self) -> slice:
        """Where the rounds that say most are: joint ones, if there are enough of them."""
        if self.joint >= ENOUGH_JOINT:
            return slice(len(self.ratios) - self.joint, None)
        return slice(len(self.own_ratios))

    @property
    def spread(self) -> float:
        """The ``relative_spread`` of the ratios; 0 for a single repeat."""
        joint = self.joint_ratios if self.joint >= ENOUGH_JOINT else ()
        # The anchor beside itself, in one timing, tells nothing of how times scatter.
        spreads = map(relative_spread, (joint, self._alone, self.own_ratios))
        return next(filter(None, spreads), 0.0)

    @property
    def _alone(self) -> tuple[float, ...]:
        return self.ratios[: len(self.ratios) - self.joint]


def relative_spread(values: Sequence[float]) -> float | None:
    """Half the interquartile range of positive values, relative to their median.

    None for fewer than two values or a median of zero.
    """
    if len(values) < 2:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle if middle else None
