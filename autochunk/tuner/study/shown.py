"""What a trial tells Optuna's own tools, such as its dashboard: parameters, figures, their ranges.

Nothing here is read again; ``trials`` keeps whole measurements beside it.
"""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import BYTES_PER_MB, Plan
from autochunk.store.measurement import Measurement

# What limits in MB are mostly between; Optuna's own tools draw axes as long.
_SMALL_LIMIT, _LARGE_LIMIT = 1e-3, 1e5


def parameters(plan: Plan) -> dict[str, Any]:
    """What the plan is in Optuna's space.

    An implementation; one for slices has a limit of its own.
    """
    limit = {} if plan.max_chunk_size_mb is None else {limit_of(plan): plan.max_chunk_size_mb}
    return {"implementation": plan.implementation, **limit}


def distributions(plan: Plan) -> dict[str, BaseDistribution]:
    """What each of a plan's parameters is one of."""
    mb = plan.max_chunk_size_mb
    limit = {} if mb is None else {limit_of(plan): limits_around(mb)}
    return {"implementation": CategoricalDistribution(list(IMPLEMENTATIONS)), **limit}


def limits_around(mb: float) -> FloatDistribution:
    """What a limit is one of, on an axis of logarithms."""
    return FloatDistribution(min(mb, _SMALL_LIMIT), max(mb, _LARGE_LIMIT), log=True)


def limit_of(plan: Plan) -> str:
    """The name of the parameter that a plan's limit is."""
    return f"{plan.implementation}.max_chunk_size_mb"


def figures(measurement: Measurement) -> dict[str, Any]:
    """What Optuna's own tools can draw of a plan beside its value; nothing here reads it."""
    memory = measurement.temp_bytes
    return {
        "status": measurement.status,
        **({"seconds": measurement.seconds_median} if measurement.timed else {}),
        **({} if memory is None else {"memory_mb": memory / BYTES_PER_MB}),
    }
