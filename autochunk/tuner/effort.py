"""What each effort means: how long, on what, and how hard to look."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autochunk.store.profile import Effort
from autochunk.tuner.presets import PRESETS

# One timing takes at least this long, by repeating the call: shorter ones measure the clock and the
# dispatch.
SHORTEST_TIMING = 0.02


@dataclass(frozen=True)
class EffortSettings:
    """What one effort means.

    Attributes:
      timeout: seconds for everything, where no other limit is given; None is none.
      presets: what is tuned where nothing else is asked for, the longest last: time that the others
        leave is theirs.
      more_on_gpus: what is tuned there besides; on a CPU time would not do for it.
      least_share: seconds that a workload takes to be worth storing; of what "auto" missed no more
        are begun than have so many.
      seconds_per_request: a measuring process that takes longer over one plan is ended.
      step: ratio between neighbouring limits in MB.
      most_slices: plans with more slices are not tried.
      hopeless: slower than the best by this factor, a plan gets no third round; slower by its
        third power, not even a second.
      beaten: where a fused kernel is faster than dense attention and than slices by this factor,
        no other slices are tried.
      least_rounds, rounds: fewest and most rounds for one plan that is not given up; the baselines,
        which users compare with, always get the fewest.
      seconds: time for the rounds of one plan, beyond the fewest.
      steady: a plan of attention that has had its fewest rounds gets no more once the relative
        spread of its ratios is at most this.
      finalists: how many plans meet in the joint rounds.
      least_joint, joint_rounds: fewest and most joint rounds; they end when the choice is clear.
      joint_seconds: time for them, beyond the fewest.
    """

    timeout: float | None
    presets: tuple[str, ...]
    more_on_gpus: tuple[str, ...]
    least_share: float
    seconds_per_request: float
    step: int
    most_slices: int
    hopeless: float
    beaten: float
    least_rounds: int
    rounds: int
    seconds: float
    steady: float
    finalists: int
    least_joint: int
    joint_rounds: int
    joint_seconds: float


EFFORT_SETTINGS: dict[Effort, EffortSettings] = {
    "quick": EffortSettings(
        timeout=110.0,
        presets=("vision", "language-model", "long-context"),
        more_on_gpus=(),
        least_share=18.0,
        seconds_per_request=60.0,
        step=4,
        most_slices=64,
        hopeless=1.3,
        beaten=1.25,
        least_rounds=2,
        rounds=5,
        seconds=1.0,
        steady=0.03,
        finalists=4,
        least_joint=3,
        joint_rounds=12,
        joint_seconds=4.0,
    ),
    "standard": EffortSettings(
        timeout=570.0,
        presets=(
            "language-model",
            "encoder",
            "vision",
            "protein-folding",
            "cross-attention",
            "long-context",
        ),
        more_on_gpus=(
            "padding-mask",
            "padding-lengths",
            "packed",
            "grouped-heads",
            "alphafold",
            "decode",
            "sliding-window",
        ),
        least_share=40.0,
        seconds_per_request=120.0,
        step=2,
        most_slices=256,
        hopeless=1.35,
        beaten=1.25,
        least_rounds=3,
        rounds=10,
        seconds=0.5,
        steady=0.03,
        finalists=8,
        least_joint=6,
        joint_rounds=60,
        joint_seconds=30.0,
    ),
    "thorough": EffortSettings(
        timeout=None,
        presets=tuple(PRESETS),
        more_on_gpus=(),
        least_share=60.0,
        seconds_per_request=600.0,
        step=2,
        most_slices=1024,
        hopeless=1.5,
        beaten=math.inf,
        least_rounds=4,
        rounds=20,
        seconds=10.0,
        steady=0.0,
        finalists=8,
        least_joint=10,
        joint_rounds=100,
        joint_seconds=90.0,
    ),
}


def standard_presets(effort: Effort, platform: str) -> tuple[str, ...]:
    """What is tuned on a platform, as jax names it, where nothing else is asked for."""
    settings = EFFORT_SETTINGS[effort]
    return settings.presets + (settings.more_on_gpus if platform == "gpu" else ())
