"""The Gaussian process: what is known comes back, what is far is unknown."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from autochunk.plan import Plan
from autochunk.predict.curves import Sites, joined, sites
from autochunk.predict.process import (
    Covariance,
    Known,
    _solve,
    covaries,
    of_bytes,
    of_seconds,
    posterior,
)
from autochunk.workload import Workload

PLANS = [Plan("dense"), Plan("xla"), Plan("xla", 1.05), Plan("xla_rows", 4.2), Plan("cudnn")]
PARAMETERS = pytest.mark.parametrize(
    "covariance",
    [of(platform) for of in (of_seconds, of_bytes) for platform in ("cpu", "gpu")],
    ids=["time of CPUs", "time of GPUs", "memory on CPUs", "memory on GPUs"],
)


def workload(text: str = "b=2,t=512,h=4,k=32", **fields: str) -> Workload:
    return Workload.parse(text, **fields)


def known(where: Sites, values: np.ndarray, noise: float, likeness: float = 1.0) -> Known:
    devices = np.full(len(where.sizes), likeness)
    return Known(where, devices, values, np.full(len(values), noise))


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    sizes = st.integers(1, 5000)
    text = f"b={draw(sizes)},t={draw(sizes)},s={draw(sizes)},h={draw(st.integers(1, 32))},k=64"
    form = draw(st.sampled_from(["", ",causal=yes", ",bias=1hts", ",mask=b11s", ",kv_lengths=yes"]))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    mode = draw(st.sampled_from(["forward", "training"]))
    return Workload.parse(text + form, dtype=dtype, mode=mode)


@PARAMETERS
@given(several=st.lists(workloads(), min_size=1, max_size=6), data=st.data())
def test_it_is_a_covariance(
    several: list[Workload], data: st.DataObject, covariance: Covariance
) -> None:
    """Symmetric, and no sum of values has a negative variance, whatever devices they are of."""
    where = joined([sites(one, PLANS) for one in several])
    devices = np.array([data.draw(st.sampled_from([0.0, 0.2, 0.85, 1.0])) for _ in several])
    found = covaries(covariance, where, devices, where, devices)
    assert np.allclose(found, found.T)
    assert np.linalg.eigvalsh(found).min() > -1e-8


@PARAMETERS
def test_what_is_known_comes_back(covariance: Covariance) -> None:
    """Where measurements hardly scatter the answer is what was measured, and sure."""
    where = sites(workload(), PLANS)
    values = np.array([0.3, -0.2, 0.1, 0.0, -0.4])
    found = posterior(covariance, known(where, values, noise=1e-4), where)
    assert np.allclose(found.mean, values, atol=1e-3)
    assert found.deviation(0).max() < 1e-2


@PARAMETERS
def test_what_is_far_is_unknown(covariance: Covariance) -> None:
    """Nearer sizes say more: their values move the answer further, and it is surer."""
    asked, values = sites(workload(), PLANS), np.full(len(PLANS), 1.0)
    texts = ["b=2,t=512,h=4,k=32", "b=2,t=1024,h=4,k=32", "b=64,t=16384,h=4,k=128"]
    found = [
        posterior(covariance, known(sites(workload(text), PLANS), values, 0.02), asked)
        for text in texts
    ]
    means = [one.mean.mean() for one in found]
    unsure = [np.diag(one.covariance).mean() for one in found]
    assert means[0] > means[1] > means[2] >= 0
    assert unsure[0] < unsure[1] < unsure[2]


@PARAMETERS
@pytest.mark.parametrize(
    "other", [{"mode": "training"}, {"dtype": "bfloat16"}, {"bias": "1hts"}, {"mask": "b11s"}]
)
def test_another_form_says_less(covariance: Covariance, other: dict[str, str]) -> None:
    """As does another device, the less the less it is like this one."""
    asked, values = sites(workload(), PLANS), np.full(len(PLANS), 1.0)

    def told(where: Sites, likeness: float) -> float:
        return float(posterior(covariance, known(where, values, 0.02, likeness), asked).mean.mean())

    same = told(asked, 1.0)
    assert told(sites(workload(**other), PLANS), 1.0) < same
    assert told(asked, 0.2) < told(asked, 0.8) < same


@given(count=st.integers(1, 200), seed=st.integers(0, 9))
def test_systems_are_solved_by_halves(count: int, seed: int) -> None:
    """Of any size, as by LAPACK at once."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(count, count))
    matrix, values = root @ root.T + count * np.eye(count), random.normal(size=(count, 3))
    assert np.allclose(_solve(matrix, values), np.linalg.solve(matrix, values))
