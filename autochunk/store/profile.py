"""What measuring a workload on a device leaves behind.

A Profile keeps the whole curve of measurements, not only the winner: ``choice`` picks that anew
whenever it is asked for.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import FailFast, Field, field_validator, model_validator

from autochunk.blocks import block_form, block_shape
from autochunk.device import Device
from autochunk.errors import ArgumentError, WorkloadError
from autochunk.functions import FunctionCall, Tunable, is_function, parsed
from autochunk.implementations import IMPLEMENTATIONS, kernels_for
from autochunk.plan import LogitsShape, Plan, same_slices
from autochunk.store import choice
from autochunk.store.measurement import Measurement, Record
from autochunk.workload import Workload

ATTENTION_VERSION: Literal[2] = 2
"""Version 2 has more fields than version 1, all of them with defaults."""
SCHEMA_VERSION: Literal[3] = 3
"""Version 3 is of a function that is not attention; no older autochunk could choose its plans."""

MOST_OF_A_KEY = 5000
"""Characters of a workload's key: several times what the longest has."""
_MOST_TIMES = 100_000  # of all plans, which are looked at while a model is traced

Effort = Literal["quick", "standard", "thorough"]
EFFORTS: tuple[Effort, ...] = ("quick", "standard", "thorough")


class Profile(Record):
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

    Example:
      >>> import autochunk
      >>> def measured(plan, limit, seconds, memory):
      ...     return autochunk.Measurement(
      ...         implementation=plan,
      ...         max_chunk_size_mb=limit,
      ...         status="ok",
      ...         seconds=(seconds,) * 5,
      ...         ratios=(seconds / 0.4,) * 5,
      ...         temp_bytes=memory,
      ...     )
      >>> profile = autochunk.Profile(
      ...     schema_version=2,
      ...     workload=autochunk.Workload.parse("t=4096,h=8,k=64").key,
      ...     device=autochunk.detect(),
      ...     measurements=(
      ...         measured("dense", None, 0.4, 1_070_000_000),
      ...         measured("xla", 16, 0.2, 40_000_000),
      ...         measured("xla", 4, 0.3, 9_000_000),
      ...     ),
      ...     effort="quick",
      ...     complete=True,
      ...     created="2026-01-02T03:04:05Z",
      ...     autochunk=autochunk.__version__,
      ... )
      >>> print(profile.choose().plan, "|", profile.choose(memory_budget_mb=10).plan)
      xla, 16 MB | xla, 4 MB
    """

    schema_version: Literal[2, 3]
    workload: Annotated[str, Field(max_length=MOST_OF_A_KEY)]
    device: Device
    measurements: Annotated[tuple[Measurement, ...], FailFast()] = Field(max_length=10_000)
    effort: Effort
    complete: bool
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    autochunk: Annotated[str, Field(max_length=1000)]

    @field_validator("schema_version", mode="before")
    @classmethod
    def _brought_up_to_date(cls, value: object) -> object:
        return ATTENTION_VERSION if type(value) is int and value == 1 else value

    @field_validator("workload")
    @classmethod
    def _canonical(cls, value: str) -> str:
        try:
            workload = parsed(value)
        except WorkloadError as error:
            raise ValueError(str(error)) from None
        if workload.key != value:
            raise ValueError(
                f"not a canonical workload key: {value!r}; canonical is {workload.key!r}"
            )
        return value

    @field_validator("measurements")
    @classmethod
    def _few_enough(cls, value: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
        times = sum(len(measurement.seconds) for measurement in value)
        if times > _MOST_TIMES:
            raise ValueError(f"a profile has at most {_MOST_TIMES} times; this has {times}")
        return value

    @field_validator("created")
    @classmethod
    def _a_time(cls, value: str) -> str:
        _parse_time(value)
        return value

    @model_validator(mode="after")
    def _version_of_its_kind(self) -> Profile:
        version = SCHEMA_VERSION if self.function else ATTENTION_VERSION
        if self.schema_version != version:
            raise ValueError(f"the profile of {self.workload} must be of version {version}")
        return self

    @model_validator(mode="after")
    def _chunks_of_its_axes(self) -> Profile:
        axes = len(self.function.sizes) if self.function else 0
        for one in self.measurements:
            if one.chunk_sizes is not None and len(one.chunk_sizes) != axes:
                raise ValueError(
                    f"chunk_sizes must have one entry for each of the {axes} chunked axes of "
                    f"{self.workload}; got {one.chunk_sizes}"
                )
        return self

    @property
    def key(self) -> tuple[str, str]:
        """(device key, workload key): of those there is one profile in a bundle and in a store."""
        return self.device.key, self.workload

    def parsed_workload(self) -> Workload:
        """The attention that was measured.

        Raises:
          WorkloadError: it is of another function.
        """
        return Workload.parse(self.workload)

    @property
    def subject(self) -> Tunable:
        """What was measured, of either kind."""
        return parsed(self.workload)

    @property
    def function(self) -> FunctionCall | None:
        """The call of a function that was measured; None of attention."""
        return FunctionCall.parse(self.workload) if is_function(self.workload) else None

    def age_days(self) -> float:
        """Days since it was measured."""
        age = datetime.datetime.now(datetime.UTC) - _parse_time(self.created)
        return age.total_seconds() / 86_400

    def untried(self, now: Device) -> list[str]:
        """Fused kernels that may take its workload, are installed here, and were never tried.

        None if the profile is of another device than this one.
        """
        if self.device.key != now.key or self.function:
            return []
        tried = {measurement.implementation for measurement in self.measurements}
        names = kernels_for(self.parsed_workload(), now.platform)
        return [name for name in names if name not in tried]

    def stale_reasons(self, now: Device) -> list[str]:
        """Why it may no longer hold on ``now``, its device today; empty if it does.

        What ``Device.stale_reasons`` says, and of a finished one, kernels that it never tried.
        """
        untried = self.untried(now) if self.complete else []
        never = [f"never tried {' and '.join(untried)}, installed here"] if untried else []
        return self.device.stale_reasons(now) + never

    def baseline(self, plan: Plan) -> Measurement | None:
        """The timed measurement of a plan, else of one that comes to the same slices; or None."""
        timed = [m for m in self.measurements if m.timed]
        exact = (m for m in timed if m.plan == plan)
        if self.function:
            return next(exact, None)
        shape = sliced_shape(self.parsed_workload())
        same = (m for m in timed if _same_slices(m.plan, plan, shape))
        return next(itertools.chain(exact, same), None)

    def choose(
        self,
        *,
        memory_budget_mb: float | None = None,
        implementation: str | None = None,
        without: Collection[str] = (),
    ) -> choice.Choice | None:
        """The best plan by the measurements, as ``choice.choose`` has it; None if there is none."""
        return choice.choose(
            self.measurements,
            memory_budget_mb=memory_budget_mb,
            implementation=implementation,
            without=without,
        )

    def least_memory(self, implementation: str | None = None) -> Measurement | None:
        """The timed plan that takes least working memory, by ``choice.least_memory``; or None."""
        return choice.least_memory(self.measurements, implementation)


_TIME = "%Y-%m-%dT%H:%M:%SZ"


def utc_now() -> str:
    """The time as an ISO 8601 text in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime(_TIME)


def _parse_time(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)


def _same_slices(one: Plan, other: Plan, shape: LogitsShape) -> bool:
    """``same_slices``, of plans from a file: one that cannot run here is like no other."""
    try:
        return one.implementation in IMPLEMENTATIONS and same_slices(one, other, shape)
    except ArgumentError:  # its limit is too small for these sizes
        return False


def sliced_shape(workload: Workload) -> LogitsShape:
    """The sizes of what is cut into slices: the logits', or of attention in blocks one block's."""
    shape = LogitsShape(
        batch=workload.batch,
        heads=workload.num_kv_heads,
        groups=workload.num_heads // workload.num_kv_heads,
        rows=workload.query_length,
        keys=workload.key_length,
        itemsize=workload.logits_itemsize,
    )
    one_offset = workload.query_offset in ("none", "1")
    form = block_form(workload.reach, workload.covering, one_offset, workload.has_row_mask)
    return block_shape(shape, form)
