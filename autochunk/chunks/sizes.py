"""How many positions a chunk has: as the caller says, or for "auto" by a rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autochunk import device as devices
from autochunk.chunks import auto
from autochunk.chunks.call import Call
from autochunk.chunks.gradients import NO_GRADIENTS, trained
from autochunk.chunks.memory import peak_bytes
from autochunk.chunks.rule import most_bytes, usual_sizes
from autochunk.device import Device
from autochunk.errors import ArgumentError
from autochunk.plan import CHUNKS, Plan
from autochunk.resolution import settings
from autochunk.resolution.functions import FunctionResolution
from autochunk.resolution.reporting import muted
from autochunk.workload import MODES


@dataclass(frozen=True)
class Sizes:
    """Most positions of a chunk along each axis, for calls that are differentiated and others."""

    forward: tuple[int, ...]
    training: tuple[int, ...]

    def whole(self, lengths: Sequence[int]) -> bool:
        """Whether neither chunks anything."""
        pairs = zip((*self.forward, *self.training), (*lengths, *lengths), strict=True)
        return all(size >= length for size, length in pairs)


def sizes_of(call: Call) -> Sizes:
    """Sizes from the caller, else from settings around the call, else from profiles or the rule.

    Raises:
      ArgumentError: there is not one size for each axis.
    """
    given = call.settings.chunk_size
    if given == "auto" and settings.current().chunk_size is not settings.UNSET:
        given = settings.current().chunk_size
    if given == "auto":
        return _auto(call)
    sizes = _for_each(given, call.lengths)
    return Sizes(sizes, sizes)


def _for_each(given: Any, lengths: Sequence[int]) -> tuple[int, ...]:
    several = given if isinstance(given, tuple) else (given,) * len(lengths)
    if len(several) != len(lengths):
        raise ArgumentError(
            f"chunk_size must have one entry for each of the {len(lengths)} chunked axes; got "
            f"{given!r}"
        )
    pairs = zip(several, lengths, strict=True)
    return tuple(length if size is None else size for size, length in pairs)


def _auto(call: Call) -> Sizes:
    if call.symbolic or 0 in call.lengths or call.closes_over_sharded:
        return Sizes(call.lengths, call.lengths)
    answers = auto.found_sizes(call)
    found = {mode: answer.sizes for mode, answer in answers.items() if answer.sizes is not None}
    device = next((one.device for one in answers.values()), None) or devices.detect()
    unfit = [mode for mode, one in answers.items() if one.over_budget and not one.mixes]
    usual = _by_rule(call, device) if unfit or len(found) < len(MODES) else None
    for mode in unfit:
        found[mode] = _least(call, answers[mode], getattr(usual, mode))
    sizes = Sizes(*(found.get(mode) or getattr(usual, mode) for mode in MODES))
    auto.report(call, answers, _said(sizes, call.lengths))
    return sizes


def _said(sizes: Sizes, lengths: Sequence[int]) -> str:
    """Sizes in words, for a warning."""
    each = {
        mode: Plan(CHUNKS, None, size) if size < tuple(lengths) else "all at once"
        for mode, size in zip(MODES, (sizes.forward, sizes.training), strict=True)
    }
    return " and ".join(f"{plan} ({mode})" for mode, plan in each.items())


def _by_rule(call: Call, device: Device) -> Sizes:
    """By the memory of the device that profiles are for: the same one in every process."""
    budget = call.settings.memory_budget_mb or settings.current().memory_budget_mb
    most = most_bytes(device.memory_gib, budget)
    with muted():
        forward = usual_sizes(call.lengths, lambda sizes: _needed(call, sizes), most)
        training = usual_sizes(call.lengths, lambda sizes: _needed_to_train(call, sizes), most)
    return Sizes(forward, training)


def _least(call: Call, answer: FunctionResolution, usual: tuple[int, ...]) -> tuple[int, ...]:
    """The rule's sizes, if they should take less memory than any that were measured.

    The rule does not know of copies that XLA makes. What it leaves out of the smallest chunks that
    were measured, it is taken to leave out of smaller ones in proportion.
    """
    assert answer.sizes is not None
    smallest = min(answer.memory, key=math.prod, default=())
    if math.prod(usual) >= math.prod(smallest):
        return answer.sizes
    needed = _needed if answer.workload.mode == "forward" else _needed_to_train
    with muted():
        share = needed(call, usual) / max(1, needed(call, smallest))
    less = share * answer.memory[smallest] < min(answer.memory.values())
    return usual if less else answer.sizes


def _needed(call: Call, sizes: Sequence[int]) -> int:
    """Bytes that a chunk takes at once."""
    if tuple(sizes) == call.lengths:
        return peak_bytes(call.traced.jaxpr)
    return peak_bytes(call.trace(call.flat, sizes).jaxpr)


def _needed_to_train(call: Call, sizes: Sequence[int]) -> int:
    """The same with the backward pass, if there is one."""
    try:
        return peak_bytes(call.trace(trained(call), sizes).jaxpr)
    except NO_GRADIENTS:
        return _needed(call, sizes)
