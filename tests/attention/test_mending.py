"""Outputs of fused kernels put right: rows without a key, and what excluded values spoil."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, draw, lowering_for_an_h100

from autochunk.attention.kernels import Inputs, in_place, mending
from autochunk.attention.kernels.inputs import Settings
from autochunk.attention.kernels.mending import can_mend, mask_tells, mended
from autochunk.attention.kernels.tokamax import quiet

PLAIN = Settings(0.3, None, None, None, None)
NONE: jax.Array = jnp.zeros((1, 1, 1), bool)


@dataclasses.dataclass
class Case:
    """A call as kernels are given it, and a plain reference of it."""

    inputs: Inputs
    settings: Settings = PLAIN

    def visible(self) -> np.ndarray:
        """Which keys each row sees, without what a bias hides: [B, H, T', T]."""
        batch, rows, heads, _ = self.inputs.query.shape
        row, key = np.arange(rows)[:, None], np.arange(self.inputs.key.shape[1])
        seen: np.ndarray[Any, Any] = np.ones((batch, heads, rows, key.size), bool)
        if self.settings.right is not None:
            seen &= key - row <= self.settings.right
        if self.settings.left is not None:
            seen &= key - row >= -self.settings.left
        for lengths, indices in (
            (self.inputs.query_seq_lengths, row),
            (self.inputs.key_value_seq_lengths, key),
        ):
            if lengths is not None:
                seen &= indices < np.asarray(lengths)[:, None, None, None]
        return seen if self.inputs.mask is None else seen & np.asarray(self.inputs.mask)

    def sees(self) -> tuple[np.ndarray, np.ndarray]:
        """Which keys a row sees, and what its weights are [B, H, T', T], in float64."""
        query, key = (np.asarray(one, np.float64) for one in self.inputs[:2])
        groups = query.shape[2] // key.shape[2]
        seen = self.visible()
        with np.errstate(all="ignore"):
            logits = np.einsum("bthk,bshk->bhts", query, np.repeat(key, groups, 2))
            logits *= self.settings.scale
            if (cap := self.settings.soft_cap) is not None:
                logits = cap * np.tanh(logits / cap)
            if self.inputs.bias is not None:
                bias = np.asarray(self.inputs.bias, np.float64)
                logits, seen = logits + bias, seen & (bias != -np.inf)
            logits = np.where(seen, logits, -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            return seen, np.where(seen, weights / weights.sum(-1, keepdims=True), 0)

    def value(self) -> np.ndarray:
        """[B, T, H, V] in float64."""
        value = np.asarray(self.inputs.value, np.float64)
        return np.repeat(value, self.inputs.query.shape[2] // value.shape[2], 2)

    def expected(self) -> np.ndarray:
        """The output without what is excluded: [B, T', H, V]."""
        seen, weights = self.sees()
        value = self.value()
        by_any = np.transpose(np.any(seen, axis=2, keepdims=True), (0, 3, 1, 2))
        out = np.einsum("bhts,bshv->bthv", weights, np.where(by_any, value, 0))
        blind = np.swapaxes(~np.any(seen, axis=3, keepdims=True), 1, 2)
        return np.asarray(np.where(blind, value.mean(1, keepdims=True), out))

    def spoilt(self, dtype: Any) -> jax.Array:
        """As kernels give it: zero times infinity is NaN, rows without a key give zero."""
        with np.errstate(all="ignore"):
            out = np.einsum("bhts,bshv->bthv", self.sees()[1], self.value())
        return jnp.asarray(np.where(self.blind().swapaxes(1, 2)[..., None], 0, out), dtype)

    def blind(self) -> np.ndarray:
        """Rows without a key: [B, H, T']."""
        return np.asarray(~self.sees()[0].any(-1))


def drawn(
    rows: int, keys: int, dtype: Any = jnp.float32, size: int = 24, batch: int = 2, **settings: Any
) -> Case:
    """Sequences of four heads, two of keys."""
    shapes = (rows, 4, size), (keys, 2, size), (keys, 2, 20)
    query, key, value = (
        jnp.asarray(draw((batch, *shape), seed) * 2 - 1, dtype) for seed, shape in enumerate(shapes)
    )
    return Case(Inputs(query, key, value), PLAIN._replace(**settings))


def padded(case: Case, seen: int) -> Case:
    """With NaN and infinity in keys and values from one on, which a mask of one row hides."""
    batch, keys = case.inputs.key.shape[:2]
    mask = jnp.broadcast_to(jnp.arange(keys) < seen, (batch, 1, 1, keys))
    spoil = {name: getattr(case.inputs, name).at[:, seen:] for name in ("key", "value")}
    spoilt = {"key": spoil["key"].set(jnp.nan), "value": spoil["value"].set(jnp.inf)}
    return dataclasses.replace(case, inputs=case.inputs._replace(mask=mask, **spoilt))


def cases() -> dict[str, Case]:
    bias = draw((1, 4, 70, 90), 8).astype(np.float32)
    hiding = np.where(draw((1, 4, 70, 90), 9) < 0.3, -np.inf, bias)
    hiding[:, 1, 5:40] = -np.inf
    own = draw((2, 4, 70, 90), 10) < 0.5
    own[..., 80:] = False
    own[1, :, 33] = False
    few = np.where(np.arange(24) < 20, draw((1, 4, 40, 24), 11), -np.inf).astype(np.float32)
    few[:, 2, 33] = few[:, :, :, 5] = -np.inf
    of_bias, many = drawn(70, 90), padded(drawn(40, 24, batch=19), 20)
    assert many.inputs.mask is not None
    hidden = many.inputs.mask.at[17].set(False)
    many = dataclasses.replace(many, inputs=many.inputs._replace(mask=hidden))
    found = {
        "padding": padded(drawn(70, 90), 50),
        "padding, many rows": padded(drawn(1100, 33), 7),
        "one row, one key": padded(drawn(1, 1), 1),
        "nothing is seen": padded(drawn(70, 90), 0),
        "half precision": padded(drawn(70, 90, jnp.bfloat16), 50),
        "wide heads": padded(drawn(70, 90, size=100), 50),
        "causal": padded(drawn(70, 90, right=0), 50),
        "window": padded(drawn(70, 90, left=7, right=2), 50),
        "cap": padded(drawn(70, 90, soft_cap=2.0), 50),
        "bias": padded(of_bias, 50),
        "bias that hides": padded(of_bias, 60),
        "a mask of each row's own": padded(drawn(70, 90), 80),
        "lengths": drawn(70, 90),
        "a bias that hides, of many sequences": many,
        "a bias of many sequences": many,
    }
    changes: dict[str, dict[str, Any]] = {
        "bias": {"bias": bias},
        "bias that hides": {"bias": hiding},
        "a bias that hides, of many sequences": {"bias": few},
        "a bias of many sequences": {"bias": np.zeros_like(few)},
        "a mask of each row's own": {"mask": own},
        "lengths": {
            "query_seq_lengths": np.asarray([70, 9], np.int32),
            "key_value_seq_lengths": np.asarray([50, 90], np.int32),
        },
    }
    for name, change in changes.items():
        one = found[name]
        arrays = {key: jnp.asarray(array) for key, array in change.items()}
        found[name] = dataclasses.replace(one, inputs=one.inputs._replace(**arrays))
    lengths = found["lengths"].inputs
    unseen = lengths.value.at[0, 50:].set(jnp.nan)
    found["lengths"].inputs = lengths._replace(value=unseen)
    return found


CASES = cases()


def told_blind(case: Case, told: str) -> jax.Array:
    """What is told of rows without a key: which these are, or those without a bias's, or none."""
    if told == "nothing":
        return NONE
    without = dataclasses.replace(case, inputs=case.inputs._replace(bias=None))
    return jnp.asarray((case if told == "all" else without).blind())


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a program has more than one tile."""
    monkeypatch.setattr(mending, "_PROGRAMS", 8)


@pytest.mark.parametrize("told", ["all", "but for a bias", "nothing"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_spoilt_is_put_right(name: str, told: str) -> None:
    """What no row sees has no effect; rows without a key, told or not, give the mean."""
    case = CASES[name]
    dtype = case.inputs.query.dtype
    out, blind, tells = case.spoilt(dtype), told_blind(case, told), told != "all"
    if tells and case.inputs.mask is not None:
        mask = case.inputs.mask.astype(jnp.int8)  # as some kernels have it
        case = dataclasses.replace(case, inputs=case.inputs._replace(mask=mask))
    received = mended(out, case.inputs, case.settings, blind, tells=tells, interpret=True)
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-4
    np.testing.assert_allclose(
        np.asarray(received, np.float64), case.expected(), rtol=tolerance, atol=tolerance
    )


MASKED = {name: case for name, case in CASES.items() if mask_tells(case.inputs, case.settings)}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_one_row_tells(name: str) -> None:
    """Of rows without a key; a bias may hide more, which the output tells."""
    case = MASKED[name]
    dtype, tells = case.inputs.query.dtype, case.inputs.bias is not None
    received = mended(
        case.spoilt(dtype), case.inputs, case.settings, None, tells=tells, interpret=True
    )
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-4
    np.testing.assert_allclose(
        np.asarray(received, np.float64), case.expected(), rtol=tolerance, atol=tolerance
    )


def test_whose_bias_is_looked_at() -> None:
    """Of a bias that many sequences share each program reads its rows, not all the output."""
    looked_at = {
        name
        for name, case in CASES.items()
        if mending._share(case.spoilt(jnp.float32).shape, case.inputs.bias).of_bias
    }
    assert looked_at == {"a bias that hides, of many sequences", "a bias of many sequences"}


def test_which_masks_tell() -> None:
    """Of one row for all heads, where nothing else hides keys."""
    assert MASKED.keys() >= {"padding", "one row, one key", "nothing is seen", "bias that hides"}
    assert not MASKED.keys() & {"causal", "window", "a mask of each row's own", "lengths"}
    inputs = MASKED["padding"].inputs
    assert inputs.mask is not None
    for other in (
        inputs._replace(key_value_seq_lengths=jnp.ones(2, jnp.int32)),
        inputs._replace(mask=jnp.ones((2, 4, 1, 90), bool)),
        inputs._replace(mask=jnp.ones((1, 1, 1, 10**4), bool)),
        inputs._replace(mask=None),
    ):
        assert not mask_tells(other, PLAIN)


@pytest.mark.parametrize("told", [True, False], ids=["told", "by the output"])
def test_what_is_right_stays(told: bool) -> None:
    """To the bit, whatever keys and values hold; so do zeros of a row that sees a key."""
    case = padded(drawn(300, 40), 30)
    out = jnp.asarray(draw((2, 300, 4, 20))).at[:, 7].set(0)
    received = mended(out, case.inputs, case.settings, NONE, tells=not told, interpret=True)
    np.testing.assert_array_equal(received, out)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 4, 1), (1, 1, 70), (2, 4, 70)])
def test_rows_that_are_told(sizes: tuple[int, ...]) -> None:
    """They broadcast; the others stay."""
    case = drawn(70, 90)
    out = case.spoilt(jnp.float32)
    blind = draw(sizes) < 0.5
    received = mended(out, case.inputs, case.settings, jnp.asarray(blind), interpret=True)
    flags = np.broadcast_to(blind, (2, 4, 70)).swapaxes(1, 2)[..., None]
    mean = case.value().mean(1, keepdims=True)
    assert_close(np.asarray(received), np.where(flags, mean, out), 1e-6)


def test_a_row_that_is_wrong_itself() -> None:
    """A query that is NaN, or a value that is seen: the row is NaN, and the others are not."""
    case = padded(drawn(70, 90), 50)
    query = case.inputs.query.at[0, 3].set(jnp.nan)
    case.inputs = case.inputs._replace(query=query)
    received = mended(
        case.spoilt(jnp.float32), case.inputs, PLAIN, NONE, tells=True, interpret=True
    )
    wrong = np.isnan(np.asarray(received)).all((2, 3))
    assert np.argwhere(wrong).tolist() == [[0, 3]]
    assert not np.isnan(np.asarray(received)[~wrong]).any()


def test_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with Triton, for rows that its shared memory holds tiles of."""
    inputs = drawn(5, 6).inputs
    assert not can_mend(inputs)
    monkeypatch.setattr(in_place, "_has_triton", lambda: True)
    assert can_mend(inputs)
    with in_place.lowering(for_export=True):
        assert not can_mend(inputs)
    assert not can_mend(inputs._replace(value=jnp.zeros((2, 6, 2, 500))))
    assert not can_mend(inputs._replace(value=jnp.zeros((2, 6, 2, 0))))


@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_triton_takes_it(name: str) -> None:
    """As far as can be told without a GPU: what is written is the output's own memory."""
    case = CASES[name]
    out = jax.typeof(case.spoilt(case.inputs.query.dtype))
    inputs = jax.tree.map(jax.typeof, case.inputs)
    with lowering_for_an_h100(), quiet():
        traced = jax.jit(
            lambda out, inputs: mended(out, inputs, case.settings, NONE, tells=True)
        ).trace(out, inputs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call = next(line for line in text.splitlines() if "custom_call @__gpu$xla.gpu.triton" in line)
    assert "output_operand_alias<" in call
