"""Arguments: what one call of attention computes from, checked, named and brought into form.

The op, the tuner and ``bench`` all describe a call by it, so that what one of them knows of an
array (its dtype, the dims that it may broadcast, its name in a Workload) all of them do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels import Call, Inputs
from autochunk.attention.kernels.terms import terms_of
from autochunk.errors import ArgumentError
from autochunk.operands import OPERANDS, TERMS, pattern_of
from autochunk.plan import Plan, Plans
from autochunk.workload import DTYPES, Workload

# What is static about a call, as in ``kernels.Call``.
_SETTINGS = (
    "scale",
    "is_causal",
    "window",
    "offset",
    "soft_cap",
    "dropout_rate",
    "residual",
    "precision",
    "half_logits",
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(OPERANDS),
    meta_fields=[*_SETTINGS],
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
      query_seq_lengths, key_value_seq_lengths, query_offset: [...], sizes of one broadcast.
      query_segment_ids: [..., T'].
      key_value_segment_ids: [..., T].
      alibi_slopes: [..., H].
      dropout_bits: [..., H, T'], random ones of each row.
      scale: factor on the logits; None is 1 / sqrt(K).
      is_causal: whether query i sees keys 0 to i only.
      window: how many positions to its left and right a query sees; None is all.
      offset: added to the queries' positions, besides ``query_offset``.
      soft_cap, dropout_rate, residual, precision, half_logits: as in ``kernels.Call``.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    query_seq_lengths: jax.Array | None = None
    key_value_seq_lengths: jax.Array | None = None
    query_segment_ids: jax.Array | None = None
    key_value_segment_ids: jax.Array | None = None
    query_offset: jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    dropout_bits: jax.Array | None = None
    scale: float | None = None
    is_causal: bool = False
    window: tuple[int, int] | None = None
    offset: int = 0
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    residual: bool = False
    precision: Any = None
    half_logits: bool = False

    @classmethod
    def checked(
        cls,
        *,
        scale: Any = None,
        is_causal: Any = False,
        local_window_size: Any = None,
        query_offset: Any = None,
        logits_soft_cap: Any = None,
        dropout_rate: Any = 0.0,
        dropout_rng: Any = None,
        broadcast_dropout: bool = True,
        precision: Any = None,
        return_residual: bool = False,
        half_logits: bool = False,
        **arrays: Any,
    ) -> Arguments:
        """From what a caller of the op gave, by name.

        Raises:
          ArgumentError: something is no array, or its shape or dtype does not fit, or a setting is
            not usable.
        """
        there = (name for name, array in arrays.items() if array is not None or name not in TERMS)
        given: dict[str, Any] = {name: _array(name, arrays[name]) for name in there}
        heads = Inputs(**{name: given[name] for name in OPERANDS if name not in TERMS})
        _check_shapes(*heads[:3])
        settings: dict[str, Any] = {
            "scale": None if scale is None else _number("scale", scale),
            "is_causal": bool(is_causal),
            "window": _window(local_window_size),
            "soft_cap": None if logits_soft_cap is None else _positive_cap(logits_soft_cap),
            "dropout_rate": _rate(dropout_rate),
            "residual": bool(return_residual),
            "precision": _precision(precision),
            "half_logits": half_logits,
        }
        positioned = is_causal or local_window_size is not None or "alibi_slopes" in given
        if query_offset is not None and positioned:
            if isinstance(query_offset, numbers.Integral):
                settings["offset"] = int(query_offset)
            else:
                given["query_offset"] = _array("query_offset", query_offset)
        sizes = _sizes(*heads[:2])
        if settings["dropout_rate"]:
            given["dropout_bits"] = _dropout_bits(
                dropout_rng, heads.query.shape[:-3], sizes, bool(broadcast_dropout)
            )
        _check_pairs(given)
        for name in [name for name in TERMS if name in given]:
            given[name] = _check_term(name, given[name], heads.query.shape[:-3], sizes)
        return cls(**given, **settings)

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
        if self.offset:
            patterns["query_offset"] = "1"
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
            window="none" if self.window is None else "{}:{}".format(*self.window),
            soft_cap=self.soft_cap is not None,
            residual=self.residual,
            precision=_precision_name(self.precision),
            **patterns,
        )

    def _pattern(self, name: str) -> str:
        shape, own = getattr(self, name).shape, len(TERMS[name].dims)
        return pattern_of(name, (math.prod(shape[: len(shape) - own]), *shape[len(shape) - own :]))

    def call(self, plans: Plans) -> Call:
        """What is static about it, for the kernels."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        if self.scale is None:
            settings["scale"] = 1.0 / math.sqrt(self.query.shape[-1] or 1)
        return Call(tuple(self.present), plans=plans, **settings)

    def explicit(self) -> Arguments:
        """The same call with all that a row sees in its mask, and all that is added in its bias.

        For libraries that take nothing else; what caps, drops or is returned besides stays.
        """
        terms = terms_of(self.inputs(), self.call(Plans(Plan(), Plan())))
        wide = jnp.promote_types(self.query.dtype, jnp.float32)
        added, seen = list(terms.added(wide)), terms.visible()
        bias = functools.reduce(jnp.add, added) if added else None
        given: dict[str, Any] = {name: None for name in self.terms if name != "dropout_bits"}
        given |= {name: _ungrouped(one) for name, one in (("bias", bias), ("mask", seen))}
        return self.replace(**given, is_causal=False, window=None, offset=0)

    def inputs(self) -> Inputs:
        """The arrays as the kernels want them: heads [H] as [N, H / N], one leading dim or more."""
        leading = self.query.shape[:-3] or (1,)
        kv_heads = self.key.shape[-2]
        *_, rows, heads, size = self.query.shape
        query = self.query.reshape((*leading, rows, kv_heads, heads // kv_heads, size))
        key, value = (one.reshape((*leading, *one.shape[-3:])) for one in (self.key, self.value))
        terms = {name: _grouped_term(name, one, kv_heads) for name, one in self.terms.items()}
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


def _sizes(query: jax.Array, key: jax.Array) -> dict[str, int]:
    """Sizes of the dims that terms have, by letter."""
    return {"h": query.shape[-2], "t": query.shape[-3], "s": key.shape[-3]}


_KINDS = {
    "floating": jnp.floating,
    "boolean": jnp.bool_,
    "integer": jnp.integer,
    "bits": jnp.uint32,
}
_HINTS = {"mask": " (pass terms to add as bias)"}
_DIMS = {"h": "H", "t": "T'", "s": "T"}


def _check_term(
    name: str, term: jax.Array, leading: tuple[int, ...], sizes: dict[str, int]
) -> jax.Array:
    """A term with all its dims."""
    operand = TERMS[name]
    if not jnp.issubdtype(term.dtype, _KINDS[operand.dtype]):
        kind = "floating point" if operand.dtype == "floating" else operand.dtype
        raise ArgumentError(f"{name} must be {kind}{_HINTS.get(name, '')}; got {term.dtype}")
    wanted = (*leading, *(sizes[letter] for letter in operand.dims))
    padded = (1,) * (len(wanted) - term.ndim) + term.shape
    if len(padded) != len(wanted) or any(
        size not in (1, whole) for size, whole in zip(padded, wanted, strict=True)
    ):
        dims = ", ".join(["...", *(_DIMS[letter] for letter in operand.dims)])
        raise ArgumentError(f"{name} must broadcast to [{dims}] = {wanted}; got shape {term.shape}")
    return term.reshape(padded)


def _check_pairs(given: Mapping[str, Any]) -> None:
    both = {"query_segment_ids", "key_value_segment_ids"}
    if len(both & given.keys()) == 1:
        (missing,) = both - given.keys()
        raise ArgumentError(
            f"query_segment_ids and key_value_segment_ids must be given together; {missing} is "
            "missing (it may be the same array, where queries and keys are of one sequence)"
        )


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        cure = " Multiply the query by a traced scale instead" if name == "scale" else ""
        raise ArgumentError(
            f"{name} must be a number known while tracing, or None; got {value!r}.{cure}"
        ) from None


def _positive_cap(value: Any) -> float:
    cap = _number("logits_soft_cap", value)
    if not 0 < cap < math.inf:
        raise ArgumentError(f"logits_soft_cap must be positive and finite, or None; got {value!r}")
    return cap


def _rate(value: Any) -> float:
    rate = _number("dropout_rate", value)
    if not 0 <= rate < 1:
        raise ArgumentError(f"dropout_rate must be at least 0 and less than 1; got {value!r}")
    return rate


def _window(value: Any) -> tuple[int, int] | None:
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


def _precision(value: Any) -> Any:
    """What is asked for, else what is in force where the call is traced."""
    config: Any = jax.config  # some versions annotate what it has, others do not
    wanted = config.jax_default_matmul_precision if value is None else value
    try:
        hash(wanted)
    except TypeError:
        raise ArgumentError(f"precision must be one of jax.lax's; got {value!r}") from None
    return None if wanted in ("default", jax.lax.Precision.DEFAULT) else wanted


def _precision_name(precision: Any) -> str:
    """A precision as a Workload names it, such as "highest"."""
    if precision is None:
        return "default"
    if isinstance(precision, tuple):
        return "-".join(map(_precision_name, precision))
    return str(getattr(precision, "name", precision)).lower()


def _dropout_bits(
    rng: Any, leading: tuple[int, ...], sizes: dict[str, int], broadcast: bool
) -> jax.Array:
    """Random bits of each row, from which those of its keys follow."""
    if rng is None:
        raise ArgumentError("dropout_rate needs dropout_rng, a key such as jax.random.key(0)")
    own = (1,) * (len(leading) + 1) if broadcast else (*leading, sizes["h"])
    try:
        return jax.random.bits(rng, (*own, sizes["t"]), jnp.uint32)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"dropout_rng must be one key such as jax.random.key(0); got {rng!r} ({error})"
        ) from None


def _grouped_term(name: str, term: jax.Array, kv_heads: int) -> jax.Array:
    """A term with H as [N, H / N], and at least one leading dim."""
    dims = TERMS[name].dims
    own = term.ndim - len(dims)
    sizes: list[int] = []
    for letter, size in zip(dims, term.shape[own:], strict=True):
        groups = (1, 1) if size == 1 else (kv_heads, size // kv_heads)
        sizes.extend(groups if letter == "h" else (size,))
    return term.reshape((*(term.shape[:own] or (1,)), *sizes))


def _ungrouped(term: jax.Array | None) -> jax.Array | None:
    """[..., N, H / N, T', T] to [..., H, T', T], where it differs by head as a whole."""
    if term is None:
        return None
    *leading, heads, groups, rows, keys = term.shape
    return term.reshape((*leading, heads * groups, rows, keys))
