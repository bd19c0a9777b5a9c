"""What is asked of the layers, and the answers that one profile, or none, gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from autochunk.device import Device
from autochunk.implementations import IMPLEMENTATIONS, is_fused
from autochunk.plan import BYTES_PER_MB, Plan
from autochunk.predict.prediction import Prediction
from autochunk.resolution.rule import usual_kernel, usual_plan
from autochunk.store.choice import Choice
from autochunk.store.profile import Profile
from autochunk.workload import Workload

Match = Literal["exact", "predicted", "nearest", "default", "pinned"]

# Of the memory here, what a plan may take that was measured where there is more of it: the rest is
# for the arrays themselves and whatever else runs.
_SHARE_OF_MEMORY = 0.5

# XLA:CPU multiplies in the inputs' own precision, or better, whichever of these is asked for.
_ONE_ON_CPUS = {"high", "highest", "bfloat16", "bfloat16_3x", "tensorfloat32", "float32", "fastest"}


class Request(NamedTuple):
    """What is asked of the layers; ``without`` are fused kernels that do not take the call."""

    workload: Workload
    implementation: str | None
    memory_budget_mb: float | None
    device: Device
    without: frozenset[str] = frozenset()

    @property
    def alike(self) -> tuple[Workload, ...]:
        """The workload, then another whose profile holds for it on that device, if there is one."""
        same_here = self.device.platform == "cpu" and self.workload.precision in _ONE_ON_CPUS
        plain = self.workload.model_copy(update={"precision": "default"})
        return (self.workload, plain) if same_here else (self.workload,)


@dataclass(frozen=True)
class Resolution:
    """The answer to "auto", and why.

    Attributes:
      workload: what was asked for.
      device: where.
      plan: the answer.
      match: "exact", "predicted" (from several profiles), "nearest" (another shape's profile),
        "default" (nothing known) or "pinned" (by ``use``).
      layer: where the answer came from.
      reason: why this plan, in words.
      source: key of the workload whose profile answered; "" for none.
      stale: why the profile may no longer hold; empty if it does.
      asked: each layer that was asked and what it had.
      rejected: the profile's other plans and what spoke against each.
      profile: the profile that answered.
      choice: what it chose.
      prediction: what several profiles spoke for, and what that would cost.

    Example:
      >>> import autochunk
      >>> answer = autochunk.resolve(autochunk.Workload.parse("t=48,h=3,k=8"))
      >>> answer.match in ("exact", "predicted", "nearest", "default")
      True
      >>> isinstance(answer.plan, autochunk.Plan)
      True
    """

    workload: Workload
    device: Device
    plan: Plan
    match: Match
    layer: str
    reason: str
    source: str = ""
    stale: tuple[str, ...] = ()
    asked: tuple[tuple[str, str], ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    profile: Profile | None = field(default=None, repr=False)
    choice: Choice | None = field(default=None, repr=False)
    prediction: Prediction | None = field(default=None, repr=False)

    @property
    def within(self) -> float | None:
        """How much faster another plan that was measured, or is predicted, could be at most.

        None where that cannot be told, as by another workload's profile.
        """
        if self.prediction is not None:
            return self.prediction.within
        return self.choice.within if self.choice and self.match == "exact" else None


def from_profile(profile: Profile, request: Request, layer: str) -> Resolution | None:
    """What a profile, of this workload or another, answers; None if it has no plan that fits.

    Where it chooses no fused kernel, one that it never tried comes before what it chooses.
    """
    choice = profile.choose(
        memory_budget_mb=_budget(profile, request),
        implementation=request.implementation,
        without=request.without,
    )
    if choice is None:
        return None
    any_kernel = request.implementation is None and not is_fused(choice.plan.implementation)
    if any_kernel and (kernel := _untried_kernel(profile, request)):
        tried = f"the profile of {profile.workload} never tried {kernel}, installed here"
        reason = f"{tried}; tune with: {request.workload.tune_command}"
        return _default(request, Plan(kernel), reason)
    return Resolution(
        workload=request.workload,
        device=request.device,
        plan=choice.plan,
        match="exact" if profile.workload in [one.key for one in request.alike] else "nearest",
        layer=layer,
        reason=choice.reason if profile.complete else f"{choice.reason}; its tuning was cut short",
        source=profile.workload,
        stale=tuple(profile.stale_reasons(request.device)),
        rejected=choice.rejected,
        profile=profile,
        choice=choice,
    )


def _untried_kernel(profile: Profile, request: Request) -> str | None:
    untried = set(profile.untried(request.device))
    without = {name for name in IMPLEMENTATIONS if name not in untried} | request.without
    return usual_kernel(request.workload, request.device, without)


def over_budget(profile: Profile, request: Request) -> Resolution | None:
    """The answer where none of the plans that were measured fits the memory budget.

    The plan that takes least, or smaller slices; None without a budget, or if none was measured.
    """
    least, budget = profile.least_memory(request.implementation), _budget(profile, request)
    if least is None or budget is None:
        return None
    slices = request._replace(
        implementation=request.implementation or "xla", memory_budget_mb=budget
    )
    plan, limit = _usual(slices)[0], least.max_chunk_size_mb
    if limit is not None and plan.max_chunk_size_mb is not None and limit <= plan.max_chunk_size_mb:
        plan = least.plan
    memory = (least.temp_bytes or 0) / BYTES_PER_MB
    reason = (
        f"no measured plan fits the memory budget of {budget:g} MB; "
        f"the one that takes least, {least.plan}, takes {memory:.3g} MB"
    )
    return _default(request, plan, reason, profile)


def _budget(profile: Profile, request: Request) -> float | None:
    """Most working memory in MB for a profile's plans, if there is such a limit.

    Where the profile's device had no more memory than this one, all that was measured fits.
    """
    here, there = request.device.memory_gib, profile.device.memory_gib
    return most_memory(request) if 0 < here < there else request.memory_budget_mb


def most_memory(request: Request) -> float | None:
    """Most working memory in MB for plans that were not measured here, if there is such a limit.

    The budget asked for, and a share of this device's memory: a container with a lower limit is the
    same device, and its tuner would not have run all that ran on another.
    """
    here = request.device.memory_gib * 2**30 * _SHARE_OF_MEMORY / BYTES_PER_MB
    limits = (request.memory_budget_mb, here or None)
    return min((one for one in limits if one is not None), default=None)


def unknown(request: Request) -> Resolution:
    """The answer where no profile has one."""
    plan, why = _usual(request)
    reason = f"no profile: {why}; tune with: {request.workload.tune_command}"
    return _default(request, plan, reason)


def _default(
    request: Request, plan: Plan, reason: str, profile: Profile | None = None
) -> Resolution:
    return Resolution(
        workload=request.workload,
        device=request.device,
        plan=plan,
        match="default",
        layer="default",
        reason=reason,
        source=profile.workload if profile else "",
        profile=profile,
    )


def _usual(request: Request) -> tuple[Plan, str]:
    return usual_plan(
        request.workload,
        request.device,
        implementation=request.implementation,
        memory_budget_mb=request.memory_budget_mb,
        without=request.without,
    )
