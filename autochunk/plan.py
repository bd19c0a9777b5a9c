"""From ``max_chunk_size_mb`` to slices: plain integer arithmetic, no jax.

A Plan says how a call runs, independent of its sizes; ``slice_logits`` works out the slices where
the sizes are known. That is late on purpose: under ``vmap`` the true batch is only seen when the
call is lowered, and the limit must hold there too.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from autochunk.errors import ArgumentError
from autochunk.implementations import IMPLEMENTATIONS, is_sliced

BYTES_PER_MB = 10**6
DEFAULT_MAX_CHUNK_SIZE_MB = 1000.0
"""What dm-haiku pull request #679 proposed, and what "auto" falls back to."""


CHUNKS = "chunks"
"""In place of an implementation: a function that is not attention, in chunks; whole it is
"dense"."""


@dataclass(frozen=True)
class Plan:
    """How one attention call runs.

    Attributes:
      implementation: ``"xla"`` (slices over batch, then heads, then query rows, then keys),
        ``"xla_rows"`` (query rows first), ``"dense"`` (haiku's own order of operations, unsliced;
        where all logits do not fit the limit, slices) or a fused kernel for NVIDIA GPUs:
        ``"cudnn"`` (half precision) and, with the extra ``tokamax``, ``"tokamax_mosaic"`` (half
        precision, Hopper and newer) and ``"tokamax_triton"`` (float32 too).
      max_chunk_size_mb: most bytes of logits at a time, in 10^6 bytes; None sets no limit. Long
        causal attention is cut into blocks even so.
      chunk_sizes: of a function that is not attention, whose ``implementation`` is CHUNKS, most
        positions at once along each chunked axis.

    Example:
      >>> import autochunk
      >>> print(autochunk.Plan("xla_rows", max_chunk_size_mb=16))
      xla_rows, 16 MB
    """

    implementation: str = "xla"
    max_chunk_size_mb: float | None = None
    chunk_sizes: tuple[int, ...] | None = None

    def sliced(self) -> Plan:
        """The plan itself if it slices.

        Else the slices for what a kernel that does not slice cannot do, rows first since that suits
        every mesh.
        """
        if is_sliced(self.implementation):
            return self
        return Plan("xla_rows", self.max_chunk_size_mb or DEFAULT_MAX_CHUNK_SIZE_MB)

    def rows_first(self) -> Plan:
        """The plan, with slices over query rows first."""
        return replace(self, implementation="xla_rows") if self.implementation == "xla" else self

    def as_data(self) -> list[Any]:
        """The plan as JSON data, of which ``Plan(*data)`` makes it again."""
        sizes = [] if self.chunk_sizes is None else [list(self.chunk_sizes)]
        return [self.implementation, self.max_chunk_size_mb, *sizes]

    def __str__(self) -> str:
        if self.chunk_sizes is not None:
            return f"chunks of {'x'.join(map(str, self.chunk_sizes))}"
        if self.implementation in IMPLEMENTATIONS and not is_sliced(self.implementation):
            return self.implementation
        return f"{self.implementation}, " + (
            "do not chunk" if self.max_chunk_size_mb is None else f"{self.max_chunk_size_mb:g} MB"
        )


