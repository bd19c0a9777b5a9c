"""Whole attention kernels that others wrote, as implementations beside our slices.

One entry of FUSED is one implementation. It is used only where it takes the call; for everything
else there are our slices: forward-mode and higher derivatives, gradients of a bias, platforms that
do not have it.

Between forward and backward we keep what our slices keep, the output and the log-sum-exp of each
row (as a row maximum, with a sum of one), so that either can go on from the other's results. A
kernel's own backward is found through ``jax.vjp``; what that has saved of the forward pass is
exchanged for our copies, and the forward pass that it would run again is then dead code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.grid import sum_to, vary_alike
from autochunk.attention.kernels.inputs import Call, Inputs
from autochunk.plan import Plan, Plans


@dataclasses.dataclass(frozen=True)
class Fused:
    """An attention kernel.

    Attributes:
      attend: ``attend(query, key, value, bias, mask, scale=, is_causal=)`` for query [B, T', H, K],
        key and value [B, T, N, K], bias and mask that broadcast to [B, H, T', T]; has a
        reverse-mode derivative whose residuals include the log-sum-exp [B, H, T'] in float32.
        Raises where it does not take a call.
      platforms: where it can be lowered, in jax's names.
    """

    attend: Callable[..., jax.Array]
    platforms: tuple[str, ...]


def _cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    scale: float,
    is_causal: bool,
) -> jax.Array:
    return jax.nn.dot_product_attention(
        query, key, value, bias, mask, scale=scale, is_causal=is_causal, implementation="cudnn"
    )


FUSED: dict[str, Fused] = {"cudnn": Fused(_cudnn, ("cuda",))}


class NotTaken(Exception):
    """A fused kernel does not take this call; the text says why."""


def runs(plan: Plan, platforms: tuple[str, ...]) -> bool:
    """Whether a plan is for a fused kernel that all these platforms have."""
    return (
        plan.implementation in FUSED
        and bool(platforms)
        and set(platforms) <= set(FUSED[plan.implementation].platforms)
    )


def trace(name: str, inputs: Inputs, call: Call, platform: str, *, training: bool) -> Any:
    """A fused kernel's forward pass as a ClosedJaxpr; arrays may be abstract.

    Raises:
      NotTaken: it does not take the call, or with ``training`` not its gradient; says why.
    """
    fused = FUSED[name]
    if platform not in fused.platforms:
        raise NotTaken(f"it runs on {', '.join(fused.platforms)}, not on {platform}")
    if training and inputs.bias is not None:
        raise NotTaken("it has no gradient for every form of bias")
    if training and inputs.mask is not None:
        raise NotTaken("its gradients for rows that a mask leaves no key are not zero")
    shapes = tuple(None if array is None else (array.shape, array.dtype) for array in inputs)
    traced = _trace(fused, shapes, call._replace(plans=Plans(Plan(), Plan())), training)
    if isinstance(traced, NotTaken):
        raise traced
    return traced


@functools.lru_cache(maxsize=1024)
def _trace(fused: Fused, shapes: tuple[Any, ...], call: Call, training: bool) -> Any:
    """The same call gives the same object, since programs are cached by it."""

    def run(*arrays: jax.Array) -> jax.Array:
        taken = iter(arrays)
        inputs = Inputs(*(None if shape is None else next(taken) for shape in shapes))  # type: ignore[arg-type]
        return (
            _forward(fused, inputs, call)[0] if training else _function(fused, call)(*_flat(inputs))
        )

    try:
        return jax.make_jaxpr(run)(
            *(jax.ShapeDtypeStruct(*shape) for shape in shapes if shape is not None)
        )
    except NotTaken as refusal:
        return refusal
    except Exception as error:  # another library's refusal, in whatever words it has
        return NotTaken(f"{type(error).__name__}: {error}")


def attend(name: str, inputs: Inputs, call: Call) -> jax.Array:
    """[..., T', H, G, V] by a fused kernel."""
    return _function(FUSED[name], call)(*_flat(inputs)).reshape(
        (*inputs.query.shape[:-1], inputs.value.shape[-1])
    )


def with_stats(name: str, inputs: Inputs, call: Call) -> list[jax.Array]:
    """[out, row maximum, row sum of exponentials], the sum being one."""
    out, lse, _ = _forward(FUSED[name], inputs, call)
    *leading, rows, heads, groups, _ = inputs.query.shape
    maximum = lse.reshape((*leading, heads, groups, rows))
    return [
        out.reshape((*inputs.query.shape[:-1], inputs.value.shape[-1])),
        maximum,
        *vary_alike([jnp.ones_like(maximum)], [maximum]),
    ]


def cotangent(
    name: str, inputs: Inputs, call: Call, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> list[jax.Array]:
    """Cotangents of query, key and value."""
    own_out, own_lse, pull = _forward(FUSED[name], inputs, call)
    saved = {id(own_out): out.reshape(own_out.shape), id(own_lse): lse.reshape(own_lse.shape)}
    leaves, tree = jax.tree.flatten(pull)
    pull = jax.tree.unflatten(tree, [saved.get(id(leaf), leaf) for leaf in leaves])
    gradients = pull(d_out.reshape(own_out.shape))
    leading = inputs.query.shape[:-4]
    return [
        sum_to(gradient.reshape(leading + operand.shape[len(leading) :]), operand.shape)
        for gradient, operand in zip(gradients, inputs[:3], strict=True)
    ]


def _forward(fused: Fused, inputs: Inputs, call: Call) -> tuple[jax.Array, jax.Array, Any]:
    """The kernel's output, its log-sum-exp [B, H, T'] and its backward."""
    query, key, value, bias, mask = _flat(inputs)
    function = _function(fused, call)
    out, pull = jax.vjp(lambda *moving: function(*moving, bias, mask), query, key, value)
    lse_shape = (query.shape[0], query.shape[2], query.shape[1])
    found = [
        leaf
        for leaf in jax.tree.leaves(pull)
        if getattr(leaf, "dtype", None) == jnp.float32 and leaf.shape == lse_shape
    ]
    if len(found) != 1:
        raise NotTaken(
            "its derivative does not keep the log-sum-exp that forward-mode derivatives need"
        )
    return out, found[0], pull


def _function(fused: Fused, call: Call) -> Callable[..., jax.Array]:
    return lambda *arrays: fused.attend(*arrays, scale=call.scale, is_causal=call.is_causal)


def _flat(inputs: Inputs) -> Inputs:
    """Query [B, T', H * G, K], key and value [B, T, H, K], bias and mask [B or 1, H * G or 1, T',
    T].
    """
    leading = inputs.query.shape[:-4]
    batch = math.prod(leading)
    *_, rows, heads, groups, size = inputs.query.shape
    query = inputs.query.reshape((batch, rows, heads * groups, size))
    key, value = (
        jnp.broadcast_to(array, (*leading, *array.shape[-3:])).reshape((batch, *array.shape[-3:]))
        for array in (inputs.key, inputs.value)
    )
    bias, mask = (
        None if term is None else _flat_term(term, leading, heads, groups)
        for term in (inputs.bias, inputs.mask)
    )
    return Inputs(query, key, value, bias, mask)


def _flat_term(term: jax.Array, leading: tuple[int, ...], heads: int, groups: int) -> jax.Array:
    own_leading, (own_heads, own_groups, rows, keys) = term.shape[:-4], term.shape[-4:]
    if math.prod(own_leading) not in (1, math.prod(leading)):
        own_leading = leading
    if (own_heads, own_groups) not in ((1, 1), (heads, groups)):
        own_heads, own_groups = heads, groups
    whole = jnp.broadcast_to(term, (*own_leading, own_heads, own_groups, rows, keys))
    return whole.reshape((math.prod(own_leading), own_heads * own_groups, rows, keys))
