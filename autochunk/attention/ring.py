"""Attention over a sequence that is spread over devices, of which none ever holds all keys.

Each device keeps its queries; keys and values go round from device to device, and what each share
of them contributes is merged by its log-sum-exp (Liu et al. 2023, "Ring Attention with Blockwise
Transformers for Near-Infinite Context", https://arxiv.org/abs/2310.01889). In the backward pass
they go round once more, and their cotangents with them. With causality a device whose rows come
late has more to do than one whose rows come early; where each has an early part and a late one, all
have the same (as in Llama 3's training, https://arxiv.org/abs/2407.21783, section 3.3.2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autochunk.attention import checks
from autochunk.attention.arguments import Arguments
from autochunk.attention.kernels import Call, Inputs
from autochunk.attention.kernels.dense import log_sum_exp, mean_value, within_lengths
from autochunk.attention.kernels.grid import sum_to, vary_alike, varying_axes
from autochunk.attention.kernels.inputs import AXES, along_rows
from autochunk.attention.kernels.primitives import attention_with_stats_p, cotangent_p
from autochunk.attention.kernels.shares import own_call
from autochunk.attention.op import static_call
from autochunk.errors import ArgumentError

# What goes round: keys, and what belongs to them.
_TRAVELLING = ("key", "value", "key_value_segment_ids")


def ring_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    axis_name: Hashable,
    balanced: bool = False,
    return_residual: bool = False,
    max_chunk_size_mb: float | Literal["auto"] | None = "auto",
    implementation: str | None = None,
    **settings: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention inside ``jax.shard_map``, of queries and keys that are sharded by sequence.

    Of N devices along the axis the n-th has the n-th part of T' queries and of T keys; with
    ``balanced`` the n-th and the n-th to last of 2 N parts, as ``ring_order`` puts them, so that
    causality leaves all devices the same to do. It has reverse-mode derivatives, of first order.

    Args:
      query: [..., T' / N, H, K].
      key: [..., T / N, H', K], H' a divisor of H.
      value: [..., T / N, H', V].
      bias: added to the scaled logits; broadcasts to [..., H, T' / N, T], with all keys in the
        order in which the devices have them.
      mask: of which False takes no part; as the bias.
      axis_name: the mesh axis, or axes, that the sequence is sharded over.
      balanced: whether each device has an early part of the sequence and a late one.
      return_residual: return the log-sum-exp too, as ``dot_product_attention`` does.
      max_chunk_size_mb: of the attention of one part's queries to one part's keys.
      implementation: of that, too.
      **settings: scale, is_causal, query_seq_lengths, key_value_seq_lengths (of the whole
        sequences), local_window_size, query_segment_ids [..., T' / N], key_value_segment_ids
        [..., T / N], logits_soft_cap, alibi_slopes and precision, as ``dot_product_attention`` has
        them.

    Returns:
      [..., T' / N, H, V] in the query's dtype; with ``return_residual`` a tuple of that and the
      log-sum-exp [..., T' / N, H].

    Raises:
      ArgumentError: as from ``dot_product_attention``; sizes are odd with ``balanced``; a setting
        is not one of these.
    """
    unknown = settings.keys() - _SETTINGS
    if unknown:
        raise ArgumentError(
            f"ring_attention has no {' and no '.join(sorted(unknown))}; beside its own arguments "
            f"it takes {', '.join(sorted(_SETTINGS))}"
        )
    arguments = Arguments.checked(query=query, key=key, value=value, **settings)
    devices = jax.lax.axis_size(axis_name)
    sizes = checks.sizes_of(arguments.query, arguments.key)
    sizes["s"] *= devices
    for name, term in (("bias", bias), ("mask", mask)):
        if term is not None:
            whole = checks.whole_term(
                name, checks.array_of(name, term), arguments.query.shape[:-3], sizes
            )
            arguments = arguments.replace(**{name: whole})
    parts = 2 if balanced else 1
    for name in ("query", "key"):
        length = getattr(arguments, name).shape[-3]
        if length % parts or not length:
            raise ArgumentError(
                f"each device's share of the {name} must have rows, and an even number of them "
                f"with balanced=True; got {length}. Pad the sequence"
            )
    call = static_call(arguments, max_chunk_size_mb, implementation)
    call = call._replace(residual=True)
    ring = _Ring(arguments.inputs(), call, axis_name, devices, parts)
    run = jax.custom_vjp(ring.results)
    run.defvjp(ring.results_and_saved, ring.cotangents)
    out, lse = run(arguments.inputs())
    out = out.reshape(arguments.output_shape)
    if not return_residual:
        return out
    lse = jnp.moveaxis(lse, -1, -3).reshape(arguments.query.shape[:-1])
    return out, lse.astype(arguments.key.dtype)


