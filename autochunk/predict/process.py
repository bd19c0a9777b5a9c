"""A Gaussian process over plans of workloads: what is near in size and form costs alike.

Regression as in Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), section
2.2. The covariance is a sum of three: what all plans of like workloads have in common (how far
physics is off there), what the same slices cost at like workloads, and what they cost anywhere. Its
parameters were fitted to the shipped curves and to those of other CPUs, each workload being
predicted from the others; ``autochunk evaluate`` shows how well they do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autochunk.implementations import IMPLEMENTATIONS, is_fused, is_sliced
from autochunk.predict.curves import Sites


@dataclass(frozen=True)
class Covariance:
    """The parameters.

    Attributes:
      sizes: distances in T', T, batch x heads and key size, in doublings, over which workloads stop
        being alike.
      halves, dtypes, modes: how alike bfloat16 and float16 are, other dtypes, and forward and
        training.
      kinds: how alike calls are that differ in positions, a bias, a mask, or in dropout, a soft
        cap or ALiBi, of which no curve was there to fit: by these plans are a third apart.
      slices: distances in bytes at once, rows and number of slices, in doublings.
      plain: distance in T' and T, in doublings, for what does not slice.
      orders, kernels, others: how alike are slices in another order, two fused kernels, and
        implementations of different sorts.
      common, own, general: standard deviations of the three parts.
      elsewhere, elsewhere_plans: how alike another device's are, in what is common and in the rest.
      noise: by how much more measurements scatter than their repeats show.
      fused: standard deviations of fused kernels, in those of others.
    """

    sizes: tuple[float, float, float, float]
    halves: float
    dtypes: float
    modes: float
    kinds: tuple[float, float, float, float]
    slices: tuple[float, float, float]
    plain: float
    orders: float
    kernels: float
    others: float
    common: float
    own: float
    general: float
    elsewhere: float
    elsewhere_plans: float
    noise: float
    fused: float


_SECONDS = Covariance(
    sizes=(2.7, 4.1, 3.2, 2.0),
    halves=0.62,
    dtypes=0.72,
    modes=0.5,
    kinds=(0.56, 0.99, 0.56, 0.9),
    slices=(2.6, 3.5, 3.9),
    plain=2.5,
    orders=0.93,
    kernels=0.82,
    others=0.11,
    common=1.16,
    own=0.3,
    general=0.41,
    elsewhere=0.07,
    elsewhere_plans=0.74,
    noise=4.3,
    fused=1.0,
)
# On GPUs bfloat16 and float16 take one time, and what a mask costs depends on the kernel.
_SECONDS_OF_ACCELERATORS = Covariance(
    sizes=(2.3, 4.4, 4.9, 0.9),
    halves=0.98,
    dtypes=0.64,
    modes=0.7,
    kinds=(0.74, 0.96, 0.34, 0.9),
    slices=(2.25, 4.0, 3.9),
    plain=2.4,
    orders=0.98,
    kernels=0.61,
    others=0.01,
    common=0.51,
    own=0.75,
    general=0.48,
    elsewhere=0.07,
    elsewhere_plans=0.74,
    noise=1.9,
    fused=0.59,
)
# XLA for CPUs makes other programs of other sizes; what kernels hold is known without curves.
_BYTES = Covariance(
    sizes=(3.0, 2.3, 3.5, 1.0),
    halves=0.63,
    dtypes=0.52,
    modes=0.43,
    kinds=(0.1, 0.9, 0.13, 0.9),
    slices=(2.9, 3.4, 1.4),
    plain=1.1,
    orders=0.05,
    kernels=0.05,
    others=0.05,
    common=0.38,
    own=0.24,
    general=0.37,
    elsewhere=0.5,
    elsewhere_plans=0.98,
    noise=1.1,
    fused=0.18,
)
_BYTES_OF_ACCELERATORS = Covariance(
    sizes=(3.0, 12.0, 1.9, 1.0),
    halves=0.95,
    dtypes=0.33,
    modes=0.37,
    kinds=(0.54, 0.99, 0.07, 0.9),
    slices=(1.2, 13.0, 1.45),
    plain=20.0,
    orders=0.21,
    kernels=0.02,
    others=0.1,
    common=0.01,
    own=0.21,
    general=0.1,
    elsewhere=0.9,
    elsewhere_plans=0.99,
    noise=0.5,
    fused=0.1,
)


def of_seconds(platform: str) -> Covariance:
    """Of the logs of times on a platform, as jax names it."""
    return _SECONDS if platform == "cpu" else _SECONDS_OF_ACCELERATORS


def of_bytes(platform: str) -> Covariance:
    """Of the logs of working memory on a platform."""
    return _BYTES if platform == "cpu" else _BYTES_OF_ACCELERATORS


class Known(NamedTuple):
    """What is known: where, how like the device asked about that is (1 is the same), and values."""

    sites: Sites
    likeness: np.ndarray
    values: np.ndarray
    noise: np.ndarray


class Posterior(NamedTuple):
    """Mean and covariance of the values asked for."""

    mean: np.ndarray
    covariance: np.ndarray

    def deviation(self, one: int) -> np.ndarray:
        """Standard deviations of the differences of all values from one of them."""
        own = np.diag(self.covariance)
        squares = own + own[one] - 2 * self.covariance[one]
        return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def posterior(covariance: Covariance, known: Known, asked: Sites) -> Posterior:
    """What the known values say of those asked for, on the device asked about."""
    here = np.ones(len(asked.sizes))
    prior = covaries(covariance, asked, here, asked, here)
    across = covaries(covariance, asked, here, known.sites, known.likeness)
    own = covaries(covariance, known.sites, known.likeness, known.sites, known.likeness)
    own[np.diag_indices(len(own))] += np.square(covariance.noise * known.noise)
    gain = _solve(own, across.T).T
    return Posterior(gain @ known.values, prior - gain @ across.T)


# LAPACK solves larger systems by several threads, which wait for each other a hundred times as long
# as that takes where other work has their cores.
_SOLVED_BY_ONE_THREAD = 72


def _solve(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The solution of a system with a covariance, by halves: Schur's complement."""
    count = len(matrix)
    if count <= _SOLVED_BY_ONE_THREAD:
        return np.linalg.solve(matrix, values)
    half = count // 2
    upper, lower = matrix[:half], matrix[half:]
    solved = _solve(upper[:, :half], np.concatenate([upper[:, half:], values[:half]], axis=1))
    by_lower, first = solved[:, : count - half], solved[:, count - half :]
    complement = lower[:, half:] - lower[:, :half] @ by_lower
    second = _solve(complement, values[half:] - lower[:, :half] @ first)
    return np.concatenate([first - by_lower @ second, second])


