"""Whole attention kernels that others wrote, as implementations beside our slices.

Which there are is told by ``autochunk.implementations``. One is used only where it takes the call;
for everything else there are our slices: forward-mode and higher derivatives, gradients of a bias,
platforms that do not have it.

Between forward and backward we keep what our slices keep, the output and the log-sum-exp of each
row (as a row maximum, with a sum of one), so that either can go on from the other's results. A
kernel's own backward is found through ``jax.vjp``; what that has saved of the forward pass is
exchanged for our copies, and the forward pass that it would run again is then dead code.
"""

from __future__ import annotations

import functools
import math
import pkgutil
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.grid import sum_to, vary_alike
from autochunk.attention.kernels.inputs import LOGITS, Call, Inputs
from autochunk.implementations import IMPLEMENTATIONS, is_fused
from autochunk.plan import Plan


class Kernel(Hashable, Protocol):
    """What an entry of ``IMPLEMENTATIONS`` names.

    It has a reverse-mode derivative whose residuals include the log-sum-exp [B, H, T'] in float32.
    """

    def __call__(self, inputs: Inputs, *, scale: float, is_causal: bool) -> jax.Array:
        """[B, T', H, V], or any error where it does not take the call.

        Args:
          inputs: query [B, T', H, K], key [B, T, N, K], value [B, T, N, V], and bias and mask that
            broadcast to [B, H, T', T].
          scale: factor on the logits.
          is_causal: whether query i sees keys 0 to i only.
        """
        ...


DIFFERENTIATED = ("query", "key", "value")
"""Whose cotangents kernels compute; those of others are computed in slices."""


def cudnn(inputs: Inputs, *, scale: float, is_causal: bool) -> jax.Array:
    """NVIDIA's, as JAX calls it."""
    attention: Any = jax.nn.dot_product_attention  # overloaded by its argument for residuals
    out: jax.Array = attention(
        *inputs[:5], scale=scale, is_causal=is_causal, implementation="cudnn"
    )
    return out


class NotTaken(Exception):
    """A fused kernel does not take this call; the text says why."""


def _kernel(name: str) -> Kernel:
    kernel: Kernel = pkgutil.resolve_name(IMPLEMENTATIONS[name].kernel)
    return kernel


def runs(plan: Plan, platforms: tuple[str, ...]) -> bool:
    """Whether a plan is for a fused kernel that all these platforms have."""
    if not is_fused(plan.implementation) or not platforms:
        return False
    return all(map(IMPLEMENTATIONS[plan.implementation].runs_on, platforms))


def trace(name: str, inputs: Inputs, call: Call, platform: str, *, training: bool) -> Any:
    """A fused kernel's forward pass as a ClosedJaxpr; arrays may be abstract.

    Raises:
      NotTaken: it does not take the call, or with ``training`` not its gradient; says why.
    """
    implementation = IMPLEMENTATIONS[name]
    if not implementation.runs_on(platform):
        raise NotTaken(f"it runs on {', '.join(implementation.platforms)}, not on {platform}")
    if refused := _not_yet(inputs, call):
        raise NotTaken(f"it is not used with {' and '.join(refused)}")
    if training and inputs.bias is not None:
        raise NotTaken("it has no gradient for every form of bias")
    if training and inputs.mask is not None:
        raise NotTaken("its gradients for rows that a mask leaves no key are not zero")
    shapes = tuple((name, array.shape, array.dtype) for name, array in inputs.present.items())
    traced = _trace(_kernel(name), shapes, call.scale, call.is_causal, training)
    if isinstance(traced, NotTaken):
        raise traced
    return traced


def _not_yet(inputs: Inputs, call: Call) -> list[str]:
    """What a call has that kernels are not given."""
    settings = {
        "local_window_size": call.window is not None,
        "logits_soft_cap": call.soft_cap is not None,
        "return_residual": call.residual,
        "a precision": call.precision is not None,
    }
    arrays = [name for name in inputs.terms if name not in ("bias", "mask")]
    return arrays + [name for name, there in settings.items() if there]


@functools.lru_cache(maxsize=1024)
def _trace(
    kernel: Kernel, shapes: tuple[Any, ...], scale: float, is_causal: bool, training: bool
) -> Any:
    """The same call gives the same object, since programs are cached by it."""
    names = [name for name, _, _ in shapes]

    def run(*arrays: jax.Array) -> jax.Array:
        inputs = _flat(Inputs(**dict(zip(names, arrays, strict=True))))
        attend = functools.partial(kernel, scale=scale, is_causal=is_causal)
        return _forward(attend, inputs)[0] if training else attend(inputs)

    try:
        return jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(*shape) for _, *shape in shapes))
    except NotTaken as refusal:
        return refusal
    except Exception as error:  # another library's refusal, in whatever words it has
        return NotTaken(f"{type(error).__name__}: {error}")


