"""Attention round a ring of devices, each of which has a share of the queries and of the keys.

Each device keeps its queries; keys and values go round from device to device. The results of all
shares of them are merged by their log-sum-exp (Liu et al. 2023, "Ring Attention with Blockwise
Transformers for Near-Infinite Context", https://arxiv.org/abs/2310.01889). In the backward pass
they go round once more, together with their cotangents. In causal attention a device with late rows
has more to do than one with early rows; if each has an early part and a late one, all have the same
to do (as in Llama 3's training, https://arxiv.org/abs/2407.21783, section 3.3.2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.blind import of_means
from autochunk.attention.kernels.dense import mean_value, within_lengths
from autochunk.attention.kernels.grid import vary_alike
from autochunk.attention.kernels.inputs import AXES, Call, Inputs, along_rows
from autochunk.attention.kernels.primitives import (
    attention_with_stats_p,
    cotangent_p,
    tangent_p,
)
from autochunk.attention.kernels.shares import own_call
from autochunk.attention.kernels.terms import bits_from

# What goes round: keys, and what belongs to them.
_TRAVELLING = ("key", "value", "key_value_segment_ids")


class Spread(NamedTuple):
    """How a sequence is spread: over which mesh axes, over how many devices, in how many parts."""

    axis_name: Hashable
    devices: int
    parts: int


class _Stats(NamedTuple):
    """Stats of the rows of one part, over the keys that were there so far.

    Attributes:
      out: [..., rows, H, G, V] in float32 at least, by weights not divided by their sum.
      maximum, total: maximum of the logits, sum of their exponentials [..., H, G, rows].
    """

    out: jax.Array
    maximum: jax.Array
    total: jax.Array

    def joined(self, out: jax.Array, maximum: jax.Array, total: jax.Array) -> _Stats:
        """With the results for more keys, whose ``out`` is divided by the sum of weights."""
        largest = jnp.maximum(self.maximum, maximum)
        before, now = jnp.exp(self.maximum - largest), jnp.exp(maximum - largest) * total
        return _Stats(
            self.out * along_rows(before) + out.astype(self.out.dtype) * along_rows(now),
            largest,
            self.total * before + now,
        )


class Ring:
    """One device's part in a ring of devices; arrays as the kernels have them."""

    def __init__(self, inputs: Inputs, call: Call, spread: Spread) -> None:
        self.axis_name, self.devices, self.parts = spread
        self.call = call._replace(some_keys=self.devices * self.parts > 1)
        self.rows = inputs.query.shape[-4] // self.parts
        self.keys = inputs.key.shape[-3] // self.parts
        self.wide = jnp.promote_types(inputs.query.dtype, jnp.float32)
        self._pairs = list(itertools.product(range(self.parts), range(self.parts)))
        # Whether a row may see no key at all. By causality alone each sees its own.
        self.may_be_blind = bool(inputs.terms) or call.window is not None or call.offset != 0

    # What is computed

    def stats(self, inputs: Inputs) -> list[jax.Array]:
        """[output [..., T' / N, H, G, V], row maximum [..., H, G, T' / N], sum of exponentials].

        Of this device's rows, in float32 at least.
        """
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
        out = self._within_lengths(out, inputs)
        return [out, maximum, total]

    def _divided(self, stats: _Stats) -> jax.Array:
        return stats.out / along_rows(jnp.where(stats.total == 0, 1, stats.total))

    def _within_lengths(self, rows: jax.Array, inputs: Inputs) -> jax.Array:
        """All this device's rows, zero beyond their lengths."""
        here, parts = jax.lax.axis_index(self.axis_name), []
        for part in range(self.parts):
            given = self._from(inputs, self._start(part, here, self.rows), 0)
            parts.append(within_lengths(self._rows_of(part, rows, -4), given))
        return jnp.concatenate(parts, axis=-4)

    def _rows_of(self, part: int, array: jax.Array, axis: int) -> jax.Array:
        """A part's rows of an array, whose (negative) axis of rows is given."""
        first = part * self.rows
        return jax.lax.slice_in_dim(array, first, first + self.rows, axis=array.ndim + axis)

    def _own_rows(self, part: int, by_row: Sequence[jax.Array]) -> list[jax.Array]:
        """A part's rows of the output, maximum, sum, and of two cotangents or the first of them."""
        axes = (-4, -1, -1, -4, -1)
        return [self._rows_of(part, *one) for one in zip(by_row, axes, strict=False)]

    # What is differentiated

    def tangents(
        self, inputs: Inputs, stats: Sequence[jax.Array], moving: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """Tangents of the output, and of the log-sum-exp if asked for, linear in ``moving``."""
        named = Inputs(**dict(zip(self.call.moving, moving, strict=True)))
        d_out = jnp.zeros(stats[0].shape, self.wide)
        by_row = [d_out, *([jnp.zeros(stats[1].shape, self.wide)] if self.call.residual else [])]
        none = [self._own_rows(part, by_row) for part in range(self.parts)]

        def step(number: jax.Array, carry: Any) -> Any:
            travelling, moved, totals = carry
            source = self._source(number)
            for pair in self._pairs:
                tangents = self._of_this_pair(named._replace(**moved), source, pair)

                def run(
                    given: Inputs, call: Call, totals: Any, pair: Any = pair, moved: Any = tangents
                ) -> Any:
                    own = self._own_rows(pair[0], stats)
                    operands = (*given.present.values(), *own, *moved.present.values())
                    found = tangent_p.bind(*operands, call=call)
                    return [
                        total + one.astype(self.wide)
                        for total, one in zip(totals, found, strict=True)
                    ]

                now = inputs._replace(**travelling)
                totals[pair[0]] = self._of_pair(now, source, pair, run, totals[pair[0]], inputs)
            return self._passed_on(travelling), self._passed_on(moved), totals

        start = self._travelling(inputs), self._travelling(named), none
        *_, totals = jax.lax.fori_loop(0, self.devices, step, self._varying(start, inputs))
        joined = zip(zip(*totals, strict=True), (-4, -1), strict=False)
        found = [jnp.concatenate(one, axis) for one, axis in joined]
        if self.may_be_blind:
            mean = jax.lax.pmean(mean_value(named.value.astype(self.wide)), self.axis_name)
            blind = stats[2] == 0
            found[0] = jnp.where(along_rows(blind), mean, found[0])
            found[1:] = [jnp.where(blind, 0, one) for one in found[1:]]
        found[0] = self._within_lengths(found[0], inputs).astype(inputs.query.dtype)
        return found

    def cotangents(
        self, inputs: Inputs, stats: Sequence[jax.Array], pulled: Sequence[jax.Array], wanted: Any
    ) -> list[jax.Array]:
        """Cotangents of the wanted inputs of ``call.moving``."""
        (out, maximum, total), names = stats, self.call.wanted(wanted)
        blind = along_rows(total == 0)
        d_out = self._within_lengths(pulled[0], inputs)
        seen = jnp.where(blind, jnp.zeros((), d_out.dtype), d_out)
        by_row = (out, maximum, total, seen, *(d_lse.astype(self.wide) for d_lse in pulled[1:]))

        def step(number: jax.Array, carry: Any) -> Any:
            travelling, totals = carry
            source = self._source(number)
            for pair in self._pairs:

                def run(given: Inputs, call: Call, totals: Any, pair: Any = pair) -> Any:
                    operands = (*given.present.values(), *self._own_rows(pair[0], by_row))
                    found = cotangent_p.bind(*operands, call=call, wanted=wanted)
                    return {
                        name: self._added(name, totals[name], one, source, pair)
                        for name, one in zip(names, found, strict=True)
                    }

                now = inputs._replace(**travelling)
                totals = self._of_pair(now, source, pair, run, totals, inputs)
            moved = self._passed_on({name: totals[name] for name in names if name in _TRAVELLING})
            return self._passed_on(travelling), totals | moved

        zeros = {name: jnp.zeros(getattr(inputs, name).shape, self.wide) for name in names}
        start = self._varying((self._travelling(inputs), zeros), inputs)
        _, totals = jax.lax.fori_loop(0, self.devices, step, start)
        if self.may_be_blind and "value" in names:
            of_own_keys = of_means(d_out, inputs.value, total == 0, self.wide)
            totals["value"] += jax.lax.pmean(of_own_keys, self.axis_name)
        return [totals[name].astype(getattr(inputs, name).dtype) for name in names]

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
        """``run`` on a pair's inputs; the carry unchanged if its rows see none of its keys."""
        first_row = self._start(pair[0], jax.lax.axis_index(self.axis_name), self.rows)
        first_key = self._start(pair[1], source, self.keys)
        given = self._from(self._of_this_pair(now, source, pair), first_row, first_key)
        index, forms = self._forms(given, first_row - first_key)

        def branch(form: tuple[Inputs, Call] | None) -> Callable[[Any], Any]:
            if form is None:
                return lambda carry: carry
            inputs, call = form
            call = own_call(inputs, call)
            return lambda carry: self._varying(run(inputs, call, carry), like)

        branches = [branch(form) for form in forms]
        return branches[0](carry) if len(branches) == 1 else jax.lax.switch(index, branches, carry)

    def _of_this_pair(self, inputs: Inputs, source: jax.Array, pair: tuple[int, int]) -> Inputs:
        """A pair's parts of arrays."""
        cut = {
            name: _cut(array, self._places(name, array, source, pair))
            for name, array in inputs.present.items()
        }
        return Inputs(**cut)

    def _from(self, inputs: Inputs, first_row: Any, first_key: Any) -> Inputs:
        """Inputs of rows and keys that begin at these positions of the sequences."""
        changes = {
            name: jnp.maximum(getattr(inputs, name).astype(jnp.int32) - first, 0)
            for name, first in (
                ("query_seq_lengths", first_row),
                ("key_value_seq_lengths", first_key),
            )
            if getattr(inputs, name) is not None
        }
        if inputs.dropout_bits is not None:
            changes["dropout_bits"] = bits_from(inputs.dropout_bits, first_key)
        return inputs._replace(**changes)

    def _forms(
        self, inputs: Inputs, offset: jax.Array
    ) -> tuple[jax.Array, list[tuple[Inputs, Call] | None]]:
        """The forms that a pair's call may have, and which one it has; None is nothing to do.

        Its rows' offset decides. In causal attention with parts of one length a pair is all seen or
        all hidden, except on the diagonal: fused kernels take such calls.
        """
        call, (left, right) = self.call, self.call.reach
        own = inputs.query_offset
        sloped = inputs.alibi_slopes is not None
        if (left, right) == (None, None) and not sloped:
            return offset, [(inputs, call)]
        placed = own is not None or call.offset != 0
        if (left, right) == (None, 0) and self.rows == self.keys and not sloped and not placed:
            whole = call._replace(is_causal=False, window=None)
            return 1 + jnp.sign(offset), [None, (inputs, call), (inputs, whole)]
        there = offset.reshape((1,) * (inputs.query.ndim - 4)) + call.offset
        if own is not None:
            there = there + own.astype(there.dtype)
        closed = jnp.zeros((), bool)
        if right is not None:
            closed |= jnp.max(there) + self.rows - 1 + right < 0
        if left is not None:
            closed |= jnp.min(there) - left > self.keys - 1
        moved = inputs._replace(query_offset=there), call._replace(offset=0)
        return jnp.where(closed, 0, 1), [None, moved]

    def _places(
        self, name: str, array: jax.Array, source: jax.Array, pair: tuple[int, int]
    ) -> dict[int, tuple[Any, int]]:
        """Where a pair's part of an array is: (start, size) by axis, without axes taken whole."""
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
        """A total of cotangents, with those of a pair added."""
        places = self._places(name, total, source, pair)
        start = [places.get(axis, (0, 0))[0] for axis in range(total.ndim)]
        both = _cut(total, places) + found.astype(total.dtype)
        return jax.lax.dynamic_update_slice(total, both, start)

    # The ring

    def _travelling(self, inputs: Inputs) -> dict[str, jax.Array]:
        return {name: one for name, one in inputs.present.items() if name in _TRAVELLING}

    def _source(self, number: jax.Array) -> jax.Array:
        """The device whose keys are here after ``number`` steps."""
        return (jax.lax.axis_index(self.axis_name) - number) % self.devices

    def _start(self, part: int, device: jax.Array, size: int) -> jax.Array:
        """The first position of a part of a device."""
        return first_position(device, part, self.devices, self.parts) * size

    def _passed_on(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        ring = [(device, (device + 1) % self.devices) for device in range(self.devices)]
        moved: dict[str, jax.Array] = jax.lax.ppermute(arrays, self.axis_name, ring)
        return moved

    def _varying(self, tree: Any, inputs: Inputs) -> Any:
        """The arrays, varying over the mesh axes that inputs and this device's index vary over."""
        leaves, structure = jax.tree.flatten(tree)
        like = (*inputs.present.values(), jax.lax.axis_index(self.axis_name))
        return jax.tree.unflatten(structure, vary_alike(leaves, like))


def first_position(device: jax.Array, part: int, devices: int, parts: int) -> jax.Array:
    """Where a device's part begins, counted in parts. Of two parts one is early and one late."""
    return device if part == 0 else parts * devices - 1 - device


def _cut(array: jax.Array, places: dict[int, tuple[Any, int]]) -> jax.Array:
    for axis, (start, size) in places.items():
        array = jax.lax.dynamic_slice_in_dim(array, start, size, axis)
    return array
