"""What the arguments of a call must be: checks of what a caller gave, one by one.

Each raises ArgumentError, which says what was required, what was received and what to do.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.errors import ArgumentError
from autochunk.operands import TERMS
from autochunk.workload import DTYPES


def array_of(name: str, array: Any) -> jax.Array:
    """Something array-like as an array."""
    try:
        return jnp.asarray(array)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{name} must be an array; got {type(array).__name__} ({error})"
        ) from None


def check_shapes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Ranks, sizes and dtypes of the arrays that every call has."""
    if query.ndim < 3:
        raise ArgumentError(
            f"query must be [..., T', H, K], of rank 3 or more; got shape {query.shape}"
        )
    if str(query.dtype) not in DTYPES:
        raise ArgumentError(
            f"query must be of one of the dtypes {', '.join(DTYPES)}; got {query.dtype}"
        )
    *leading, _, heads, size = query.shape
    for name, array, last in (("key", key, size), ("value", value, None)):
        if array.dtype != query.dtype:
            raise ArgumentError(
                f"{name} must have the query's dtype {query.dtype}; got {array.dtype}"
            )
        if array.ndim != query.ndim or list(array.shape[:-3]) != leading:
            raise ArgumentError(
                f"{name} must have the query's leading dims {tuple(leading)} and rank "
                f"{query.ndim}; got shape {array.shape}"
            )
        if last is not None and array.shape[-1] != last:
            raise ArgumentError(
                f"{name} must have the query's last dim {last}; got shape {array.shape}"
            )
    if value.shape[-3:-1] != key.shape[-3:-1]:
        raise ArgumentError(
            f"value must have the key's length and heads {key.shape[-3:-1]}; got "
            f"{value.shape[-3:-1]}"
        )
    if key.shape[-2] == 0 or heads % key.shape[-2]:
        raise ArgumentError(
            f"the query's heads must be a multiple of the key's; got {heads} and {key.shape[-2]}"
        )


def sizes_of(query: jax.Array, key: jax.Array) -> dict[str, int]:
    """Sizes of the dims that terms have, by letter."""
    return {"h": query.shape[-2], "t": query.shape[-3], "s": key.shape[-3]}


_KINDS: Mapping[str, Any] = {  # of types, which NumPy's and JAX's stubs call differently
    "floating": jnp.floating,
    "boolean": jnp.bool_,
    "integer": jnp.integer,
    "bits": jnp.uint32,
}
_HINTS = {"mask": " (pass terms to add as bias)"}
_DIMS = {"h": "H", "t": "T'", "s": "T"}


def whole_term(
    name: str, term: jax.Array, leading: tuple[int, ...], sizes: dict[str, int]
) -> jax.Array:
    """A term with all its dims."""
    operand = TERMS[name]
    if jnp.issubdtype(term.dtype, jnp.integer):
        term = _in_working_dtype(term, operand.dtype)
    if not jnp.issubdtype(term.dtype, _KINDS[operand.dtype]):
        kind = "floating point" if operand.dtype == "floating" else operand.dtype
        raise ArgumentError(f"{name} must be {kind}{_HINTS.get(name, '')}; got {term.dtype}")
    wanted = (*leading, *(sizes[letter] for letter in operand.dims))
    if not leading and term.ndim == len(wanted) + 1 and term.shape[0] == 1:
        term = term[0]  # jax.nn takes arrays without a batch as a batch of one
    padded = (1,) * (len(wanted) - term.ndim) + term.shape
    if len(padded) != len(wanted) or any(
        size not in (1, whole) for size, whole in zip(padded, wanted, strict=True)
    ):
        dims = ", ".join(["...", *(_DIMS[letter] for letter in operand.dims)])
        raise ArgumentError(f"{name} must broadcast to [{dims}] = {wanted}; got shape {term.shape}")
    return term.reshape(padded)


def _in_working_dtype(term: jax.Array, wanted: str) -> jax.Array:
    """Integers as they are computed with: as floats if added to logits, else of 32 bits at least.

    Indices of rows and keys take the dtype of what they are compared with: they must fit it.
    """
    if wanted == "floating":
        return term.astype(jnp.float32)
    if wanted != "integer" or term.dtype in (jnp.int32, jnp.int64):
        return term
    return term.astype(jnp.int64 if term.dtype == jnp.uint64 else jnp.int32)


def check_pairs(given: Mapping[str, Any]) -> None:
    """Arrays that need each other are given together or not at all."""
    both = {"query_segment_ids", "key_value_segment_ids"}
    if len(both & given.keys()) == 1:
        (missing,) = both - given.keys()
        raise ArgumentError(
            f"query_segment_ids and key_value_segment_ids must be given together; {missing} is "
            "missing (it may be the same array, where queries and keys are of one sequence)"
        )


def number(name: str, value: Any) -> float:
    """A value that is known while tracing, as a float."""
    try:
        return float(value)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        raise ArgumentError(
            f"{name} must be a number known while tracing, or None; got {value!r}"
        ) from None


def scaled(query: jax.Array, scale: Any) -> tuple[jax.Array, float | None]:
    """The query and ``scale``; a traced number multiplies the query, so that it has a gradient."""
    if isinstance(scale, jax.core.Tracer) and not scale.shape:
        wide = jnp.promote_types(query.dtype, jnp.float32)
        return (query.astype(wide) * scale.astype(wide)).astype(query.dtype), 1.0
    return query, None if scale is None else number("scale", scale)


def positive_cap(value: Any) -> float:
    """``logits_soft_cap`` as a number."""
    cap = number("logits_soft_cap", value)
    if not 0 < cap < math.inf:
        raise ArgumentError(f"logits_soft_cap must be positive and finite, or None; got {value!r}")
    return cap


def dropout_rate(value: Any) -> float:
    """``dropout_rate`` as a number."""
    rate = number("dropout_rate", value)
    if not 0 <= rate < 1:
        raise ArgumentError(f"dropout_rate must be in the range [0, 1); got {value!r}")
    return rate


def window_sides(value: Any) -> tuple[int, int] | None:
    """``local_window_size`` as the numbers of positions to the left and to the right."""
    if value is None:
        return None
    sides = (value, value) if isinstance(value, numbers.Integral) else value
    usable = isinstance(sides, Sequence) and len(sides) == 2
    if not usable or not all(isinstance(x, numbers.Integral) and int(x) >= 0 for x in sides):
        raise ArgumentError(
            "local_window_size must be a number of positions of at least 0, or two (left, right); "
            f"got {value!r}"
        )
    return int(sides[0]), int(sides[1])


def precision_in_force(value: Any) -> Any:
    """The precision that is asked for, else the one in force where the call is traced."""
    config: Any = jax.config  # some versions annotate what it has, others do not
    wanted = config.jax_default_matmul_precision if value is None else value
    try:
        hash(wanted)
    except TypeError:
        raise ArgumentError(f"precision must be one of jax.lax's; got {value!r}") from None
    return None if wanted in ("default", jax.lax.Precision.DEFAULT) else wanted


def dropout_bits(
    rng: Any, leading: tuple[int, ...], sizes: dict[str, int], broadcast: bool
) -> jax.Array:
    """Random bits of each row, from which those of its keys are computed."""
    if rng is None:
        raise ArgumentError("dropout_rng is required for dropout: a key such as jax.random.key(0)")
    own = (1,) * (len(leading) + 1) if broadcast else (*leading, sizes["h"])
    try:
        return jax.random.bits(rng, (*own, sizes["t"]), jnp.uint32)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"dropout_rng must be one key such as jax.random.key(0); got {rng!r} ({error})"
        ) from None
