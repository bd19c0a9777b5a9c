"""Fused attention kernels of other libraries, as implementations beside our slices.

``autochunk.implementations`` lists them, ``libraries`` says what each takes. A kernel is used only
where it takes the call. Everything else runs in our slices: forward-mode and higher derivatives,
platforms that the kernel does not run on.

Between forward and backward we keep what our slices keep: the output and the log-sum-exp of each
row (as a row maximum, with a sum of one). So either can continue from the other's results. A
kernel's own backward comes from ``jax.vjp``. What that saved of the forward pass is replaced by our
copies; the forward pass that it would run again is then dead code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.extend.backend
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import partial_eval

from autochunk.attention.kernels.dense import log_sum_exp
from autochunk.attention.kernels.grid import sum_to, vary_alike
from autochunk.attention.kernels.inputs import (
    LOGITS,
    Call,
    Inputs,
    KeyRange,
    Settings,
    along_rows,
)
from autochunk.attention.kernels.libraries import (
    Kernel,
    as_mask,
    gets_a_mask,
    has_lengths,
    lacking,
)
from autochunk.attention.kernels.mending import can_mend, mask_tells, mended
from autochunk.attention.kernels.seen import Seen, key_range_of
from autochunk.attention.kernels.tokamax import quiet
from autochunk.implementations import IMPLEMENTATIONS, is_fused
from autochunk.plan import Plan, Plans

_Mode = Literal["forward", "training"]
_T = TypeVar("_T")


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


def differentiated(name: str) -> tuple[str, ...]:
    """The inputs whose cotangents a fused kernel computes."""
    return _kernel(name).differentiated


def taken(inputs: Inputs, call: Call, refused: Callable[[str, _Mode, NotTaken], Plan]) -> Call:
    """The call with its fused kernels traced; for one that refuses it, the plan of ``refused``.

    Arrays may be abstract.
    """
    plans, kernels = call.plans, {}
    for mode in get_args(_Mode):
        while is_fused(name := getattr(plans, mode).implementation):
            try:
                kernels[mode] = trace(name, inputs, call, platform(), training=mode == "training")
                break
            except NotTaken as refusal:
                changes: dict[str, Any] = {mode: refused(name, mode, refusal)}
                plans = dataclasses.replace(plans, **changes)
    forward, training = (kernels.get(mode) for mode in get_args(_Mode))
    return call._replace(plans=plans, kernel=forward, training_kernel=training)


def trace(name: str, inputs: Inputs, call: Call, platform: str, *, training: bool) -> Any:
    """A fused kernel's forward pass as a ClosedJaxpr; arrays may be abstract.

    Raises:
      NotTaken: the kernel does not take the call, or with ``training`` its gradient; says why.
    """
    implementation = IMPLEMENTATIONS[name]
    if not implementation.runs_on(platform):
        raise NotTaken(f"it runs on {', '.join(implementation.platforms)}, not on {platform}")
    if not implementation.installed:
        raise NotTaken(implementation.how_to_install)
    if not implementation.takes(dtype := str(inputs.query.dtype)):
        raise NotTaken(f"it takes {' and '.join(implementation.dtypes)}, not {dtype}")
    kernel = _kernel(name)
    if refused := lacking(kernel, inputs, call, training=training):
        raise NotTaken(f"it is not used with {' and '.join(refused)}")
    shapes = tuple((name, array.shape, array.dtype) for name, array in inputs.present.items())
    traced = _trace(kernel, shapes, call._replace(plans=Plans(Plan(), Plan())), training)
    if isinstance(traced, NotTaken):
        raise traced
    return traced


@contextlib.contextmanager
def their_rules() -> Iterator[None]:
    """Restores settings of jax that kernels' authors relied on and a caller may have changed.

    Inside a ``shard_map`` that checks which mesh axes values vary over, a Pallas kernel that does
    not declare that for its results is an error.
    """
    from jax._src import config  # jax has no public name for turning that off

    unchecked: Any = config._check_vma
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        unchecked(False),
        quiet(),
    ):
        yield


def _by_their_rules(function: Callable[..., _T]) -> Callable[..., _T]:
    """``function(name, inputs, call, *arrays)`` by ``their_rules``, on arrays that do not vary.

    What its results do not need is removed before lowering, since lowering takes a second or so for
    each Pallas kernel.
    """

    @functools.wraps(function)
    def run(name: str, inputs: Inputs, call: Call, *arrays: jax.Array) -> _T:
        leaves, tree = jax.tree.flatten((inputs, arrays))

        def plain(*leaves: jax.Array) -> _T:
            inputs, arrays = jax.tree.unflatten(tree, leaves)
            return function(name, inputs, call, *arrays)

        abstract = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in leaves]
        with their_rules():
            traced, shapes = jax.make_jaxpr(plain, return_shape=True)(*abstract)
            needed = [True] * len(traced.out_avals)
            lean, _ = partial_eval.dce_jaxpr(traced.jaxpr, needed, instantiate=True)
            results = jax.extend.core.jaxpr_as_fun(traced.replace(jaxpr=lean))(*leaves)
        found: _T = jax.tree.unflatten(jax.tree.structure(shapes), results)
        return found

    return run


@functools.lru_cache(maxsize=1024)
def _trace(kernel: Kernel, shapes: tuple[Any, ...], call: Call, training: bool) -> Any:
    """The same call gives the same object, since programs are cached by it."""
    names = [name for name, _, _ in shapes]

    def run(*arrays: jax.Array) -> Any:
        given = _given(kernel, Inputs(**dict(zip(names, arrays, strict=True))), call, skips=True)
        if not training and not call.residual:
            return kernel.attend(*given)
        out, _, pull = _forward(kernel, *given)
        return pull(out) if training and kernel.refuses_late else out

    abstract = [jax.ShapeDtypeStruct(*shape) for _, *shape in shapes]
    try:
        with their_rules():
            if kernel.refuses_late:
                jax.jit(run).lower(*abstract)
            return jax.make_jaxpr(run)(*abstract)
    except NotTaken as refusal:
        return refusal
    except Exception as error:  # another library's refusal, in whatever words it has
        return NotTaken(f"{type(error).__name__}: {error}")


@_by_their_rules
def attend(name: str, inputs: Inputs, call: Call) -> list[jax.Array]:
    """[[..., T', H, G, V]], and the log-sum-exp if that is asked for, by a fused kernel."""
    if call.residual:
        out, maximum, total = with_stats(name, inputs, call)
        return [out, log_sum_exp(maximum, total)]
    kernel = _kernel(name)
    given, finished = _for_output(kernel, Seen(inputs, call), call)
    return [finished(kernel.attend(*given))]


@_by_their_rules
def with_stats(name: str, inputs: Inputs, call: Call) -> list[jax.Array]:
    """[out, row maximum, row sum of exponentials]; the sum is one, or zero without a key."""
    seen, kernel = Seen(inputs, call), _kernel(name)
    given, finished = _for_output(kernel, seen, call)
    out, kept, _ = _forward(kernel, *given)
    *leading, rows, heads, groups, _ = inputs.query.shape
    if "log-sum-exp" in kept:
        lse = kept["log-sum-exp"]
    else:
        lse = log_sum_exp(kept["maximum"], kept["sum"])
    maximum = lse.reshape((*leading, heads, groups, rows))
    (total,) = vary_alike([jnp.ones_like(maximum)], [maximum])
    if seen.blind is not None:
        maximum = jnp.where(seen.blind, jnp.finfo(maximum.dtype).min, maximum)
        total = jnp.where(seen.blind, 0, total)
    return [finished(out), maximum, total]


@_by_their_rules
def cotangent(
    name: str, inputs: Inputs, call: Call, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> dict[str, jax.Array]:
    """Cotangents of the inputs that the kernel differentiates, by name.

    The values' cotangents lack what rows without a key add. ``d_out`` must be zero beyond the rows'
    lengths. (It is not selected in rows without a key, which would cost a pass over it; one that is
    not finite there reaches the keys' and queries' cotangents, too, not only the values'.)
    """
    seen, kernel = Seen(inputs, call), _kernel(name)
    if seen.blind is not None:
        # Weights of zero keep the row's cotangent out; its output is a mean that may be NaN, and
        # zero times NaN is NaN.
        out = jnp.where(along_rows(seen.blind), 0, out)
        lse = jnp.where(seen.blind, _UNREACHED, lse)
    own_out, kept, pull = _forward(kernel, *_given(kernel, seen.inputs, call))
    ours = {"output": out, "log-sum-exp": lse, "maximum": lse, "sum": jnp.ones_like(lse)}
    saved = {id(own): ours[what].reshape(own.shape) for what, own in kept.items()}
    leaves, tree = jax.tree.flatten(pull)
    pull = jax.tree.unflatten(tree, [saved.get(id(leaf), leaf) for leaf in leaves])
    (gradients,) = pull(d_out.reshape(own_out.shape))
    return {name: _as_given(name, one, inputs) for name, one in gradients.items()}


_Given = tuple[Inputs, Settings, KeyRange | None]
"""What ``Kernel.attend`` is given."""


def _for_output(
    kernel: Kernel, seen: Seen, call: Call
) -> tuple[_Given, Callable[[jax.Array], jax.Array]]:
    """What a kernel is given for its output, and what makes that ours."""
    given = _given(kernel, seen.for_output(kernel, mends=True), call, skips=True)
    if seen.blind is None or seen.hidden is None:
        return given, seen.restored
    if not can_mend(given[0]):
        given = _given(kernel, seen.for_output(kernel, mends=False), call, skips=True)
        return given, seen.restored
    # Where a bias hides keys, too, it takes a product over keys to know of all blind rows.
    tells = kernel.gives_zero and seen.inputs.bias is not None and not has_lengths(seen.inputs)
    made, settings, _ = given
    hidden = seen.hidden if tells else seen.blind
    by_mask = (tells or made.bias is None) and mask_tells(made, settings)
    blind = None if by_mask else _by_rows(hidden, seen.inputs)
    if made.mask is not None and kernel.masks_as_bytes:
        made = made._replace(mask=made.mask.astype(jnp.int8))
    return given, lambda out: seen.whole(mended(out, made, settings, blind, tells=tells))


def _as_given(name: str, gradient: jax.Array, inputs: Inputs) -> jax.Array:
    """A kernel's cotangent of an array, in the array's own shape."""
    operand, leading = inputs.present[name], inputs.query.shape[:-4]
    if name == "bias":
        sizes = _flat_sizes(operand, inputs)
        return sum_to(gradient.reshape((*sizes, *gradient.shape[-2:])), operand.shape)
    return sum_to(gradient.reshape(leading + operand.shape[len(leading) :]), operand.shape)


# A log-sum-exp that makes all weights of a row zero, in half precision too.
_UNREACHED = 1e30


def _forward(
    kernel: Kernel, inputs: Inputs, settings: Settings, key_range: KeyRange | None
) -> tuple[jax.Array, dict[str, jax.Array], Callable[[jax.Array], tuple[dict[str, jax.Array]]]]:
    """A kernel's output, its saved results by name, and its backward, a pytree of all saved.

    Raises:
      NotTaken: something that it should keep is not there.
    """
    moving = {
        name: array for name, array in inputs.present.items() if name in kernel.differentiated
    }

    def from_moving(moving: dict[str, jax.Array]) -> jax.Array:
        return kernel.attend(inputs._replace(**moving), settings, key_range)

    query = inputs.query
    out, pull = jax.vjp(from_moving, moving)
    by_row = jax.ShapeDtypeStruct((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)
    saved = jax.tree.leaves(pull)
    stats = [leaf for leaf in saved if _is_like(leaf, by_row)]
    # The saved one need not be the same object: rules may run within another primitive.
    outputs = [leaf for leaf in saved if _is_like(leaf, out)]
    output = next((leaf for leaf in outputs if leaf is out), outputs[-1] if outputs else None)
    if not stats or len(stats) != len(kernel.keeps) or output is None:
        kept = " and the ".join(kernel.keeps or ("log-sum-exp",))
        raise NotTaken(
            f"its derivative does not keep the output and the {kept} of each row, which others go "
            "on from"
        )
    return out, {"output": output, **dict(zip(kernel.keeps, stats, strict=True))}, pull


def _is_like(leaf: Any, other: Any) -> bool:
    same = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return same == (other.shape, other.dtype)


def _given(kernel: Kernel, inputs: Inputs, call: Call, *, skips: bool = False) -> _Given:
    """A call as a kernel takes it; with ``skips`` a range of keys where that is worth it."""
    is_worth_it = skips and kernel.skips is not None and inputs.key.shape[-3] >= kernel.skips
    key_range = (
        key_range_of(inputs, call) if is_worth_it and gets_a_mask(kernel, inputs, call) else None
    )
    key_range = jax.tree.map(lambda rows: _by_rows(rows, inputs), key_range)
    inputs, call = as_mask(kernel, inputs, call)
    settings = Settings(call.scale, *call.reach, call.soft_cap, call.precision)
    return _flat(inputs, kernel), settings, key_range


def _flat(inputs: Inputs, kernel: Kernel) -> Inputs:
    """Inputs as kernels want them: see ``Kernel.attend``."""
    *leading, rows, heads, groups, size = inputs.query.shape
    batch, keys = math.prod(leading), inputs.key.shape[-3]

    def flat(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        if axes == LOGITS:
            shared = array.dtype == bool and kernel.one_row_masks
            return _folded(array, inputs, (array.shape[-2] if shared else rows, keys))
        own = array.shape[array.ndim - len(axes) :]
        return jnp.broadcast_to(array, (*leading, *own)).reshape((batch, *own))

    grouped = inputs.map(flat)
    query = grouped.query.reshape((batch, rows, heads * groups, size))
    # Beyond these limits kernels were seen to give anything; results of length zero are not used.
    most = {"query_seq_lengths": rows, "key_value_seq_lengths": keys}
    lengths = {
        name: jnp.clip(grouped.present[name], 1, size).astype(jnp.int32)
        for name, size in most.items()
        if name in grouped.present
    }
    return grouped._replace(query=query, **lengths)


def _by_rows(rows: jax.Array, inputs: Inputs) -> jax.Array:
    """A number for each row [..., H, G, T'], sizes of one broadcast: [B or 1, H or 1, T' or 1]."""
    return _folded(rows[..., None], inputs, (rows.shape[-1], 1))[..., 0]


def _folded(term: jax.Array, inputs: Inputs, sizes: tuple[int, int]) -> jax.Array:
    """A term of the logits as [B or 1, H or 1, *sizes], to which its last two dims broadcast."""
    own, count = _flat_sizes(term, inputs), inputs.query.ndim - 4
    whole = jnp.broadcast_to(term, (*own, *sizes))
    return whole.reshape((math.prod(own[:count]), math.prod(own[count:]), *sizes))


def _flat_sizes(term: jax.Array, inputs: Inputs) -> tuple[int, ...]:
    """Leading dims and heads of a bias or mask, each of the two either whole or of size one."""
    *leading, _, heads, groups, _ = inputs.query.shape
    own_leading, own_heads = term.shape[:-4], term.shape[-4:-2]
    if math.prod(own_leading) not in (1, math.prod(leading)):
        own_leading = tuple(leading)
    if own_heads not in ((1, 1), (heads, groups)):
        own_heads = (heads, groups)
    return (*own_leading, *own_heads)
