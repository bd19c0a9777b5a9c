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

import dataclasses
import functools
import math
import pkgutil
from collections.abc import Callable, Hashable
from typing import Any, Literal, Protocol, get_args

import jax
import jax.extend.backend
import jax.numpy as jnp

from autochunk.attention.kernels.dense import log_sum_exp, mean_value, within_lengths
from autochunk.attention.kernels.grid import sum_to, vary_alike
from autochunk.attention.kernels.inputs import LOGITS, Call, Inputs, along_rows
from autochunk.attention.kernels.terms import may_see_nothing, terms_of
from autochunk.implementations import IMPLEMENTATIONS, is_fused
from autochunk.plan import Plan, Plans

_Mode = Literal["forward", "training"]


class Kernel(Hashable, Protocol):
    """What an entry of ``IMPLEMENTATIONS`` names.

    It has a reverse-mode derivative whose residuals include the log-sum-exp [B, H, T'] in float32.
    """

    def __call__(
        self, inputs: Inputs, *, scale: float, is_causal: bool, left: int | None
    ) -> jax.Array:
        """[B, T', H, V], or any error where it does not take the call.

        What it gives for rows without a key, and its gradients there, does not matter, nor for rows
        beyond their length.

        Args:
          inputs: query [B, T', H, K], key [B, T, N, K], value [B, T, N, V], and as they are there
            bias and mask [B or 1, H or 1, T', T], query_seq_lengths and key_value_seq_lengths [B].
          scale: factor on the logits.
          is_causal: whether query i sees keys 0 to i only.
          left: with that, from key i - left on; None is all.
        """
        ...


DIFFERENTIATED = ("query", "key", "value")
"""Whose cotangents kernels compute; those of others are computed in slices."""


def cudnn(inputs: Inputs, *, scale: float, is_causal: bool, left: int | None) -> jax.Array:
    """NVIDIA's, as JAX calls it."""
    attention: Any = jax.nn.dot_product_attention  # overloaded by its argument for residuals
    out: jax.Array = attention(
        *inputs[:5],
        scale=scale,
        is_causal=is_causal,
        local_window_size=None if left is None else (left, 0),
        query_seq_lengths=inputs.query_seq_lengths,
        key_value_seq_lengths=inputs.key_value_seq_lengths,
        implementation="cudnn",
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


def platform() -> str:
    """Jax's default platform as lowering rules name it."""
    backend = jax.extend.backend.get_backend()
    if backend.platform != "gpu":
        return str(backend.platform)
    return "rocm" if "rocm" in backend.platform_version.lower() else "cuda"


def taken(
    inputs: Inputs, call: Call, refused: Callable[[str, _Mode, NotTaken], Plan]
) -> tuple[Plans, Any]:
    """A call's plans, each fused kernel's that is not taken by what ``refused`` says; a kernel.

    The kernel is one that was traced, or None; arrays may be abstract.
    """
    plans, kernel = call.plans, None
    for mode in get_args(_Mode):
        name = getattr(plans, mode).implementation
        if is_fused(name):
            try:
                kernel = trace(name, inputs, call, platform(), training=mode == "training")
            except NotTaken as refusal:
                changes: dict[str, Any] = {mode: refused(name, mode, refusal)}
                plans = dataclasses.replace(plans, **changes)
    return plans, kernel


def trace(name: str, inputs: Inputs, call: Call, platform: str, *, training: bool) -> Any:
    """A fused kernel's forward pass as a ClosedJaxpr; arrays may be abstract.

    Raises:
      NotTaken: it does not take the call, or with ``training`` not its gradient; says why.
    """
    implementation = IMPLEMENTATIONS[name]
    if not implementation.runs_on(platform):
        raise NotTaken(f"it runs on {', '.join(implementation.platforms)}, not on {platform}")
    if refused := _not_given(inputs, call, training):
        raise NotTaken(f"it is not used with {' and '.join(refused)}")
    if training and inputs.bias is not None:
        raise NotTaken("it has no gradient for every form of bias")
    shapes = tuple((name, array.shape, array.dtype) for name, array in inputs.present.items())
    traced = _trace(_kernel(name), shapes, call._replace(plans=Plans(Plan(), Plan())), training)
    if isinstance(traced, NotTaken):
        raise traced
    return traced


_GIVEN = {*DIFFERENTIATED, "bias", "mask", "query_seq_lengths", "key_value_seq_lengths"}
# Of half-precision inputs, which are all that they take, these ask for nothing else.
_PRECISIONS = {"highest", "high", "default", "float32", "tensorfloat32", "bfloat16", "fastest"}


def _not_given(inputs: Inputs, call: Call, training: bool) -> list[str]:
    """What a call has that kernels are not given."""
    _, right = call.reach
    lengths = {"query_seq_lengths", "key_value_seq_lengths"} & inputs.present.keys()
    precision = getattr(call.precision, "name", call.precision)
    settings = {
        "a local_window_size that reaches to the right": right not in (None, 0),
        "a local_window_size of more queries than keys": call.window is not None
        and inputs.query.shape[-4] > inputs.key.shape[-3],
        "a local_window_size and lengths": call.window is not None and bool(lengths),
        "a query_offset": call.reach != (None, None) and call.offset != 0,
        "logits_soft_cap": call.soft_cap is not None,
        "the gradient of return_residual": call.residual and training,
        f"precision {precision}": str(precision).lower() not in {*_PRECISIONS, "none"},
    }
    arrays = [name for name in inputs.present if name not in _GIVEN]
    return arrays + [name for name, there in settings.items() if there]


@functools.lru_cache(maxsize=1024)
def _trace(kernel: Kernel, shapes: tuple[Any, ...], call: Call, training: bool) -> Any:
    """The same call gives the same object, since programs are cached by it."""
    names = [name for name, _, _ in shapes]

    def run(*arrays: jax.Array) -> jax.Array:
        inputs = _flat(Inputs(**dict(zip(names, arrays, strict=True))))
        attend = _with_settings(kernel, call)
        return _forward(attend, inputs)[0] if training or call.residual else attend(inputs)

    try:
        return jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(*shape) for _, *shape in shapes))
    except NotTaken as refusal:
        return refusal
    except Exception as error:  # another library's refusal, in whatever words it has
        return NotTaken(f"{type(error).__name__}: {error}")


