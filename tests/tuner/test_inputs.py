"""What is computed when a workload is measured: every kind of call, and its reference."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from autochunk.plan import Plan
from autochunk.tuner.inputs import WorkloadInputs
from autochunk.tuner.reference import (
    dense_on_sample,
    error_of_products,
    error_of_rounded_products,
    reference,
    relative_error,
)
from autochunk.workload import DType, Workload

SHAPES = [
    "b=3,t=40,h=4,kv_heads=2,k=8,causal=yes,kv_lengths=b",
    "b=3,t=40,h=4,k=8,q_lengths=b,kv_lengths=b",
    "b=2,t=40,h=2,k=8,window=7:2",
    "b=2,t=40,h=2,k=8,causal=yes,window=5:5",
    "b=2,t=64,h=2,k=8,q_segments=bt,kv_segments=bs",
    "b=2,t=3,s=50,h=2,k=8,causal=yes,kv_lengths=b,offset=b",
    "b=2,t=30,h=4,k=8,causal=yes,alibi=1h",
    "b=2,t=30,h=4,k=8,bias=1hts,alibi=bh,soft_cap=yes",
    "b=2,t=30,h=2,k=8,dropout=bht",
    "b=2,t=30,h=2,k=8,causal=yes,mask=b1ts,dropout=11t",
    "b=3,t=30,h=2,k=8,mask=b11s",
    "b=2,t=30,h=2,k=8,kv_lengths=1,residual=yes",
    "b=1,t=30,h=2,k=8,precision=highest",
]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_call_is_measured(shape: str) -> None:
    """The reference, dense attention on its sample and plans in slices agree.

    The arguments that are drawn are of the workload.
    """
    workload = Workload.parse(shape, mode="training")
    inputs = WorkloadInputs(workload)
    assert inputs.arguments.workload().with_mode("training") == workload
    expected = reference(inputs)
    assert relative_error(dense_on_sample(inputs), expected) < 1e-5
    for plan in (Plan("dense"), Plan("xla", 2e-3)):
        results = jax.jit(inputs.function(plan))(*inputs.passed)
        assert relative_error(inputs.on_sample(results), expected) < 1e-5


@pytest.mark.parametrize(("rows", "keys"), [(40, 40), (30, 40), (40, 20)])
@pytest.mark.parametrize("dims", ["b11s", "111s", "bh1s", "b1ts"])
def test_masks_are_padding(dims: str, rows: int, keys: int) -> None:
    """In each sequence some keys are excluded, the last ones; and later ones, for rows' own."""
    shape = f"b=3,t={rows},s={keys},h=2,k=8,mask={dims}"
    mask = np.asarray(WorkloadInputs(Workload.parse(shape)).arguments.mask)
    counts = mask.sum(-1, keepdims=True)
    np.testing.assert_array_equal(mask, np.arange(keys) < counts)
    padded = counts.max(axis=-2)
    assert ((padded >= keys / 2) & (padded < keys)).all()
    assert (counts >= 1).all()
    later = np.diff(counts, axis=-2)
    assert (later >= 0).all()
    assert (later > 0).any() == (dims[2] == "t")


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2.0**-24), ("bfloat16", 2.0**-9)])
def test_products_err_as_their_dtype_does(dtype: DType, rounding: float) -> None:
    """By about the rounding of one number, of the largest value."""
    inputs = WorkloadInputs(Workload.parse("t=4,h=2,k=8", dtype=dtype))
    assert rounding / 20 < error_of_products(inputs) < 20 * rounding


def test_rows_that_see_few_keys_err_by_rounded_products() -> None:
    """As TF32 does, which dense attention does not show: its rows' sums are of the same products.

    Where nothing is rounded, and forward, nothing is allowed for it.
    """
    few, many = (
        WorkloadInputs(Workload.parse(f"t=2000,h=2,k=16{more}", mode="training"))
        for more in (",window=999:0", "")
    )
    expected = reference(few)
    as_tf32, as_float32 = 4e-4, 2e-7
    found = error_of_rounded_products(few, expected, as_tf32)
    assert 10 * as_tf32 > found > 2 * error_of_rounded_products(many, reference(many), as_tf32)
    assert error_of_rounded_products(few, expected, as_float32) == 0
    forward = WorkloadInputs(few.workload.with_mode("forward"))
    assert error_of_rounded_products(forward, reference(forward), as_tf32) == 0


@pytest.mark.gpu
def test_one_query_may_err_as_products_do() -> None:
    """On a GPU dense attention of one query is exact in float32, of more it is rounded to TF32."""
    one, exact = (
        error_of_products(WorkloadInputs(Workload.parse(f"t=1,s=8,h=2,k=8{more}")))
        for more in ("", ",precision=highest")
    )
    assert exact < 1e-5
    assert one > 1e-4
