"""Resolves "auto": the best sizes found, else the rule's; a miss leaves its program for tuning."""

from __future__ import annotations

import contextlib
from typing import Any

from autochunk.chunks.call import Call
from autochunk.chunks.describe import described
from autochunk.chunks.export import exported
from autochunk.chunks.gradients import has_gradients
from autochunk.errors import BudgetWarning, MissWarning, StaleWarning, StoreError
from autochunk.functions import FunctionCall
from autochunk.resolution import agree, settings
from autochunk.resolution.functions import FunctionResolution, resolve_function
from autochunk.resolution.reporting import warn_once
from autochunk.store import programs
from autochunk.store.profiles import ProfileStore
from autochunk.workload import MODES, Mode

_EXPLAIN = "measure it from your own script: autochunk.tune_chunks(fn, args)"


def found_sizes(call: Call) -> dict[Mode, FunctionResolution]:
    """What each mode's profile says; empty where the call cannot be told from others."""
    subject = described(call)
    if subject is None:
        return {}
    budget = call.settings.memory_budget_mb
    return {mode: resolve_function(subject.with_mode(mode), budget) for mode in MODES}


def report(call: Call, answers: dict[Mode, FunctionResolution], used: Any) -> None:
    """Warns, once per call, of what was missed or may no longer hold, and records the misses.

    Both modes are recorded, to be measured: which one will run is not known while JAX traces.
    """
    if not answers or (agree.several_processes() and not agree.is_first()):
        return
    for answer in answers.values():
        if answer.stale:
            text = f'chunk_size="auto" uses a profile of {answer.source} that may no longer hold: '
            cure = f"{'; '.join(answer.stale)}. To measure again: {answer.workload.tune_command}"
            warn_once(StaleWarning, answer.workload, text + cure)
        if answer.over_budget:
            text = f'chunk_size="auto" uses {used} for {answer.workload.key}: '
            warn_once(BudgetWarning, answer.workload, text + answer.reason)
    missed = [one for one in answers.values() if one.match != "exact" or one.stale]
    if any(one.workload.mode == "training" for one in missed) and not has_gradients(call):
        missed = [one for one in missed if one.workload.mode == "forward"]
    if not missed:
        return
    subject = missed[0].workload
    how = _remember(call, missed)
    if all(one.match == "default" for one in answers.values()):
        text = f'chunk_size="auto" found no profile for {subject.key} and uses {used}. '
        warn_once(MissWarning, subject.with_mode("forward"), text + how)


def _remember(call: Call, missed: list[FunctionResolution]) -> str:
    """Records misses and their program; returns in words how to tune them."""
    store = ProfileStore(settings.current().store, briefly=True)
    subject = missed[0].workload
    with contextlib.suppress(StoreError):
        known = store.missed_functions(missed[0].device)
        for one in missed:
            if one.workload not in known:
                store.record_miss(one.device, one.workload)
    why_not = _keep_program(call, subject, programs.Programs(store.path))
    if why_not:
        return f"It left no program that could be measured ({why_not}); {_EXPLAIN}"
    return f"To tune it on this machine: {subject.tune_command}"


def _keep_program(call: Call, subject: FunctionCall, kept: programs.Programs) -> str:
    """Leaves the program beside the store; returns in words why not, or nothing."""
    if not programs.wanted():
        return f"{programs.VARIABLE} says so"
    if kept.has(subject):
        return ""
    try:
        header, program = exported(call)
        kept.put(subject, header, program)
    except Exception as error:  # whatever a user's function, traced with symbolic sizes, raises
        return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
    return ""