def covaries(
    covariance: Covariance, one: Sites, ones: np.ndarray, other: Sites, others: np.ndarray
) -> np.ndarray:
    """The covariance of each plan of some sites with each of others, by likenesses of devices."""
    near = _near(one.sizes, other.sizes, covariance.sizes)
    kinds = _kinds(covariance, one.kinds, other.kinds)
    # Each device is as like the one asked about as it is; two others are no more alike than that.
    same = ones[:, None] == others[None]
    like = np.where(same, 1.0, np.minimum(ones[:, None], others[None]))
    common, plans = _by(like, covariance.elsewhere), _by(like, covariance.elsewhere_plans)
    plain = _near(one.sizes[:, :2], other.sizes[:, :2], (covariance.plain,) * 2)
    fine, coarse, sliced = _plans(covariance, one, other)

    places = one.of[:, None] * len(other.sizes) + other.of

    def spread(by_workload: np.ndarray) -> np.ndarray:
        return np.asarray(by_workload.take(places))

    broad = near**0.25  # over twice the distances
    coarse = np.where(sliced, coarse, coarse * spread(plain))
    every = (
        spread(covariance.common**2 * broad * common * kinds)
        + spread(covariance.own**2 * near * plans * kinds) * fine
        + spread(covariance.general**2 * plans * kinds) * coarse
    )
    deviations = np.array([covariance.fused if is_fused(n) else 1.0 for n in IMPLEMENTATIONS])
    return np.asarray(every * deviations[one.names][:, None] * deviations[other.names])


def alike(
    covariance: Covariance,
    asked: tuple[np.ndarray, np.ndarray],
    sizes: np.ndarray,
    kinds: np.ndarray,
    likeness: np.ndarray,
) -> np.ndarray:
    """How much workloads of some sizes and kinds tell of one asked for."""
    near = _near(asked[0][None], sizes, covariance.sizes)[0]
    devices = _by(likeness, covariance.elsewhere_plans)
    return np.asarray(np.sqrt(near) * _kinds(covariance, asked[1][None], kinds)[0] * devices)


def _by(likeness: np.ndarray, least: float) -> np.ndarray:
    """How alike costs are on devices of some likeness: at least so much, all where it is one."""
    return np.asarray(least + (1 - least) * likeness)


def _near(one: np.ndarray, other: np.ndarray, lengths: Sequence[float]) -> np.ndarray:
    # |a - b|^2 in one product
    one, other = one / np.array(lengths), other / np.array(lengths)
    squares = np.square(one).sum(-1)[:, None] + np.square(other).sum(-1)[None]
    return np.asarray(np.exp(-0.5 * np.maximum(squares - 2 * one @ other.T, 0.0)))


def _kinds(covariance: Covariance, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    differ = one[:, None] != other[None]
    halves = (one[:, None, 0] > 0) & (other[None, :, 0] > 0)
    dtypes = np.where(halves, covariance.halves, covariance.dtypes)
    alike = np.where(differ[..., 0], dtypes, 1.0)
    factors = (covariance.modes, *covariance.kinds)
    for number, factor in enumerate(factors, 1):
        alike = alike * np.where(differ[..., number], factor, 1.0)
    return np.asarray(alike)


def _plans(
    covariance: Covariance, one: Sites, other: Sites
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How alike plans are in their slices, and in bytes at once; and whether both slice."""
    alike = _implementations(covariance)[one.names[:, None], other.names[None]]
    slicing = np.array([is_sliced(name) for name in IMPLEMENTATIONS])
    sliced = slicing[one.names][:, None] & slicing[other.names][None]
    by_slices = _near(one.slices, other.slices, covariance.slices)
    by_bytes = _near(one.slices[:, :1], other.slices[:, :1], covariance.slices[:1])
    fine, coarse = np.where(sliced, by_slices, 1.0), np.where(sliced, by_bytes, 1.0)
    return alike * fine, alike * coarse, sliced


@functools.lru_cache
def _implementations(covariance: Covariance) -> np.ndarray:
    """How alike each implementation is to each."""
    names = list(IMPLEMENTATIONS)
    alike = np.full((len(names), len(names)), covariance.others)
    for one, other in itertools.product(range(len(names)), repeat=2):
        if is_sliced(names[one]) and is_sliced(names[other]):
            alike[one, other] = covariance.orders
        if is_fused(names[one]) and is_fused(names[other]):
            alike[one, other] = covariance.kernels
        if one == other:
            alike[one, other] = 1.0
    return alike