@dataclass(frozen=True)
class Plans:
    """The plan of a call that is not differentiated, and of one that is.

    ``on_use`` is told which of the two runs. ``instead`` gives the plan to run where a fused
    kernel, by its name, does not take the call. ``for_share`` gives the plans of one of several
    devices, from the fields of a Workload in which its share differs. These three take no part in
    equality, so that compiled programs are shared.
    """

    forward: Plan
    training: Plan
    on_use: Callable[[Literal["forward", "training"]], None] | None = field(
        default=None, compare=False, repr=False
    )
    instead: Callable[[str, Literal["forward", "training"]], Plan] | None = field(
        default=None, compare=False, repr=False
    )
    for_share: Callable[[Mapping[str, Any]], Plans] | None = field(
        default=None, compare=False, repr=False
    )

    def of_share(self, fields: Mapping[str, Any]) -> Plans:
        """The plans of one of several devices, whose share's workload has these fields."""
        return self if self.for_share is None else self.for_share(fields)

    def rows_first(self) -> Plans:
        """The same with slices over query rows first, where batch or heads may be sharded."""
        forward, training = (one.rows_first() for one in (self.forward, self.training))
        return replace(self, forward=forward, training=training)

    def without(self, kernel: str, mode: Literal["forward", "training"]) -> Plan:
        """The plan for ``mode`` where a fused kernel does not take the call."""
        plan = self.forward if mode == "forward" else self.training
        return plan.sliced() if self.instead is None else self.instead(kernel, mode)

    def used(self, mode: Literal["forward", "training"]) -> None:
        """Tells ``on_use`` that the plan for ``mode`` is the one that runs."""
        if self.on_use is not None:
            self.on_use(mode)


class LogitsShape(NamedTuple):
    """Sizes of the logits [batch, kv heads, groups of query heads, T', T], and bytes of one."""

    batch: int
    heads: int
    groups: int
    rows: int
    keys: int
    itemsize: int

    @property
    def bytes(self) -> int:
        """Bytes of all logits."""
        return math.prod(self)


class Slices(NamedTuple):
    """Sizes of one slice along each axis that can be sliced."""

    batch: int
    heads: int
    rows: int
    keys: int

    def counts(self, shape: LogitsShape) -> Slices:
        """Number of slices along each axis."""
        sizes = self._asdict().items()
        return Slices(*(slice_count(getattr(shape, axis), size) for axis, size in sizes))

    def chunk_bytes(self, shape: LogitsShape) -> int:
        """Bytes of logits of one slice."""
        return math.prod(self) * shape.groups * shape.itemsize


