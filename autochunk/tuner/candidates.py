"""The space of plans that a search looks at, and in which order: the likely best first."""

from __future__ import annotations

import math
from collections.abc import Iterable

from autochunk.implementations import IMPLEMENTATIONS, is_fused, kernels_on
from autochunk.plan import LogitsShape, Plan, candidate_plans, same_slices
from autochunk.store.choice import DEFAULT, DENSE
from autochunk.tuner.effort import EffortSettings

# A limit that often wins and always fits.
_MIDDLE_MB = 32.0


def all_plans(shape: LogitsShape, settings: EffortSettings, platform: str) -> list[Plan]:
    """Dense, fused kernels where there may be any, the default limit, and the ladder of limits.

    Plans that come to the same slices once.
    """
    fused = map(Plan, kernels_on(platform))
    ladder = candidate_plans(shape, step=settings.step, most_slices=settings.most_slices)
    plans = [DENSE, *fused, *ladder]
    return plans if equivalent(DEFAULT, plans, shape) else [*plans, DEFAULT]


def equivalent(plan: Plan, plans: Iterable[Plan], shape: LogitsShape) -> Plan | None:
    """The first of some plans that comes to the same slices."""
    return next((other for other in plans if same_slices(plan, other, shape)), None)


def in_order(plans: list[Plan], hints: Iterable[Plan], shape: LogitsShape) -> list[Plan]:
    """The plans as they are to be tried: what hints come to, what is likely, then the others.

    These are the limits of one implementation after the other; first every second one, from the
    middle, so that where time ends too soon the whole range has been looked at.
    """
    hinted = (equivalent(hint, plans, shape) for hint in hints)
    names = list(IMPLEMENTATIONS)
    limits = sorted({plan.max_chunk_size_mb for plan in plans if plan.max_chunk_size_mb})
    coarse = set(limits[_nearest_to_the_middle(limits) % 2 :: 2]) if limits else set()

    def late(plan: Plan) -> tuple[int, bool, tuple[bool, float]]:
        fine = plan.max_chunk_size_mb not in coarse
        return names.index(plan.implementation), fine, _from_the_middle(plan)

    rest = sorted(plans, key=late)
    return list(dict.fromkeys([*filter(None, hinted), *likely(plans), *rest]))


def likely(plans: list[Plan]) -> list[Plan]:
    """What to measure first.

    A fused kernel, which wins by far where there is one; a limit near ``_MIDDLE_MB``; what is not
    sliced, which the baselines are among.
    """
    limited = [plan for plan in plans if plan.max_chunk_size_mb is not None]
    unlimited = [plan for plan in plans if plan.max_chunk_size_mb is None]
    middle = sorted((p for p in limited if p.implementation == "xla"), key=_from_the_middle)
    return [
        *(plan for plan in plans if is_fused(plan.implementation)),
        *middle[:1],
        *(plan for plan in unlimited if not is_fused(plan.implementation)),
        *(plan for plan in plans if plan == DEFAULT),
    ]


def _nearest_to_the_middle(limits: list[float]) -> int:
    return min(range(len(limits)), key=lambda number: abs(math.log(limits[number] / _MIDDLE_MB)))


def _from_the_middle(plan: Plan) -> tuple[bool, float]:
    """Order in which limits are tried.

    From ``_MIDDLE_MB`` outwards, so that a plan's larger neighbours come before it if it is small.
    """
    limit = plan.max_chunk_size_mb
    return (True, 0.0) if limit is None else (False, abs(math.log(limit / _MIDDLE_MB)))