_SETTINGS = {
    "scale",
    "is_causal",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "local_window_size",
    "query_segment_ids",
    "key_value_segment_ids",
    "logits_soft_cap",
    "alibi_slopes",
    "precision",
}


def ring_order(length: int, devices: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions [length] of a sequence in the order that ``balanced=True`` wants it sharded in.

    ``x[:, ring_order(T, N)]`` gives the n-th of N devices the n-th and the n-th to last of 2 N
    parts; ``np.argsort`` of it is the way back.

    Raises:
      ArgumentError: the length is no multiple of 2 N.
    """
    if devices < 1 or length % (2 * devices):
        raise ArgumentError(
            f"the length must be a multiple of {2 * devices}, twice the number of devices; got "
            f"{length}. Pad the sequence"
        )
    parts = np.arange(length).reshape(2 * devices, -1)
    return np.stack([parts[:devices], parts[devices:][::-1]], axis=1).reshape(length)


class _Stats(NamedTuple):
    """What is known of the rows of one part: sums over the keys that were there.

    Attributes:
      out: [..., rows, H, G, V] in float32 at least, of weights that are not divided by their sum.
      maximum, total: of the logits, and of their exponentials [..., H, G, rows].
    """

    out: jax.Array
    maximum: jax.Array
    total: jax.Array

    def joined(self, out: jax.Array, maximum: jax.Array, total: jax.Array) -> _Stats:
        """With the output of more keys, which is divided by the sum of their weights."""
        largest = jnp.maximum(self.maximum, maximum)
        before, now = jnp.exp(self.maximum - largest), jnp.exp(maximum - largest) * total
        return _Stats(
            self.out * along_rows(before) + out.astype(self.out.dtype) * along_rows(now),
            largest,
            self.total * before + now,
        )


class _Ring:
    """One device's part in a ring of devices; arrays as the kernels have them."""

    def __init__(
        self, inputs: Inputs, call: Call, axis_name: Hashable, devices: int, parts: int
    ) -> None:
        self.call, self.axis_name, self.devices, self.parts = call, axis_name, devices, parts
        self.rows = inputs.query.shape[-4] // parts
        self.keys = inputs.key.shape[-3] // parts
        self.wide = jnp.promote_types(inputs.query.dtype, jnp.float32)
        self._pairs = list(itertools.product(range(parts), range(parts)))
        # Of rows that see no key of their own, which by causality alone there are none of.
        self.may_be_blind = bool(inputs.terms) or call.window is not None

    # What is computed

    def results(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """Output [..., T' / N, H, G, V] and log-sum-exp [..., H, G, T' / N]."""
        return self.results_and_saved(inputs)[0]

    def results_and_saved(self, inputs: Inputs) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """The same, and what the backward pass needs: of this device's rows and keys alone."""
        *leading, _, heads, groups, _ = inputs.query.shape
        by_row = (*leading, heads, groups, self.rows)
        none = _Stats(
            jnp.zeros((*leading, self.rows, heads, groups, inputs.value.shape[-1]), self.wide),
            jnp.full(by_row, jnp.finfo(self.wide).min, self.wide),
            jnp.zeros(by_row, self.wide),
        )

        def step(number: jax.Array, carry: Any) -> Any:
            travelling, stats = carry
            source = self._source(number)
            for pair in self._pairs:

                def run(given: Inputs, call: Call, one: _Stats) -> _Stats:
                    operands = tuple(given.present.values())
                    return one.joined(*attention_with_stats_p.bind(*operands, call=call))

                now = inputs._replace(**travelling)
                stats[pair[0]] = self._of_pair(now, source, pair, run, stats[pair[0]], inputs)
            return self._passed_on(travelling), stats

        start = self._travelling(inputs), [none] * self.parts
        _, stats = jax.lax.fori_loop(0, self.devices, step, self._varying(start, inputs))
        out = jnp.concatenate([self._divided(one) for one in stats], axis=-4)
        maximum, total = (
            jnp.concatenate([getattr(one, name) for one in stats], axis=-1)
            for name in ("maximum", "total")
        )
        if self.may_be_blind:
            mean = jax.lax.pmean(mean_value(inputs.value.astype(self.wide)), self.axis_name)
            out = jnp.where(along_rows(total == 0), mean, out)
        out = self._within_lengths(out, inputs).astype(inputs.query.dtype)
        return (out, log_sum_exp(maximum, total)), (inputs, out, maximum, total)

    def _divided(self, stats: _Stats) -> jax.Array:
        return stats.out / along_rows(jnp.where(stats.total == 0, 1, stats.total))

    def _within_lengths(self, rows: jax.Array, inputs: Inputs) -> jax.Array:
        """Of all this device's rows, zero beyond their lengths."""
        here, parts = jax.lax.axis_index(self.axis_name), []
        for part in range(self.parts):
            given = self._from(inputs, self._start(part, here, self.rows), 0)
            own = jax.lax.slice_in_dim(
                rows, part * self.rows, (part + 1) * self.rows, axis=rows.ndim - 4
            )
            parts.append(within_lengths(own, given))
        return jnp.concatenate(parts, axis=-4)

    # What is differentiated

    def cotangents(self, saved: Any, pulled: tuple[jax.Array, jax.Array]) -> tuple[Inputs]:
        """Of all inputs."""
        inputs, out, maximum, total = saved
        blind = along_rows(total == 0)
        d_out = self._within_lengths(pulled[0], inputs)
        seen = jnp.where(blind, jnp.zeros((), d_out.dtype), d_out)
        by_row = (out, maximum, total, seen, pulled[1].astype(self.wide))
        axes = (-4, -1, -1, -4, -1)

        def step(number: jax.Array, carry: Any) -> Any:
            travelling, totals = carry
            source = self._source(number)
            for pair in self._pairs:

                def run(given: Inputs, call: Call, totals: Any, pair: Any = pair) -> Any:
                    own = (
                        jax.lax.slice_in_dim(
                            one,
                            pair[0] * self.rows,
                            (pair[0] + 1) * self.rows,
                            axis=one.ndim + axis,
                        )
                        for one, axis in zip(by_row, axes, strict=True)
                    )
                    operands = vary_alike((*given.present.values(), *own), by_row)
                    wanted = (True,) * len(call.moving)
                    found = cotangent_p.bind(*operands, call=call, wanted=wanted)
                    return {
                        name: self._added(name, totals[name], one, source, pair)
                        for name, one in zip(call.moving, found, strict=True)
                    }

                now = inputs._replace(**travelling)
                totals = self._of_pair(now, source, pair, run, totals, inputs)
            moved = self._passed_on({name: totals[name] for name in ("key", "value")})
            return self._passed_on(travelling), totals | moved

        zeros = {
            name: jnp.zeros(getattr(inputs, name).shape, self.wide) for name in self.call.moving
        }
        start = self._varying((self._travelling(inputs), zeros), inputs)
        _, totals = jax.lax.fori_loop(0, self.devices, step, start)
        if self.may_be_blind:
            means = jnp.sum(jnp.where(blind, d_out.astype(self.wide), 0), axis=(-4, -2))
            shared = jax.lax.psum(means, self.axis_name) / (self.devices * self.parts * self.keys)
            value = totals["value"]
            one_key = (*value.shape[:-3], 1, *value.shape[-2:])
            totals["value"] += sum_to(shared[..., None, :, :], one_key)
        found = {name: _like(one, getattr(inputs, name)) for name, one in totals.items()}
        none: dict[str, Any] = dict.fromkeys(Inputs._fields)
        return (Inputs(**(none | found)),)

    # Pairs of one part's rows and one part's keys

    def _of_pair(
        self,
        now: Inputs,
        source: jax.Array,
        pair: tuple[int, int],
        run: Callable[[Inputs, Call, Any], Any],
        carry: Any,
        like: Inputs,
    ) -> Any:
        """``run`` on a pair's inputs; the carry as it is where its rows see none of its keys."""
        first_row = self._start(pair[0], jax.lax.axis_index(self.axis_name), self.rows)
        first_key = self._start(pair[1], source, self.keys)
        cut = {
            name: _cut(array, self._places(name, array, source, pair))
            for name, array in now.present.items()
        }
        given = self._from(Inputs(**cut), first_row, first_key)
        index, forms = self._forms(given, first_row - first_key)

        def branch(form: tuple[Inputs, Call] | None) -> Callable[[Any], Any]:
            if form is None:
                return lambda carry: carry
            inputs, call = form
            call = own_call(inputs, call)
            return lambda carry: self._varying(run(inputs, call, carry), like)

        branches = [branch(form) for form in forms]
        return branches[0](carry) if len(branches) == 1 else jax.lax.switch(index, branches, carry)

    def _from(self, inputs: Inputs, first_row: Any, first_key: Any) -> Inputs:
        """Inputs whose rows and keys are not the sequences' first."""
        changes = {
            name: jnp.maximum(getattr(inputs, name).astype(jnp.int32) - first, 0)
            for name, first in (
                ("query_seq_lengths", first_row),
                ("key_value_seq_lengths", first_key),
            )
            if getattr(inputs, name) is not None
        }
        return inputs._replace(**changes)

    def _forms(
        self, inputs: Inputs, offset: jax.Array
    ) -> tuple[jax.Array, list[tuple[Inputs, Call] | None]]:
        """Which of several forms a pair's call has by its rows' offset; None is nothing to do.

        Causality, of parts of one length, comes to all or nothing but on the diagonal: calls that
        fused kernels take.
        """
        call, (left, right) = self.call, self.call.reach
        sloped = inputs.alibi_slopes is not None
        if (left, right) == (None, None) and not sloped:
            return offset, [(inputs, call)]
        if (left, right) == (None, 0) and self.rows == self.keys and not sloped:
            whole = call._replace(is_causal=False, window=None)
            return 1 + jnp.sign(offset), [None, (inputs, call), (inputs, whole)]
        closed = jnp.zeros((), bool)
        if right is not None:
            closed |= offset + self.rows - 1 + right < 0
        if left is not None:
            closed |= offset - left > self.keys - 1
        there = offset.reshape((1,) * (inputs.query.ndim - 4))
        moved = inputs._replace(query_offset=there)
        return jnp.where(closed, 0, 1), [None, (moved, call)]

    def _places(
        self, name: str, array: jax.Array, source: jax.Array, pair: tuple[int, int]
    ) -> dict[int, tuple[Any, int]]:
        """Where a pair's part of an array is: (start, size) by axis, where that is not all."""
        places: dict[int, tuple[Any, int]] = {}
        for axis, kind in enumerate(AXES[name], array.ndim - len(AXES[name])):
            if kind == "rows" and array.shape[axis] != 1:
                places[axis] = pair[0] * self.rows, self.rows
            elif kind == "keys" and array.shape[axis] != 1:
                start = 0 if name in _TRAVELLING else source * self.parts * self.keys
                places[axis] = start + pair[1] * self.keys, self.keys
        return places

    def _added(
        self,
        name: str,
        total: jax.Array,
        found: jax.Array,
        source: jax.Array,
        pair: tuple[int, int],
    ) -> jax.Array:
        """A total of cotangents with those of a pair."""
        places = self._places(name, total, source, pair)
        start = [places.get(axis, (0, 0))[0] for axis in range(total.ndim)]
        both = _cut(total, places) + found.astype(total.dtype)
        return jax.lax.dynamic_update_slice(total, both, start)

    # The ring

    def _travelling(self, inputs: Inputs) -> dict[str, jax.Array]:
        return {name: one for name, one in inputs.present.items() if name in _TRAVELLING}

    def _source(self, number: jax.Array) -> jax.Array:
        """Whose keys are here after so many steps."""
        return (jax.lax.axis_index(self.axis_name) - number) % self.devices

    def _start(self, part: int, device: jax.Array, size: int) -> jax.Array:
        """The first position of a part of a device."""
        if self.parts == 1:
            return device * size
        return (device if part == 0 else 2 * self.devices - 1 - device) * size

    def _passed_on(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        ring = [(device, (device + 1) % self.devices) for device in range(self.devices)]
        moved: dict[str, jax.Array] = jax.lax.ppermute(arrays, self.axis_name, ring)
        return moved

    def _varying(self, tree: Any, inputs: Inputs) -> Any:
        """What differs between devices, as far as JAX is told, as all inputs and this device do."""
        leaves, structure = jax.tree.flatten(tree)
        like = (*inputs.present.values(), jax.lax.axis_index(self.axis_name))
        return jax.tree.unflatten(structure, vary_alike(leaves, like))


def _cut(array: jax.Array, places: dict[int, tuple[Any, int]]) -> jax.Array:
    for axis, (start, size) in places.items():
        array = jax.lax.dynamic_slice_in_dim(array, start, size, axis)
    return array


def _like(cotangent: jax.Array, array: jax.Array) -> jax.Array:
    """A cotangent in its array's dtype, summed over the devices that all have the same array."""
    if more := varying_axes(cotangent) - varying_axes(array):
        cotangent = jax.lax.psum(cotangent, tuple(more))
    return cotangent.astype(array.dtype)
