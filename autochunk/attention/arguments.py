"""Arguments: what one call of attention computes from, checked, named and brought into form.

The op, the tuner and ``bench`` all describe a call by it, so that what one of them knows of an
array (its dtype, the dims that it may broadcast, its name in a Workload) all of them do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels import Call, Inputs
from autochunk.errors import ArgumentError
from autochunk.operands import OPERANDS, TERMS, pattern_of
from autochunk.plan import Plans
from autochunk.workload import DTYPES, Workload


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(OPERANDS),
    meta_fields=["scale", "is_causal"],
)
@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arrays of a call and what is static about it; a pytree of the arrays.

    H is the number of query heads, N that of key/value heads, [...] are leading dims.

    Attributes:
      query: [..., T', H, K].
      key: [..., T, N, K].
      value: [..., T, N, V].
      bias, mask: of the rank of the logits [..., H, T', T]; dims of size one broadcast.
      scale: factor on the logits; None is 1 / sqrt(K).
      is_causal: whether query i sees keys 0 to i only.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    scale: float | None = None
    is_causal: bool = False

    @classmethod
    def checked(cls, *, scale: Any, is_causal: Any, **arrays: Any) -> Arguments:
        """From what a caller gave, by name.

        Raises:
          ArgumentError: something is no array, or its shape or dtype does not fit.
        """
        there = (name for name, array in arrays.items() if array is not None or name not in TERMS)
        given = {name: _array(name, arrays[name]) for name in there}
        heads = Inputs(**{name: given[name] for name in OPERANDS if name not in TERMS})
        _check_shapes(*heads[:3])
        logits = _logits_shape(heads.query, heads.key)
        for name in [name for name in TERMS if name in given]:
            given[name] = _check_term(name, given[name], logits)
        if scale is not None:
            scale = _check_scale(scale)
        return cls(**given, scale=scale, is_causal=bool(is_causal))

    @property
    def present(self) -> dict[str, jax.Array]:
        """The arrays that are there, by name and in the order of OPERANDS."""
        return {name: getattr(self, name) for name in OPERANDS if getattr(self, name) is not None}

    @property
    def moving(self) -> dict[str, jax.Array]:
        """Those that training differentiates."""
        return {name: one for name, one in self.present.items() if OPERANDS[name].differentiable}

    @property
    def terms(self) -> dict[str, jax.Array]:
        """Those that a call may be without, and that broadcast."""
        return {name: one for name, one in self.present.items() if name in TERMS}

    def replace(self, **changes: Any) -> Arguments:
        """The same with other arrays or settings."""
        return dataclasses.replace(self, **changes)

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """[..., H, T', T]"""
        return _logits_shape(self.query, self.key)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """[..., T', H, V]"""
        return (*self.query.shape[:-1], self.value.shape[-1])

    def check_known(self) -> None:
        """Raises ArgumentError where a size is symbolic, so that no slices follow from it."""
        sizes = (*self.logits_shape, self.query.shape[-1], self.value.shape[-1])
        if not all(isinstance(size, int) for size in sizes):
            raise ArgumentError(
                "sizes must be known while tracing, since slices follow from them; got "
                f"{sizes}. Symbolic ones, as for jax.export, take implementation='dense' with "
                "max_chunk_size_mb=None"
            )

    def workload(self) -> Workload:
        """What is tuned for such a call, when it is not differentiated.

        Raises:
          WorkloadError: a size is zero.
        """
        patterns = {name: self._pattern(name) for name in self.terms}
        return Workload.make(
            batch=math.prod(self.query.shape[:-3]),
            query_length=self.query.shape[-3],
            key_length=self.key.shape[-3],
            num_heads=self.query.shape[-2],
            num_kv_heads=self.key.shape[-2],
            key_size=self.query.shape[-1],
            value_size=self.value.shape[-1],
            dtype=str(self.query.dtype),
            causal=self.is_causal,
            **patterns,
        )

    def _pattern(self, name: str) -> str:
        shape, own = getattr(self, name).shape, len(TERMS[name].dims)
        return pattern_of(name, (math.prod(shape[: len(shape) - own]), *shape[len(shape) - own :]))

    def call(self, plans: Plans) -> Call:
        """What is static about it, for the kernels."""
        scale = 1.0 / math.sqrt(self.query.shape[-1] or 1) if self.scale is None else self.scale
        return Call(tuple(self.present), scale, self.is_causal, plans)

    def inputs(self) -> Inputs:
        """The arrays as the kernels want them: heads [H] as [N, H / N], one leading dim or more."""
        leading = self.query.shape[:-3] or (1,)
        kv_heads = self.key.shape[-2]
        *_, rows, heads, size = self.query.shape
        query = self.query.reshape((*leading, rows, kv_heads, heads // kv_heads, size))
        key, value = (one.reshape((*leading, *one.shape[-3:])) for one in (self.key, self.value))
        terms = {name: _grouped_term(one, kv_heads) for name, one in self.terms.items()}
        return Inputs(query, key, value, **terms)


def _logits_shape(query: jax.Array, key: jax.Array) -> tuple[int, ...]:
    return (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])


def _array(name: str, array: Any) -> jax.Array:
    try:
        return jnp.asarray(array)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{name} must be an array; got {type(array).__name__} ({error})"
        ) from None


def _check_shapes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
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


def _check_term(name: str, term: jax.Array, logits_shape: tuple[int, ...]) -> jax.Array:
    """Bias or mask with the logits' rank."""
    if name == "mask" and term.dtype != jnp.bool_:
        raise ArgumentError(f"mask must be boolean (pass terms to add as bias); got {term.dtype}")
    if name == "bias" and not jnp.issubdtype(term.dtype, jnp.floating):
        raise ArgumentError(f"bias must be floating point; got {term.dtype}")
    padded = (1,) * (len(logits_shape) - term.ndim) + term.shape
    if len(padded) != len(logits_shape) or any(
        size not in (1, whole) for size, whole in zip(padded, logits_shape, strict=True)
    ):
        raise ArgumentError(
            f"{name} must broadcast to [..., H, T', T] = {logits_shape}; got shape {term.shape}"
        )
    return term.reshape(padded)


def _check_scale(scale: Any) -> float:
    try:
        return float(scale)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        raise ArgumentError(
            f"scale must be a number known while tracing, or None; got {scale!r}. Multiply the "
            "query by a traced scale instead"
        ) from None


def _grouped_term(term: jax.Array, kv_heads: int) -> jax.Array:
    """[..., H, T', T] to [..., N, H / N, T', T], with at least one leading dim."""
    *leading, heads, rows, keys = term.shape
    groups = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
    return term.reshape((*(leading or (1,)), *groups, rows, keys))
