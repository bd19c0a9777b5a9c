"""Fused kernels of other libraries: how each is called, what it keeps, what it does not take.

To add one, add an entry to ``autochunk.implementations`` that names a ``Kernel`` here, and a row
to ``tests/attention/test_libraries.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from autochunk.attention.kernels import tokamax
from autochunk.attention.kernels.inputs import Call, Inputs, KeyRange, Settings
from autochunk.attention.kernels.terms import terms_of

Kept = Literal["log-sum-exp", "maximum", "sum"]
"""What a kernel keeps of each row for its backward, in float32 [B, H, T']."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of another library, with a derivative by ``jax.vjp`` that keeps stats of each row.

    Attributes:
      attend: returns the output [B, T', H, V] for query [B, T', H, K], key [B, T, N, K], value
        [B, T, N, V] and, where they are given, bias and mask [B or 1, H or 1, T', T] and lengths
        [B], which are at least one. It raises any error for a call that it does not take. Its
        output and gradients do not matter for rows without a key and for rows beyond their length.
        In float32 it computes with the settings' precision.
      keeps: which stats of each row its derivative saves, in this order. It must save the output
        too, after the arrays that it was given. Empty if it saves none: gradients then run in
        slices.
      differentiated: the inputs whose cotangents it computes; slices compute the others.
      lacks: the forms of call that it does not take, by their names in FORMS. It is given a mask in
        place of those that are in _POSITIONS, and always in place of segments.
      one_row_masks: whether a mask may be [B or 1, H or 1, 1, T].
      selects: whether it replaces excluded logits, whatever they are, instead of adding something
        to them.
      gives_zero: whether rows without a key have an output of zero, or NaN, unless a length says
        that they have none.
      masks_as_bytes: whether it makes bytes of a mask, which others may read in its place.
      refuses_late: whether it refuses some calls only when it is lowered.
      skips: with how many keys or more ``attend`` takes less time where a range of keys, its third
        argument, tells which keys of a mask no row of a tile sees; None if it does not heed that.
    """

    attend: Callable[[Inputs, Settings, KeyRange | None], jax.Array]
    keeps: tuple[Kept, ...]
    differentiated: tuple[str, ...] = ("query", "key", "value")
    lacks: tuple[str, ...] = ()
    one_row_masks: bool = False
    selects: bool = False
    gives_zero: bool = False
    masks_as_bytes: bool = False
    refuses_late: bool = False
    skips: int | None = None


GIVEN = {"query", "key", "value", "bias", "mask", "query_seq_lengths", "key_value_seq_lengths"}
"""The arrays that kernels are given; some others become a mask, the rest run in slices."""

_LENGTHS = {"query_seq_lengths", "key_value_seq_lengths"}


def has_lengths(inputs: Inputs) -> bool:
    """Whether a call has lengths of queries or keys."""
    return bool(_LENGTHS & inputs.present.keys())


# What jax calls levels; the others are algorithms, such as "BF16_BF16_F32".
_LEVELS = {"highest", "high", "default", "float32", "tensorfloat32", "bfloat16", "fastest", "none"}


def _is_an_algorithm(precision: Any) -> bool:
    return str(getattr(precision, "name", precision)).lower() not in _LEVELS


def _is_shared(bias: jax.Array | None, inputs: Inputs) -> bool:
    """Whether a bias is [1, H, T', T]."""
    if bias is None:
        return True
    *leading, rows, heads, groups, _ = inputs.query.shape
    logits = (heads, groups, rows, inputs.key.shape[-3])
    return bias.shape == ((1,) * len(leading) + logits)


@dataclass(frozen=True)
class Form:
    """One call, as the functions in FORMS see it."""

    inputs: Inputs
    call: Call
    training: bool


FORMS: dict[str, Callable[[Form], bool]] = {
    "a local_window_size that reaches to the right": lambda it: it.call.reach[1] not in (None, 0),
    "a local_window_size of more queries than keys": lambda it: (
        it.call.window is not None and it.inputs.query.shape[-4] > it.inputs.key.shape[-3]
    ),
    "a local_window_size and lengths": lambda it: (
        it.call.window is not None and has_lengths(it.inputs)
    ),
    "a query_offset": lambda it: it.call.reach != (None, None) and it.call.offset != 0,
    "logits_soft_cap": lambda it: it.call.soft_cap is not None,
    "the gradient of logits_soft_cap": lambda it: it.training and it.call.soft_cap is not None,
    "the gradient of return_residual": lambda it: it.training and it.call.residual,
    "a bias of a single query": lambda it: (
        it.inputs.bias is not None and it.inputs.query.shape[-4] == 1
    ),
    "the gradient of a bias that is not [1, H, T', T]": lambda it: (
        it.training and not _is_shared(it.inputs.bias, it.inputs)
    ),
    "a precision that names an algorithm": lambda it: _is_an_algorithm(it.call.precision),
}
"""Forms of call that some kernel does not take: name -> whether a call has that form.

A form that every kernel takes has no entry yet. A kernel silently ignores what it neither heeds nor
lists in ``lacks``. So a new kernel may need a new entry, in _POSITIONS too if it is of positions.
"""

_ALL_LACK = (
    "a query_offset",
    "the gradient of return_residual",
    "a precision that names an algorithm",
)


def lacking(kernel: Kernel, inputs: Inputs, call: Call, *, training: bool) -> list[str]:
    """What a call has that a kernel does not take, not even as a mask; empty if nothing."""
    form, masked = Form(inputs, call, training), _masked(kernel, inputs, call)
    arrays = [name for name in inputs.present if name not in (*GIVEN, *masked)]
    return arrays + [name for name in kernel.lacks if FORMS[name](form) and name not in masked]


_SEGMENTS = ("query_segment_ids", "key_value_segment_ids")
# Forms that say by position which keys a query sees.
_POSITIONS = (
    "a local_window_size that reaches to the right",
    "a local_window_size of more queries than keys",
    "a local_window_size and lengths",
    "a query_offset",
)


def _masked(kernel: Kernel, inputs: Inputs, call: Call) -> list[str]:
    """What a call has that a kernel can take only as a mask: names of arrays and of forms."""
    form = Form(inputs, call, training=False)
    forms = [name for name in _POSITIONS if name in kernel.lacks and FORMS[name](form)]
    arrays = ["query_offset"] if inputs.query_offset is not None else []
    return [*forms, *arrays, *(name for name in _SEGMENTS if name in inputs.present)]


def gets_a_mask(kernel: Kernel, inputs: Inputs, call: Call) -> bool:
    """Whether a kernel is given a mask, be it the call's own or one of what it does not take."""
    return inputs.mask is not None or bool(_masked(kernel, inputs, call))


def as_mask(kernel: Kernel, inputs: Inputs, call: Call) -> tuple[Inputs, Call]:
    """The same call with a mask [..., H, G, T', T] in place of what a kernel takes only as a mask.

    Dims along which it does not differ have size one: for one sequence, and the same for all heads,
    it is in effect [T', T].
    """
    masked = _masked(kernel, inputs, call)
    if not masked:
        return inputs, call
    in_mask = inputs._replace(bias=None, query_seq_lengths=None, key_value_seq_lengths=None)
    given = inputs._replace(query_segment_ids=None, key_value_segment_ids=None, query_offset=None)
    unseen = call._replace(is_causal=False, window=None, offset=0)
    if masked[0] in _SEGMENTS:  # the kernel sees positions by itself
        return given._replace(mask=terms_of(in_mask, unseen).visible()), call
    return given._replace(mask=terms_of(in_mask, call).visible()), unseen


def _cudnn(inputs: Inputs, settings: Settings, _: KeyRange | None) -> jax.Array:
    attention: Any = jax.nn.dot_product_attention  # overloaded by its argument for residuals
    out: jax.Array = attention(
        *inputs[:5],
        scale=settings.scale,
        is_causal=settings.is_causal,
        local_window_size=None if settings.left is None else (settings.left, 0),
        query_seq_lengths=inputs.query_seq_lengths,
        key_value_seq_lengths=inputs.key_value_seq_lengths,
        implementation="cudnn",
    )
    return out


cudnn = Kernel(
    _cudnn,
    keeps=("log-sum-exp",),
    differentiated=("query", "key", "value", "bias"),
    lacks=(
        *_ALL_LACK,
        "a local_window_size that reaches to the right",
        "a local_window_size of more queries than keys",
        "a local_window_size and lengths",
        "logits_soft_cap",
        # the gradient of any other bias is zero, without an error
        "the gradient of a bias that is not [1, H, T', T]",
    ),
)
"""NVIDIA's, as JAX calls it."""


tokamax_mosaic = Kernel(
    tokamax.mosaic,
    keeps=("maximum", "sum"),
    differentiated=("query", "key", "value", "bias"),
    lacks=(*_ALL_LACK, "a bias of a single query"),
    one_row_masks=True,
    selects=True,
    gives_zero=True,
    masks_as_bytes=True,
    # masks and biases whose number of keys is no multiple of its tiles
    refuses_late=True,
    skips=1024,
)
"""Tokamax's for Hopper and newer, written in Pallas Mosaic GPU."""

tokamax_triton = Kernel(
    tokamax.triton,
    keeps=("maximum", "sum"),
    differentiated=("query", "key", "value", "bias"),
    lacks=(*_ALL_LACK, "a bias of a single query", "the gradient of logits_soft_cap"),
    one_row_masks=True,
    selects=True,
    skips=512,
)
"""Tokamax's for any recent GPU, written in Pallas Triton."""
