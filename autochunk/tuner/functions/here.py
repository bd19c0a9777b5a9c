"""``tune_chunks``: a function measured in the process that has it, with its own arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autochunk.chunks.call import Call
from autochunk.chunks.chunked import call_of
from autochunk.chunks.describe import described
from autochunk.chunks.memory import products, rounding
from autochunk.errors import ArgumentError, ProbeError
from autochunk.functions import FunctionCall
from autochunk.plan import BYTES_PER_MB, check_positive
from autochunk.store.profile import EFFORTS, Effort, Profile
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.functions.subject import Function, Subject
from autochunk.tuner.functions.tune import Say, measured
from autochunk.tuner.functions.worker import Session
from autochunk.tuner.probe import OutOfTime, Probe, seconds_left
from autochunk.tuner.process import WorkerFailure
from autochunk.workload import MODES, Mode


def tune_chunks(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    modes: Sequence[Mode] = MODES,
    effort: Effort = "standard",
    timeout: float | None = None,
    memory_budget_mb: float | None = None,
    store: ProfileStore | None = None,
    on_line: Say = lambda _: None,
) -> list[Profile]:
    """Measures a function that ``autochunk.chunked`` made, here and now, and stores a profile.

    For what leaves no program when it is missed, as a function that calls back to the host does,
    or where the values of its arguments matter to its time. It is called with ``args`` in this
    process: a plan that takes the process down, takes it all. Do not call it while JAX traces.

    Args:
      fn: what ``chunked`` returned.
      args: its arguments, whole.
      kwargs: those by name.
      modes: "forward", "training" (its gradients, too), or both.
      effort: "quick", "standard" or "thorough": how hard to look.
      timeout: seconds for all of it; None is the effort's own limit.
      memory_budget_mb: most working memory that a measurement may take (10^6 bytes); None is most
        of what is free.
      store: where profiles go; None is the user's store.
      on_line: told of progress, in lines of text.

    Returns:
      A profile for each mode that could be measured.

    Raises:
      ArgumentError: ``fn`` is not of ``chunked``, it does not take the arguments, or a setting is
        not usable.
      StoreError: the store cannot be written; found out before anything is measured.
      ProbeError: nothing could be measured.

    Example:
      >>> import jax.numpy as jnp
      >>> import autochunk
      >>> apply = autochunk.chunked(jnp.tanh, name="tanh")
      >>> profiles = autochunk.tune_chunks(
      ...     apply, (jnp.ones((64, 4)),), modes=["forward"], effort="quick", timeout=60
      ... )
      >>> [profile.function.name for profile in profiles]
      ['tanh']
    """
    if effort not in EFFORTS:
        raise ArgumentError(f"effort must be one of {', '.join(EFFORTS)}; got {effort!r}")
    if not modes or not set(modes) <= set(MODES):
        raise ArgumentError(f"modes must be some of {', '.join(MODES)}; got {modes!r}")
    check_positive("timeout", timeout, "seconds")
    check_positive("memory_budget_mb", memory_budget_mb, "MB")
    call = call_of(fn, args, dict(kwargs or {}))
    subject = described(call)
    if subject is None:
        raise ArgumentError(f"{call.settings.name} has symbolic sizes, which cannot be measured")
    store = store or ProfileStore()
    store.check_writable()
    limit = timeout if timeout is not None else EFFORT_SETTINGS[effort].timeout
    deadline = None if limit is None else time.monotonic() + limit
    budget = None if memory_budget_mb is None else int(memory_budget_mb * BYTES_PER_MB)
    found, failures = [], []
    for number, mode in enumerate(modes):
        probe = _HereProbe(call, budget, deadline)
        share = seconds_left(deadline) / (len(modes) - number)
        how = probe.connect(), effort
        profile, told = measured(subject.with_mode(mode), probe, *how, seconds=share)
        on_line(f"{subject.shape} {mode}: {told}")
        if profile is None:
            failures.append(f"{mode}: {told}")
        else:
            store.put(profile)
            found.append(profile)
    if not found:
        raise ProbeError(f"nothing of {call.settings.name} could be measured: {failures}")
    return found


class _HereSession(Session):
    """Answers requests about a call of this process."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def _configure(self, call: FunctionCall, programs: str) -> None:
        """The process keeps its own settings."""

    def _make(self, call: FunctionCall) -> Subject:
        one = self._call
        axes = one.lengths, one.inputs, one.outputs
        jaxpr = one.traced.jaxpr
        found = rounding(jaxpr), sorted(products(jaxpr))
        function = Function(one.flat, *axes, one.reduction, one.whole, *found)
        return Subject(function, one.arrays, call.mode)


class _HereProbe(Probe):
    """A probe whose worker is this process."""

    def __init__(self, call: Call, budget_bytes: int | None, deadline: float | None) -> None:
        super().__init__((), memory_budget_bytes=budget_bytes)
        self.deadline = deadline
        self._session = _HereSession(call)

    def _start(self) -> None:
        self._ready = {}
        try:
            self._greet()
        except WorkerFailure as failure:
            raise ProbeError(f"cannot measure {self.workload}: {failure.detail}") from failure

    def connect(self) -> Any:
        """Says what device there is; nothing has to be started."""
        if self.device is None:
            self._greet()
        return self.device

    def _ask(self, action: str, *, within: float | None = None, **request: Any) -> dict[str, Any]:
        del within  # nobody could end what takes longer
        if seconds_left(self.deadline) <= 0:
            raise OutOfTime
        try:
            answer: dict[str, Any] = getattr(self._session, action)(**request)
        except Exception as error:  # as a worker answers it
            detail = f"{type(error).__name__}: {error}"[:2000]
            raise WorkerFailure("crashed", detail) from error
        return answer | {"ok": True}
