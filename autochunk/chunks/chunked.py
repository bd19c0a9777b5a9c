"""``chunked``: checks the arguments, finds the sizes of chunks, runs the function in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import jax

from autochunk.chunks.axes import Parameters
from autochunk.chunks.call import Call, Settings, has_explicit_axes
from autochunk.chunks.modes import Program, for_both
from autochunk.chunks.reductions import Arrays, check_reduce
from autochunk.chunks.shares import by_shares
from autochunk.chunks.sizes import Sizes, sizes_of
from autochunk.errors import ArgumentError
from autochunk.plan import check_positive
from autochunk.resolution.settings import check_chunk_size

_F = TypeVar("_F", bound=Callable[..., Any])

_SETTINGS = "__autochunk_settings__"


def chunked(
    fn: _F,
    in_axes: Any = 0,
    out_axes: Any = None,
    *,
    reduce: Any = None,
    chunk_size: int | Sequence[int | None] | Literal["auto"] | None = "auto",
    name: str | None = None,
    memory_budget_mb: float | None = None,
) -> _F:
    """The same function, computed for a part of its positions at a time to take less memory.

    ``fn`` takes whole arrays, and must treat the positions along the chunked axis independently of
    each other, or reduce over them: rows of a batch, residues, samples, points. It is called with
    a chunk of any length, and its results are joined, or merged by ``reduce``. Loops are
    ``jax.lax.scan``. Where gradients are taken, the backward pass computes each chunk again. Under
    ``jax.vmap`` sizes are those of one element. Call it inside ``jax.jit``: outside, the loop is
    compiled again for each call.

    Args:
      fn: a pure function of arrays, or pytrees of them, at least one of which has the axis.
        Arguments without an axis that are not JAX arrays (Python numbers, texts, functions, NumPy
        arrays) are passed as they are.
      in_axes: as in ``jax.vmap``: an int, None (shared), or a tuple with one entry, or a prefix of
        its pytree, for each positional argument; or a dict by parameter name. Keyword-only
        arguments are shared unless such a dict names them. For several chunked axes at once an
        entry is a tuple: ``((0, 1), (0, None), (None, 0))`` is for a pair representation
        [rows, columns, ...], what belongs to rows, and what belongs to columns. "split" is for a
        random key: ``fn`` gets its chunk's part of ``jax.random.split(key, positions)``, so that
        what is drawn does not depend on the chunks.
      out_axes: the axis of each result, in the same way; None is a result that ``reduce`` merges.
        By default it is 0, or with ``reduce`` None.
      reduce: "sum", "mean", "max", "min" (``fn`` must reduce over its own positions in the same
        way, for "mean" by dividing by their number), or a pair ``(first, merge)``, where
        ``merge(total, results)`` returns the next total, ``first`` is the total of no positions,
        and the order of chunks must not matter. Sums and means of half-precision results are
        taken in float32.
      chunk_size: most positions at once, None for all, a tuple of these for several axes, or
        "auto". Positions are those of a whole array, or inside ``jax.shard_map`` those of a
        device's part. The last chunk is smaller if they do not fill it.
      name: the function's name in the profile store; by default its module and name.
      memory_budget_mb: most working memory (10^6 bytes) that "auto" may take; by default that of
        ``autochunk.use``.

    Returns:
      A function of the same signature and results.

    Raises:
      ArgumentError: an argument is not as above. On a call also: ``in_axes`` or ``out_axes`` do
        not fit the arrays, or ``fn`` does not return one result for each position. It is a
        ValueError.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import autochunk
      >>> def transition(x, w):  # [positions, K], [K, 4 K]
      ...     return jax.nn.relu(x @ w) @ w.T
      >>> apply = autochunk.chunked(transition, in_axes=(0, None), chunk_size=16)
      >>> jax.jit(apply)(jnp.ones((100, 8)), jnp.ones((8, 32))).shape
      (100, 8)
      >>> total = autochunk.chunked(jnp.sum, reduce="sum", chunk_size=16)
      >>> float(jax.jit(total)(jnp.ones(100)))
      100.0
    """
    if not callable(fn):
        raise ArgumentError(f"fn must be a function of arrays; got {fn!r}")
    parameters = Parameters.of(fn)
    parameters.check(in_axes)
    settings = Settings(
        fn=fn,
        parameters=parameters,
        in_axes=in_axes,
        out_axes=0 if out_axes is None and reduce is None else out_axes,
        reduce=check_reduce(reduce),
        chunk_size=check_chunk_size(chunk_size),
        name=_check_name(name, fn),
        memory_budget_mb=check_positive("memory_budget_mb", memory_budget_mb, "MB"),
    )

    def run(*args: Any, **kwargs: Any) -> Any:
        call = Call(settings, args, kwargs)
        sizes = sizes_of(call)
        whole = call.program(call.lengths, differentiable=False)
        if sizes.whole(call.lengths):
            return call.result(whole(call.arrays))
        forward = call.program(sizes.forward, differentiable=False)
        training = call.program(sizes.training, differentiable=True)
        both: Program = functools.partial(for_both, forward, training)
        if has_explicit_axes():
            both = _sharded_as(call, sizes, whole, both)
        return call.result(both(call.arrays))

    functools.update_wrapper(run, fn)
    setattr(run, _SETTINGS, settings)
    return cast(_F, run)


def call_of(fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
    """A call of a function that ``chunked`` returned.

    Raises:
      ArgumentError: ``fn`` is not such a function, or does not take these arguments.
    """
    settings = getattr(fn, _SETTINGS, None)
    if not isinstance(settings, Settings):
        raise ArgumentError(f"fn must be what autochunk.chunked returned; got {fn!r}")
    return Call(settings, args, kwargs)


def _check_name(name: Any, fn: Callable[..., Any]) -> str:
    if name is None:
        inner = fn
        while isinstance(inner, functools.partial):
            inner = inner.func
        module = getattr(inner, "__module__", None) or type(inner).__module__
        return f"{module}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    if isinstance(name, str) and name.strip():
        return name
    raise ArgumentError(f"name must be a text that is not empty, or None; got {name!r}")


def _sharded_as(call: Call, sizes: Sizes, whole: Program, program: Program) -> Program:
    """The program, sharded as the whole call would be where mesh axes are explicit.

    Where each device cannot compute its own share, the inside is left to XLA's own propagation.
    """
    if call.closes_over_sharded:
        raise ArgumentError(
            f"where mesh axes are explicit, all arrays must be arguments of {call.settings.name}, "
            "as shared ones; it has some from around it (a closure)"
        )

    like = jax.eval_shape(whole, call.arrays)
    if shares := by_shares(call, sizes.forward, sizes.training, like):
        return shares

    def run(arrays: Arrays) -> Arrays:
        specs = [one.sharding.spec for one in like]
        found: Arrays = jax.sharding.auto_axes(program, out_sharding=specs)(arrays)
        return found

    return run