def attend(name: str, inputs: Inputs, call: Call) -> list[jax.Array]:
    """[[..., T', H, G, V]], and the log-sum-exp if that is asked for, by a fused kernel."""
    if call.residual:
        out, maximum, total = with_stats(name, inputs, call)
        return [out, log_sum_exp(maximum, total)]
    seen = _Seen(inputs, call)
    out = _with_settings(_kernel(name), call)(_flat(seen.inputs))
    return [seen.restored(out)]


def with_stats(name: str, inputs: Inputs, call: Call) -> list[jax.Array]:
    """[out, row maximum, row sum of exponentials], the sum being one, or zero without a key."""
    seen = _Seen(inputs, call)
    out, lse, _ = _forward(_with_settings(_kernel(name), call), _flat(seen.inputs))
    *leading, rows, heads, groups, _ = inputs.query.shape
    maximum = lse.reshape((*leading, heads, groups, rows))
    (total,) = vary_alike([jnp.ones_like(maximum)], [maximum])
    if seen.blind is not None:
        maximum = jnp.where(seen.blind, jnp.finfo(maximum.dtype).min, maximum)
        total = jnp.where(seen.blind, 0, total)
    return [seen.restored(out), maximum, total]


def cotangent(
    name: str, inputs: Inputs, call: Call, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> dict[str, jax.Array]:
    """Cotangents of DIFFERENTIATED, by name; but for what values have of rows without a key.

    The output's cotangent is zero beyond the rows' lengths.
    """
    seen = _Seen(inputs, call)
    if seen.blind is not None:
        d_out = jnp.where(along_rows(seen.blind), 0, d_out)
        lse = jnp.where(seen.blind, _UNREACHED, lse)
    own_out, own_lse, pull = _forward(_with_settings(_kernel(name), call), _flat(seen.inputs))
    saved = {id(own_out): out.reshape(own_out.shape), id(own_lse): lse.reshape(own_lse.shape)}
    leaves, tree = jax.tree.flatten(pull)
    pull = jax.tree.unflatten(tree, [saved.get(id(leaf), leaf) for leaf in leaves])
    gradients = dict(zip(DIFFERENTIATED, pull(d_out.reshape(own_out.shape)), strict=True))
    leading = inputs.query.shape[:-4]

    def restored(gradient: jax.Array, operand: jax.Array) -> jax.Array:
        return sum_to(gradient.reshape(leading + operand.shape[len(leading) :]), operand.shape)

    return {name: restored(one, inputs.present[name]) for name, one in gradients.items()}


# A log-sum-exp that makes all weights of a row zero, in half precision too.
_UNREACHED = 1e30


class _Seen:
    """Inputs without what is excluded, and which rows see no key.

    Kernels multiply what is excluded by a weight of zero, and zero times infinity is NaN; what no
    row sees is therefore zero for them. What some rows see and others do not is to be finite.

    Attributes:
      inputs: with zeros for queries, keys and values that take no part.
      blind: rows without a key [..., H, G, T'], sizes of one broadcast; None where none can be.
    """

    def __init__(self, inputs: Inputs, call: Call) -> None:
        self.inputs, self.blind, self._given = inputs, None, inputs
        if not may_see_nothing(inputs, call):
            return
        visible = terms_of(inputs, call).visible()
        weighed = [] if visible is None else [visible]
        weighed += [] if inputs.bias is None else [~jnp.isneginf(inputs.bias)]
        self.blind = ~jnp.any(functools.reduce(jnp.logical_and, weighed), axis=-1)
        if visible is None:
            return
        keys = jnp.any(visible, axis=(-3, -2)).swapaxes(-1, -2)[..., None]
        self.inputs = inputs._replace(
            query=jnp.where(along_rows(self.blind), 0, inputs.query),
            key=jnp.where(keys, inputs.key, 0),
            value=jnp.where(keys, inputs.value, 0),
        )

    def restored(self, out: jax.Array) -> jax.Array:
        """A kernel's output [B, T', H * G, V] as ours: the mean of all values for blind rows."""
        given = self._given
        out = out.reshape((*given.query.shape[:-1], given.value.shape[-1]))
        if self.blind is not None:
            out = jnp.where(along_rows(self.blind), mean_value(given.value), out)
        return within_lengths(out, given)


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


def _with_settings(kernel: Kernel, call: Call) -> Callable[[Inputs], jax.Array]:
    left, right = call.reach
    return functools.partial(kernel, scale=call.scale, is_causal=right == 0, left=left)


def _flat(inputs: Inputs) -> Inputs:
    """Inputs as kernels want them.

    Query [B, T', H * G, K], key and value [B, T, H, K], bias and mask [B or 1, H * G or 1, T', T],
    lengths [B].
    """
    *leading, rows, heads, groups, size = inputs.query.shape
    batch, keys = math.prod(leading), inputs.key.shape[-3]

    def flat(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        if axes == LOGITS:
            return _flat_term(array, tuple(leading), (heads, groups), (rows, keys))
        own = array.shape[array.ndim - len(axes) :]
        return jnp.broadcast_to(array, (*leading, *own)).reshape((batch, *own))

    grouped = inputs.map(flat)
    query = grouped.query.reshape((batch, rows, heads * groups, size))
    # Beyond these kernels were seen to give anything; of a length of zero nothing is used.
    most = {"query_seq_lengths": rows, "key_value_seq_lengths": keys}
    lengths = {
        name: jnp.clip(grouped.present[name], 1, size).astype(jnp.int32)
        for name, size in most.items()
        if name in grouped.present
    }
    return grouped._replace(query=query, **lengths)


def _flat_term(
    term: jax.Array, leading: tuple[int, ...], heads: tuple[int, int], logits: tuple[int, int]
) -> jax.Array:
    own_leading, own_heads = term.shape[:-4], term.shape[-4:-2]
    if math.prod(own_leading) not in (1, math.prod(leading)):
        own_leading = leading
    if own_heads not in ((1, 1), heads):
        own_heads = heads
    whole = jnp.broadcast_to(term, (*own_leading, *own_heads, *logits))
    return whole.reshape((math.prod(own_leading), math.prod(own_heads), *logits))
