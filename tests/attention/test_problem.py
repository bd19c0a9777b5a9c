"""Which blocks of a mask of each row's own are closed, and which are open."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from reference import draw

from autochunk import Plan
from autochunk.attention import kernels
from autochunk.attention.kernels import Inputs
from autochunk.attention.kernels.problem import Problem
from autochunk.plan import Plans

MASKS = {
    "causal": np.tri(530, 1100, dtype=bool),
    "a band": np.abs(np.arange(530)[:, None] - np.arange(1100)) < 90,
    "almost all": np.arange(530 * 1100).reshape(530, 1100) != 530 * 1100 - 1,
    "one": np.arange(530 * 1100).reshape(530, 1100) == 264 * 1100 + 1099,
    "all": np.ones((530, 1100), bool),
    "none": np.zeros((530, 1100), bool),
}


@pytest.mark.parametrize("limit", [None, 0.2])
@pytest.mark.parametrize("name", MASKS)
def test_blocks_of_a_mask(name: str, limit: float | None) -> None:
    """As a look at each block of all heads tells, also of the last, which overlap others."""
    mask = np.stack([MASKS[name], np.zeros_like(MASKS[name])])[:, None, None]
    mask[1, ..., :2] = name in ("all", "almost all")
    plan = Plan("xla", limit)
    query, key = jnp.asarray(draw((2, 530, 1, 1, 4))), jnp.asarray(draw((2, 1100, 1, 4)))
    inputs = Inputs(query, key, key, mask=jnp.asarray(mask))
    call = kernels.Call(("query", "key", "value", "mask"), 0.5, False, Plans(plan, plan))
    problem = Problem(inputs, call, plan, differentiable=False)
    sizes = {"rows": problem.slices.rows, "keys": problem.slices.keys}
    assert sizes["rows"] <= 265
    assert sizes["keys"] <= 275
    lengths = {"rows": 530, "keys": 1100}
    starts = [
        [min(start, lengths[axis] - size) for start in range(0, lengths[axis], size)]
        for axis, size in sizes.items()
    ]
    for row, key_ in itertools.product(*starts):
        block = mask[..., row : row + sizes["rows"], key_ : key_ + sizes["keys"]]
        # that there are arrays says that it is not asked while tracing
        found = problem.cover.block({"rows": row, "keys": key_}, sizes, {"mask": query})
        assert tuple(map(bool, found)) == (not block.any(), bool(block.all()))
