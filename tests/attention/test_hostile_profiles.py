"""What a bundle from somebody else can do to a program: choose a plan, and nothing more."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_measurement, make_profile

import autochunk
from autochunk.device import detect
from autochunk.errors import AutochunkWarning
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.resolution import resolve
from autochunk.store import bundle, files
from autochunk.store.measurement import Measurement
from autochunk.store.profiles import ProfileStore

X = jax.random.normal(jax.random.key(0), (2, 24, 2, 4))
SEGMENTS = jnp.zeros((2, 24), int)
CALLS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "plain": lambda x: autochunk.dot_product_attention(x, x, x),
    "window": lambda x: autochunk.dot_product_attention(
        x, x, x, is_causal=True, local_window_size=(5, 0), query_segment_ids=SEGMENTS
        , key_value_segment_ids=SEGMENTS),
}  # fmt: skip


@pytest.fixture
def chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[jax.Array], jax.Array], Measurement], jax.Array]:
    """What a call gives, and its gradients, where a bundle has it run what was "measured"."""

    def run(call: Callable[[jax.Array], jax.Array], hostile: Measurement) -> jax.Array:
        def both(x: jax.Array) -> jax.Array:
            return jnp.stack([call(x), jax.grad(lambda x: call(x).sum())(x)])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AutochunkWarning)
            jax.jit(both).lower(X)  # a miss is told of what comes to run
            asked = ProfileStore().missed(detect())
            plans = (make_measurement("dense", None, 1.0, 1000.0), hostile)
            files.write(
                tmp_path / "b.json", bundle.dump([make_profile(w, detect(), plans) for w in asked])
            )
            monkeypatch.setenv("AUTOCHUNK_PROFILES", str(tmp_path / "b.json"))
            resolve.forget_all()
            assert {resolve.resolve(workload).match for workload in asked} == {"exact"}
            jax.clear_caches()
            return jnp.asarray(jax.jit(both)(X))

    return run


@pytest.mark.parametrize(
    ("call", "limit", "implementation"),
    [
        ("plain", 1e-300, "xla"),
        ("plain", 5e-324, "xla_rows"),
        ("window", 1e-300, "xla"),
        ("plain", 1e300, "xla"),
    ],
)
def test_limits_choose_slices_and_nothing_else(
    call: str,
    limit: float,
    implementation: str,
    chosen: Callable[[Callable[[jax.Array], jax.Array], Measurement], jax.Array],
) -> None:
    """However small or large: the call runs, and its results are what they are."""
    found = chosen(CALLS[call], make_measurement(implementation, limit, 0.1, 0.0))
    with autochunk.use(max_chunk_size_mb=None):
        expected = jnp.stack([CALLS[call](X), jax.grad(lambda x: CALLS[call](x).sum())(X)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "implementation", sorted({*IMPLEMENTATIONS, "no_such_thing", "x" * 200} - {"xla", "xla_rows"})
)
def test_kernels_that_are_not_here_do_not_run(
    implementation: str,
    chosen: Callable[[Callable[[jax.Array], jax.Array], Measurement], jax.Array],
) -> None:
    """Of another platform, not installed, or unknown: another plan does."""
    found = chosen(CALLS["plain"], make_measurement(implementation, None, 0.1, 0.0))
    assert bool(jnp.isfinite(found).all())


@pytest.mark.parametrize("ratio", [0.0, 5e-324, 1e-300, 1e300])
def test_times_beyond_belief(
    ratio: float, chosen: Callable[[Callable[[jax.Array], jax.Array], Measurement], jax.Array]
) -> None:
    """They make a plan the best or the worst."""
    times: dict[str, Any] = {"ratios": (ratio,) * 5, "seconds": (ratio,) * 5}
    found = chosen(CALLS["plain"], make_measurement("xla", 1.0, 1.0, 2.0**59 / 1e6, **times))
    assert bool(jnp.isfinite(found).all())
