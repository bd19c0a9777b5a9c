"""Curves: what was measured, as points that a prediction learns from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autochunk.errors import ArgumentError
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import Plan
from autochunk.predict import memory, work
from autochunk.predict.seconds import seconds
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.workload import DTYPES, Workload

# A time is never surer than this, nor is one of fewer repeats than three surer than that.
_LEAST_NOISE, _FEW, _NOISE_OF_FEW = 0.02, 3, 0.1
_FAR = 3.0
MOST_PLANS = 130
"""As many of one curve, and of all that a prediction learns from: its time grows by the cube."""

KINDS = 6
"""How many numbers say what kind a workload is of."""


class Sites(NamedTuple):
    """Where plans of workloads lie.

    Attributes:
      sizes: of each workload log2 of T', T, batch x heads and key size.
      kinds: of each workload dtype, mode, whether positions and a bias are there, whether a mask or
        segments leave keys out, or lengths alone, and what else is computed of each logit, as
        numbers.
      of: the workload of each plan, by its row in the two.
      names: of each plan its implementation, by its place in ``IMPLEMENTATIONS``.
      slices: of each plan log2 of bytes of logits at once, rows of a slice and number of slices.
    """

    sizes: np.ndarray
    kinds: np.ndarray
    of: np.ndarray
    names: np.ndarray
    slices: np.ndarray


class Curve(NamedTuple):
    """The timed plans of one profile.

    Attributes:
      sites: where they lie.
      seconds, noise: log of the time over that by physics, and its standard deviation.
      temp_bytes: log of the working memory over that by accounting.
    """

    sites: Sites
    seconds: np.ndarray
    noise: np.ndarray
    temp_bytes: np.ndarray


def sites(workload: Workload, plans: Sequence[Plan]) -> Sites:
    """Where plans of a workload lie."""
    names = list(IMPLEMENTATIONS)
    count = len(plans)
    works = [work.work_of(workload, plan) for plan in plans]
    slices = [(one.at_once, one.rows, one.slices) for one in works]
    return Sites(
        sizes_of(workload)[None],
        kinds_of(workload)[None],
        np.zeros(count, int),
        np.array([names.index(plan.implementation) for plan in plans], int),
        np.log2(np.array(slices, float).reshape(count, 3)),
    )


def sizes_of(workload: Workload) -> np.ndarray:
    """log2 of T', T, batch x heads and key size."""
    together = workload.batch * workload.num_heads
    sizes = (workload.query_length, workload.key_length, together, workload.key_size)
    return np.asarray(np.log2(np.array(sizes, float)))


def kinds_of(workload: Workload) -> np.ndarray:
    """What ``Sites.kinds`` has."""
    positions = workload.reach != (None, None)
    masks = 1 if workload.mask != "none" or workload.query_segment_ids != "none" else 0
    masks = masks or 2 * bool(workload.covering)
    added = workload.bias != "none" or workload.alibi_slopes != "none"
    more = (workload.dropout_bits != "none") + 2 * workload.soft_cap
    more += 4 * (workload.alibi_slopes != "none")
    mode = workload.mode == "training"
    return np.array((DTYPES.index(workload.dtype), mode, positions, added, masks, more), int)


def curve(profile: Profile) -> Curve | None:
    """A profile's timed plans that this version knows; None if there are not two to compare.

    Of functions that are not attention nothing is predicted.
    """
    if profile.function:
        return None
    workload, platform = profile.parsed_workload(), profile.device.platform
    timed = [m for m in profile.measurements if m.timed and m.implementation in IMPLEMENTATIONS]
    timed = [m for m in timed if m.ratio > 0 and m.seconds_median > 0 and _runs(m.plan, workload)]
    timed = fastest(_worth_knowing(timed))
    if len(timed) < 2:
        return None
    # Ratios are to one plan's time: what they compare is surer than seconds are.
    unit = float(np.median([m.seconds_median / m.ratio for m in timed]))
    plans = [m.plan for m in timed]
    physics = [seconds(workload, plan, platform) for plan in plans]
    held = [memory.temp_bytes(workload, plan, platform) for plan in plans]
    took = [max(m.temp_bytes or 0, memory.LEAST_BYTES) for m in timed]
    return Curve(
        sites(workload, plans),
        np.log([m.ratio * unit for m in timed]) - np.log(physics),
        np.array([_noise(m) for m in timed]),
        np.log(took) - np.log(held),
    )


def _worth_knowing(timed: list[Measurement]) -> list[Measurement]:
    """All but slices that are slower than the best plan by far: what else they tell is little."""
    best = min((m.ratio for m in timed), default=0.0)
    return [m for m in timed if m.max_chunk_size_mb is None or m.ratio <= _FAR * best]


def fastest(timed: list[Measurement]) -> list[Measurement]:
    """All but the slowest where there are more than a tune tries: to learn all takes for ever."""
    rising = sorted(range(len(timed)), key=lambda number: timed[number].ratio)
    return [timed[number] for number in sorted(rising[:MOST_PLANS])]


def _runs(plan: Plan, workload: Workload) -> bool:
    """Whether a plan from a file has slices: its limit may be too small for these sizes."""
    try:
        work.work_of(workload, plan)
    except ArgumentError:
        return False
    return True


def _noise(measurement: Measurement) -> float:
    repeats = len(measurement.ratios)
    noise = measurement.spread / math.sqrt(repeats) if repeats >= _FEW else _NOISE_OF_FEW
    return max(_LEAST_NOISE, noise)


def joined(several: Sequence[Sites]) -> Sites:
    """All in one."""
    sizes, kinds, of, names, slices = (list(arrays) for arrays in zip(*several, strict=True))
    firsts = np.cumsum([0, *(len(one) for one in sizes)])
    of = [one + first for one, first in zip(of, firsts, strict=False)]
    return Sites(*map(np.concatenate, (sizes, kinds, of, names, slices)))