def attend(name: str, inputs: Inputs, call: Call) -> jax.Array:
    """[..., T', H, G, V] by a fused kernel."""
    out = _function(name, call)(_flat(inputs))
    return out.reshape((*inputs.query.shape[:-1], inputs.value.shape[-1]))


def with_stats(name: str, inputs: Inputs, call: Call) -> list[jax.Array]:
    """[out, row maximum, row sum of exponentials], the sum being one."""
    out, lse, _ = _forward(_function(name, call), _flat(inputs))
    *leading, rows, heads, groups, _ = inputs.query.shape
    maximum = lse.reshape((*leading, heads, groups, rows))
    out = out.reshape((*inputs.query.shape[:-1], inputs.value.shape[-1]))
    return [out, maximum, *vary_alike([jnp.ones_like(maximum)], [maximum])]


def cotangent(
    name: str, inputs: Inputs, call: Call, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> dict[str, jax.Array]:
    """Cotangents of DIFFERENTIATED, by name."""
    own_out, own_lse, pull = _forward(_function(name, call), _flat(inputs))
    saved = {id(own_out): out.reshape(own_out.shape), id(own_lse): lse.reshape(own_lse.shape)}
    leaves, tree = jax.tree.flatten(pull)
    pull = jax.tree.unflatten(tree, [saved.get(id(leaf), leaf) for leaf in leaves])
    gradients = dict(zip(DIFFERENTIATED, pull(d_out.reshape(own_out.shape)), strict=True))
    leading = inputs.query.shape[:-4]

    def restored(gradient: jax.Array, operand: jax.Array) -> jax.Array:
        return sum_to(gradient.reshape(leading + operand.shape[len(leading) :]), operand.shape)

    return {name: restored(one, inputs.present[name]) for name, one in gradients.items()}


def _forward(
    attend: Callable[[Inputs], jax.Array], inputs: Inputs
) -> tuple[jax.Array, jax.Array, Any]:
    """A kernel's output, its log-sum-exp [B, H, T'] and its backward."""

    def from_moving(*moving: jax.Array) -> jax.Array:
        return attend(inputs._replace(**dict(zip(DIFFERENTIATED, moving, strict=True))))

    query = inputs.query
    out, pull = jax.vjp(from_moving, *(inputs.present[name] for name in DIFFERENTIATED))
    shape = (query.shape[0], query.shape[2], query.shape[1])
    found = [leaf for leaf in jax.tree.leaves(pull) if _is_like(leaf, shape)]
    if len(found) != 1:
        raise NotTaken(
            "its derivative does not keep the log-sum-exp that forward-mode derivatives need"
        )
    return out, found[0], pull


def _is_like(leaf: Any, shape: tuple[int, ...]) -> bool:
    return bool(getattr(leaf, "dtype", None) == jnp.float32 and leaf.shape == shape)


def _function(name: str, call: Call) -> Callable[[Inputs], jax.Array]:
    return functools.partial(_kernel(name), scale=call.scale, is_causal=call.is_causal)


def _flat(inputs: Inputs) -> Inputs:
    """Inputs as kernels want them.

    Query [B, T', H * G, K], key and value [B, T, H, K], bias and mask [B or 1, H * G or 1, T', T].
    """
    *leading, rows, heads, groups, size = inputs.query.shape
    batch = math.prod(leading)

    def flat(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        if axes == LOGITS:
            return _flat_term(array, tuple(leading), heads, groups)
        own = array.shape[-len(axes) :]
        return jnp.broadcast_to(array, (*leading, *own)).reshape((batch, *own))

    grouped = inputs.map(flat)
    query = grouped.query.reshape((batch, rows, heads * groups, size))
    return grouped._replace(query=query)


def _flat_term(term: jax.Array, leading: tuple[int, ...], heads: int, groups: int) -> jax.Array:
    own_leading, (own_heads, own_groups, rows, keys) = term.shape[:-4], term.shape[-4:]
    if math.prod(own_leading) not in (1, math.prod(leading)):
        own_leading = leading
    if (own_heads, own_groups) not in ((1, 1), (heads, groups)):
        own_heads, own_groups = heads, groups
    whole = jnp.broadcast_to(term, (*own_leading, own_heads, own_groups, rows, keys))
    return whole.reshape((math.prod(own_leading), own_heads * own_groups, rows, keys))