def slice_count(length: int, size: int) -> int:
    """Slices of one size along an axis; the last overlaps its neighbour unless the size divides."""
    return 1 if size == length else -(-length // size)


def slice_logits(plan: Plan, shape: LogitsShape) -> Slices:
    """The slices that keep a call within its plan's limit.

    As few as possible, of equal size along each axis: see ``balanced``.

    Raises:
      ArgumentError: the limit is less than one logit (one per query head of a key/value head).
    """
    sizes = {axis: getattr(shape, axis) for axis in Slices._fields}
    if plan.max_chunk_size_mb is None or not is_sliced(plan.implementation):
        return Slices(**sizes)
    limit = _whole_bytes(plan.max_chunk_size_mb)
    sizes["bytes"] = shape.groups * shape.itemsize
    for axis in IMPLEMENTATIONS[plan.implementation].slicing:
        # Of a symbolic size nothing is known but that it is one at least.
        unit = math.prod(size for other, size in sizes.items() if other != axis)
        if unit <= limit:
            if unit * sizes[axis] > limit:
                sizes[axis] = balanced(sizes[axis], limit // unit)
            break
        sizes[axis] = 1
    unit = math.prod(sizes.values())
    if unit > limit:
        raise ArgumentError(
            f"max_chunk_size_mb={plan.max_chunk_size_mb:g} is {limit} bytes, less than the {unit} "
            "bytes of the smallest slice possible; give a larger limit"
        )
    del sizes["bytes"]
    return Slices(**sizes)


def _whole_bytes(limit: float) -> int:
    """A limit in bytes.

    One made from whole bytes must give them back: n / 10^6 * 10^6 may come out just below n.
    """
    return math.floor(min(limit * BYTES_PER_MB, 2.0**100) * (1 + 1e-12))


def runs_dense(plan: Plan, shape: LogitsShape) -> bool:
    """Whether a plan computes all logits at once in haiku's order of operations.

    If it says so and they fit its limit.
    """
    return plan.implementation == "dense" and (
        plan.max_chunk_size_mb is None or shape.bytes <= _whole_bytes(plan.max_chunk_size_mb)
    )


def balanced(length: int, most: int) -> int:
    """The size, at most ``most``, that cuts ``length`` into the fewest and most equal slices.

    Into up to twice as many where these would overlap by much.
    """
    if most == length:  # of symbolic sizes no more may be known
        return length
    size = slice_count(length, slice_count(length, max(1, most)))
    if size < _SMALL:
        sizes, enough = range(size, (size - 1) // 2, -1), (1 + _OVERLAP) * length
        return min(sizes, key=lambda one: max(slice_count(length, one) * one, enough))
    # Matrix units work in eights; round up to one where that still fits and makes no fewer slices.
    rounded = -(-size // 8) * 8
    return rounded if rounded <= most else size


# Of so few heads at once what is computed twice is a large share: slices of three of eight compute
# nine, and were 1.06 to 1.3 times as slow as slices of two on a CPU. A smaller share is no matter.
_SMALL, _OVERLAP = 32, 0.06


def candidate_plans(shape: LogitsShape, *, step: int = 2, most_slices: int = 1024) -> list[Plan]:
    """The plans worth measuring for these sizes, from most memory to least.

    Limits are powers of ``step`` times 1.05 MB, so that a choice reads well and carries over to
    other shapes. Plans that come to the same slices as an earlier one are left out; so are those
    with more than ``most_slices`` slices.
    """
    plans: dict[Slices, Plan] = {}
    for plan in _ladder(shape, step):
        slices = slice_logits(plan, shape)
        if math.prod(slices.counts(shape)) <= most_slices:
            plans.setdefault(slices, plan)
    return [plan for _, plan in sorted(plans.items(), key=lambda item: -item[0].chunk_bytes(shape))]


# Just over 2^20 bytes: slices of sizes that are powers of two then fit without a remainder, which
# was seen to be up to 1.3x faster than in limits of 2^n MB.
_RUNG_MB = 1.05


def _ladder(shape: LogitsShape, step: int) -> Iterator[Plan]:
    yield Plan("xla", None)
    exponent = math.floor(math.log(max(shape.bytes / BYTES_PER_MB, 2**-10), step))
    smallest = max(2**16, shape.groups * shape.itemsize)  # below 64 KB a slice is all overhead
    while (limit := _round(_RUNG_MB * float(step) ** exponent)) * BYTES_PER_MB >= smallest:
        yield Plan("xla", limit)
        yield Plan("xla_rows", limit)
        exponent -= 1


def _round(limit: float) -> float:
    """To four digits: 16.8 is 16.8, not 16.800000000000001."""
    return float(f"{limit:.4g}")


def same_slices(one: Plan, other: Plan, shape: LogitsShape) -> bool:
    """Whether two plans come to the same computation at these sizes."""
    if one.implementation != other.implementation and not (
        is_sliced(one.implementation) and is_sliced(other.implementation)
    ):
        return False
    return slice_logits(one, shape) == slice_logits(other, shape)


def check_max_chunk_size_mb(value: Any) -> float | Literal["auto"] | None:
    """Returns a usable limit.

    Raises:
      ArgumentError: the value is not a positive finite number, None or "auto".
    """
    if value is None:
        return None
    if isinstance(value, str) and value == "auto":
        return "auto"
    limit = _positive(value)
    if limit is None:
        raise ArgumentError(
            "max_chunk_size_mb must be a positive finite number (MB of logits), None (never "
            f'chunk) or "auto"; got {value!r}'
        )
    return limit


def check_positive(name: str, value: Any, unit: str) -> float | None:
    """Returns a positive finite number, or None.

    Raises:
      ArgumentError: the value is neither.
    """
    number = _positive(value)
    if value is not None and number is None:
        raise ArgumentError(
            f"{name} must be a positive finite number of {unit} or None; got {value!r}"
        )
    return number


def _positive(value: Any) -> float | None:
    """The value as a float if it is a positive finite number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def check_implementation(value: Any) -> str | None:
    """Returns a known implementation's name, or None.

    Raises:
      ArgumentError: the value is neither.
    """
    if value is None or (isinstance(value, str) and value in IMPLEMENTATIONS):
        return value
    raise ArgumentError(
        f"implementation must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}; got "
        f"{value!r}"
    )
