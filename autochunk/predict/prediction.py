"""The plan that curves of other workloads, or other devices, speak for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autochunk.device import Device, likeness
from autochunk.implementations import IMPLEMENTATIONS, is_sliced, kernels_for
from autochunk.plan import BYTES_PER_MB, Plan, candidate_plans
from autochunk.predict import memory
from autochunk.predict.curves import (
    KINDS,
    MOST_PLANS,
    Curve,
    Sites,
    joined,
    kinds_of,
    sites,
    sizes_of,
)
from autochunk.predict.process import (
    Covariance,
    Known,
    Posterior,
    alike,
    of_bytes,
    of_seconds,
    posterior,
)
from autochunk.predict.seconds import seconds
from autochunk.store.choice import DENSE
from autochunk.store.profile import sliced_shape
from autochunk.workload import Workload

MOST_POINTS = MOST_PLANS
"""The nearest curves of so many plans are asked: more add little but time."""

# Memory is reckoned so many standard deviations higher: more than that is rare. What is told of a
# plan leans that way, too: memory that is missed hurts, some that is left does not. (On CPUs less:
# deviations are three times those of GPUs there, and half of what is told must be near.)
_MARGIN, _LIKELY, _LIKELY_ON_CPUS = 1.5, 1.0, 0.3
_NOISE_OF_BYTES = 0.07
# With so many curves of the device itself, and no more than this to gain, a prediction is sure.
_FEWEST_HERE, _SURE = 3, 0.05
# Where dense attention is the safe choice another is faster by so many standard deviations.
_SAFE = 1.0
_IN_CACHES = 2**22  # bytes of one head's logits


# Of one device by another jaxlib or allocator: its programs, or their costs, are others.
_OTHER_CONDITIONS = 0.8


def tells(then: Device, now: Device) -> float:
    """How much what was measured on one device tells of another, from 0 to 1."""
    return likeness(now, then) * (_OTHER_CONDITIONS if then.stale_reasons(now) else 1.0)


class Source(NamedTuple):
    """A curve to learn from.

    Attributes:
      curve: of a workload.
      likeness: how much its device tells of the one asked about, by ``tells``.
    """

    curve: Curve
    likeness: float


@dataclass(frozen=True)
class Cost:
    """What a plan is expected to cost.

    Attributes:
      plan: which.
      seconds: its time.
      temp_bytes: its working memory in bytes, rather too much than too little; ``most_bytes`` with
        the margin that a budget is held with.
    """

    plan: Plan
    seconds: float
    temp_bytes: float
    most_bytes: float


@dataclass(frozen=True)
class Prediction:
    """A choice among plans that were not measured.

    Attributes:
      cost: of the choice.
      others: the other plans, fastest first.
      within: by what fraction another plan could be faster, by one standard deviation.
      curves: how many were learned from; ``elsewhere`` of them are another device's, or by other
        versions.
    """

    cost: Cost
    others: tuple[Cost, ...]
    within: float
    curves: int
    elsewhere: int

    @property
    def here(self) -> int:
        """How many of the curves are of the device asked about, as it is today."""
        return self.curves - self.elsewhere

    @property
    def sure(self) -> bool:
        """Whether measuring would hardly find a faster plan."""
        return self.here >= _FEWEST_HERE and self.within <= _SURE


def plans_of(workload: Workload, platform: str, names: Iterable[str] | None = None) -> list[Plan]:
    """The plans to choose from: dense, the ladder of limits, installed kernels that may take it.

    ``names`` narrows the implementations.
    """
    allowed = set(IMPLEMENTATIONS if names is None else names)
    fused = map(Plan, kernels_for(workload, platform))
    plans = [DENSE, *fused, *candidate_plans(sliced_shape(workload))]
    return [plan for plan in plans if plan.implementation in allowed]


def predict(
    workload: Workload,
    platform: str,
    sources: Sequence[Source],
    plans: Sequence[Plan],
    *,
    memory_budget_mb: float | None = None,
) -> Prediction | None:
    """The plan to run; None where nothing was measured, or no plan fits the budget.

    Args:
      workload: what was not measured.
      platform: of the device, as in jax.
      sources: what was, on it and on others; no more than ``nearest`` takes.
      plans: to choose from.
      memory_budget_mb: most working memory, in 10^6 bytes, with a margin; None is no limit.
    """
    if not sources or not plans:
        return None
    asked = sites(workload, plans)
    physics = [seconds(workload, plan, platform) for plan in plans]
    times = _times(of_seconds(platform), sources, asked, physics)
    accounted = [memory.temp_bytes(workload, plan, platform) for plan in plans]
    held = _memory(of_bytes(platform), sources, asked, accounted)
    costs = [
        Cost(plan, float(second), float(likely), float(most))
        for plan, second, likely, most in zip(
            plans,
            np.exp(times.mean),
            _bytes(held, _LIKELY_ON_CPUS if platform == "cpu" else _LIKELY),
            _bytes(held, _MARGIN),
            strict=True,
        )
    ]
    most = math.inf if memory_budget_mb is None else memory_budget_mb * BYTES_PER_MB
    fitting = [number for number, cost in enumerate(costs) if cost.most_bytes <= most]
    if not fitting:
        return None
    wary = _is_unlearned(workload, sources, platform)
    chosen = _chosen(times, costs, fitting, wary)
    others = sorted((c for c in costs if c is not costs[chosen]), key=lambda one: one.seconds)
    return Prediction(
        cost=costs[chosen],
        others=tuple(others),
        within=_within(times, chosen, fitting),
        curves=len(sources),
        elsewhere=sum(source.likeness < 1 for source in sources),
    )


def _chosen(times: Posterior, costs: Sequence[Cost], fitting: Sequence[int], wary: bool) -> int:
    """The plan of least expected time, of those that are no worse than dense attention.

    Expected, because that of an unsure plan is longer than its most likely one. (To take the plan
    whose worst case is least bad, by 0.3 or 1 standard deviations, was seen to cost more than it
    saved; so was to prefer less memory among those within 1%.)
    """
    dense = next((one for one in fitting if costs[one].plan == DENSE), None)
    if dense is not None:
        unsure = times.deviation(dense)
        faster = times.mean + _SAFE * unsure < times.mean[dense]
        fitting = [
            one
            for one in fitting
            if one == dense or faster[one] or not (wary or _gains_nothing(costs, one, dense))
        ]
    expected = times.mean + np.diag(times.covariance) / 2
    # Rounded, because what machines compute may differ in the last bits, and the choice must not.
    return min(fitting, key=lambda one: (round(float(expected[one]), 6), str(costs[one].plan)))


def _is_unlearned(workload: Workload, sources: Sequence[Source], platform: str) -> bool:
    """Whether no curve has what is computed of each logit on a GPU, or a product in bfloat16.

    On a CPU what is computed of each logit costs dense attention as much as slices. Some CPUs have
    units for bfloat16; then dense attention of short sequences was seen to be the fastest in
    forward, of which curves in float32 say nothing. Longer ones leave the caches.
    """
    asked = kinds_of(workload)
    kinds = np.concatenate([source.curve.sites.kinds for source in sources])
    short = workload.query_length * workload.key_length * workload.logits_itemsize <= _IN_CACHES
    products = short and workload.dtype == "bfloat16" and workload.mode == "forward"
    logits = platform != "cpu" and (kinds[:, -1] != asked[-1]).all()
    return bool(logits or (products and (kinds[:, 0] != asked[0]).all()))


def _gains_nothing(costs: Sequence[Cost], one: int, dense: int) -> bool:
    """Whether a plan is to compute all logits at once, in no less memory than dense."""
    plan, memory = costs[one].plan, costs[one].temp_bytes
    unsliced = is_sliced(plan.implementation) and plan.max_chunk_size_mb is None
    return unsliced and memory >= costs[dense].temp_bytes


def nearest(workload: Workload, platform: str, sources: Sequence[Source]) -> list[Source]:
    """The curves that tell most of a workload, of ``MOST_POINTS`` plans, the most alike first."""
    close = alike(
        of_seconds(platform),
        (sizes_of(workload), kinds_of(workload)),
        np.array([source.curve.sites.sizes[0] for source in sources]).reshape(-1, 4),
        np.array([source.curve.sites.kinds[0] for source in sources]).reshape(-1, KINDS),
        np.array([source.likeness for source in sources]),
    )
    return first_of(sources[number] for number in np.argsort(-close, kind="stable"))


def first_of(sources: Iterable[Source]) -> list[Source]:
    """As many of the first as have ``MOST_POINTS`` plans; one at least."""
    found: list[Source] = []
    points = 0
    for source in sources:
        points += len(source.curve.noise)
        if found and points > MOST_POINTS:
            break
        found.append(source)
    return found


def _known(sources: Sequence[Source], values: str, noise: Sequence[np.ndarray]) -> Known:
    curves = [source.curve for source in sources]
    return Known(
        joined([curve.sites for curve in curves]),
        np.array([source.likeness for source in sources]),
        np.concatenate([getattr(curve, values) for curve in curves]),
        np.concatenate(noise),
    )


def _times(
    covariance: Covariance, sources: Sequence[Source], asked: Sites, physics: Sequence[float]
) -> Posterior:
    """Logs of seconds."""
    known = _known(sources, "seconds", [source.curve.noise for source in sources])
    found = posterior(covariance, known, asked)
    return found._replace(mean=found.mean + np.log(physics))


def _memory(
    covariance: Covariance, sources: Sequence[Source], asked: Sites, held: Sequence[float]
) -> Posterior:
    """Logs of bytes."""
    noise = [np.full(len(source.curve.noise), _NOISE_OF_BYTES) for source in sources]
    found = posterior(covariance, _known(sources, "temp_bytes", noise), asked)
    return found._replace(mean=found.mean + np.log(held))


def _bytes(held: Posterior, deviations: float) -> np.ndarray:
    """Working memory, so many standard deviations above the mean."""
    deviation = np.sqrt(np.maximum(np.diag(held.covariance), 0.0))
    return np.asarray(np.maximum(np.exp(held.mean + deviations * deviation), memory.LEAST_BYTES))


def _within(times: Posterior, chosen: int, fitting: list[int]) -> float:
    """By what fraction another plan may be faster, if it is by a standard deviation."""
    unsure = times.deviation(chosen)
    gains = [times.mean[chosen] - times.mean[n] + unsure[n] for n in fitting if n != chosen]
    return max(0.0, 1 - math.exp(-max(gains, default=0.0)))
