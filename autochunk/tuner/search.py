"""The search over one workload's plans, by Optuna.

One trial is one plan. The space is small and discrete, so it is searched exhaustively, the likely best first; what makes it quick is giving up early. Every
round times the plan beside one fixed plan, the anchor, in alternating order: drift of the machine hits both alike, and the ratios of different trials
compare. A plan that is clearly hopeless goes after a round or two, one that is probably worse by Wilcoxon's signed-rank test over the paired rounds (Optuna's
``WilcoxonPruner``). Those that are left and close meet once more in joint rounds.

The study lives in a journal file until the workload is done: an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from autochunk.plan import LogitsShape, Plan, candidate_plans, same_slices
from autochunk.store.profile import CUDNN, DEFAULT, DENSE, LARGEST_NOISE, Measurement, logits_shape
from autochunk.tuner.probe import OutOfTime, Prepared, Probe, WorkerFailure
from autochunk.workload import Workload

logging.getLogger("optuna").setLevel(logging.ERROR)

# Within this of the best, a plan takes part in the joint rounds.
_CLOSE = 1.08

_NEVER_SLICE = "none"  # Optuna tells parameters by their choices; None among numbers reads badly in its tools


@dataclass(frozen=True)
class Thoroughness:
    """How hard to look.

    Attributes:
      step: ratio between neighbouring limits in MB.
      most_slices: plans with more slices are not tried.
      hopeless: slower than the best by this factor, a plan gets no third round; slower by its square, not even a second.
      least_rounds, rounds: fewest and most rounds for one plan that is not given up.
      seconds: time for the rounds of one plan, beyond the fewest.
      finalists, joint_rounds: how many plans meet in the joint rounds, and how many of those there are.
    """

    step: int
    most_slices: int
    hopeless: float
    least_rounds: int
    rounds: int
    seconds: float
    finalists: int
    joint_rounds: int


THOROUGHNESS = {
    "quick": Thoroughness(step=4, most_slices=64, hopeless=1.2, least_rounds=2, rounds=5, seconds=1.0, finalists=3, joint_rounds=3),
    "standard": Thoroughness(step=2, most_slices=256, hopeless=1.25, least_rounds=3, rounds=10, seconds=4.0, finalists=4, joint_rounds=8),
    "thorough": Thoroughness(step=2, most_slices=1024, hopeless=1.5, least_rounds=4, rounds=20, seconds=10.0, finalists=6, joint_rounds=20),
}


@dataclass(frozen=True)
class Outcome:
    """What a search found: measurements in the order they were made, and whether it looked at everything."""

    measurements: tuple[Measurement, ...]
    complete: bool


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what was measured before it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


def search(probe: Probe, workload: Workload, effort: str, journal: Path, *, hints: Iterable[Plan] = (),
           on_measurement: Callable[[Measurement, int, int], None] = lambda *_: None) -> Outcome:  # fmt: skip
    """Measures a workload's plans until all are, or the probe's deadline comes.

    Args:
      probe: measures; is turned to the workload here.
      workload: what to measure.
      effort: a key of THOROUGHNESS.
      journal: file that keeps the study, for going on after an interruption; the caller removes it when the outcome is stored.
      hints: plans to measure first, such as the best of a similar workload.
      on_measurement: told of each measurement, with how many are done and how many there are.

    Raises:
      ProbeError: no worker can be started, or the workload's arguments do not fit.
      Interrupted: on Ctrl-C.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # A plan may have more rounds than the best one had time for; those are simply not compared.
        warnings.filterwarnings("ignore", "WilcoxonPruner finds steps")
        warnings.filterwarnings("ignore", "The value of `grace_period` might be too small")  # see _open_journal
        running = _Search(probe, workload, THOROUGHNESS[effort], journal, tuple(hints), on_measurement)
        try:
            probe.load(workload)
            running.run()
        except OutOfTime:
            return Outcome(running.measurements(), complete=False)
        except KeyboardInterrupt:
            raise Interrupted(Outcome(running.measurements(), complete=False)) from None
        return Outcome(running.measurements(), complete=True)


def journal_path(folder: Path, device_key: str, workload: Workload, effort: str) -> Path:
    """Where the study of a workload is kept while it is unfinished."""
    name = hashlib.sha256(f"{device_key} | {workload.key} | {effort}".encode()).hexdigest()[:16]
    return folder / f"{name}.journal"


class _Search:
    def __init__(self, probe: Probe, workload: Workload, thoroughness: Thoroughness, journal: Path, hints: tuple[Plan, ...],
                 on_measurement: Callable[[Measurement, int, int], None]) -> None:  # fmt: skip
        self.probe, self.workload, self.thoroughness, self.on_measurement = probe, workload, thoroughness, on_measurement
        self.shape = logits_shape(workload)
        self.plans = _all_plans(self.shape, thoroughness, probe.connect().platform)
        self.first = [*(plan for hint in hints if (plan := _equivalent(hint, self.plans, self.shape))), *_likely(self.plans)]
        storage = _open_journal(journal)
        self.study = optuna.create_study(
            study_name=journal.stem,
            storage=storage,
            sampler=optuna.samplers.BruteForceSampler(seed=0),
            pruner=optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=4),
            load_if_exists=True,
        )
        # BruteForceSampler would end a search that has not begun when it is told of the last plan's failure.
        self._unsampled = optuna.load_study(study_name=journal.stem, storage=storage, sampler=optuna.samplers.RandomSampler())
        self.measured: dict[Plan, Measurement] = {}
        self.anchor: Plan | None = None

    def run(self) -> None:
        self._resume()
        self._find_anchor()
        while waiting := [plan for plan in self.plans if plan not in self.measured]:
            if not self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)) and self._exhausted():
                self._enqueue(waiting[:1])
            self.study.optimize(self._objective, n_trials=1)
        self._joint_rounds()

    def measurements(self) -> tuple[Measurement, ...]:
        return tuple(self.measured.values())

    # Interruption

    def _resume(self) -> None:
        """Takes up what an interrupted search has measured. A trial that was running has measured nothing: its plan is queued again."""
        states = optuna.trial.TrialState
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == states.RUNNING:
                self._unsampled.tell(trial.number, state=states.FAIL)
            elif text := trial.user_attrs.get("measurement"):
                measurement = Measurement.model_validate_json(text)
                self.measured[measurement.plan] = measurement
        anchor = self.study.user_attrs.get("anchor")
        self.anchor = Plan(*anchor) if anchor else None
        self._enqueue(plan for plan in dict.fromkeys(self.first) if plan not in self.measured)

    def _enqueue(self, plans: Iterable[Plan]) -> None:
        for plan in plans:
            name, limit = _parameter(plan.implementation), _NEVER_SLICE if plan.max_chunk_size_mb is None else plan.max_chunk_size_mb
            self.study.enqueue_trial({"implementation": plan.implementation, name: limit}, skip_if_exists=False)

    def _exhausted(self) -> bool:
        """Whether the sampler believes that nothing is left: it counts trials that failed or were interrupted."""
        tried = {tuple(trial.params.values()) for trial in self.study.get_trials(deepcopy=False)}
        return len(tried) >= len(self.plans)

    # One plan

    def _suggest(self, trial: optuna.Trial) -> Plan:
        implementation = trial.suggest_categorical("implementation", list(dict.fromkeys(plan.implementation for plan in self.plans)))
        limits = [plan.max_chunk_size_mb for plan in self.plans if plan.implementation == implementation]
        choices = [_NEVER_SLICE if limit is None else limit for limit in limits]
        limit = trial.suggest_categorical(_parameter(implementation), choices)
        return Plan(implementation, float(limit) if isinstance(limit, float) else None)

    def _objective(self, trial: optuna.Trial) -> float:
        plan = self._suggest(trial)
        if plan in self.measured:
            raise optuna.TrialPruned
        measurement = self._measure(plan, trial)
        self.measured[plan] = measurement
        trial.set_user_attr("measurement", measurement.model_dump_json())
        self.on_measurement(measurement, len(self.measured), len(self.plans))
        trial.set_constraint("fits", -1.0 if measurement.status not in ("oom", "over_budget") else 1.0)
        if not measurement.timed:
            raise optuna.TrialPruned(measurement.status)
        return measurement.ratio

    def _measure(self, plan: Plan, trial: optuna.Trial) -> Measurement:
        prepared = self.probe.prepare(plan)
        if prepared.status != "ok":
            return _measurement(plan, prepared)
        seconds: list[float] = []
        ratios: list[float] = []
        try:
            given_up = self._rounds(plan, trial, seconds, ratios)
            if plan not in (self.anchor, *self._best_plans()):
                self.probe.drop(plan)
        except WorkerFailure as failure:
            return _measurement(plan, prepared, status=failure.status, detail=failure.detail)
        return _measurement(plan, prepared, status="pruned" if given_up else "ok", detail=given_up, seconds=seconds, ratios=ratios)

    def _rounds(self, plan: Plan, trial: optuna.Trial, seconds: list[float], ratios: list[float]) -> str:
        """Times a plan beside the anchor; returns why it was given up, or nothing."""
        start = time.monotonic()
        best = min((m.ratio for m in self.measured.values() if m.status == "ok"), default=1.0)  # the anchor's own ratio is one
        for step in range(self.thoroughness.rounds):
            own, anchor = self._pair(plan, step)
            seconds.append(own)
            ratios.append(own / anchor)
            trial.report(ratios[-1], step)
            slower = statistics.median(ratios) / best if plan != self.anchor else 1.0
            if slower > self.thoroughness.hopeless ** (2 if step == 0 else 1):
                return f"{slower:.1f}x the best plan's time"
            # A plan that is slower by no more than noise may still win by its memory.
            if step >= 3 and slower > 1 + LARGEST_NOISE and trial.should_prune():
                return f"probably slower than the best plan, {slower:.2f}x its time"
            if step + 1 >= self.thoroughness.least_rounds and time.monotonic() - start > self.thoroughness.seconds:
                break
        return ""

    def _pair(self, plan: Plan, step: int) -> tuple[float, float]:
        """(seconds of the plan, seconds of the anchor), in an order that alternates."""
        assert self.anchor is not None
        if step % 2:
            anchor, own = self.probe.time([self.anchor, plan])
        else:
            own, anchor = self.probe.time([plan, self.anchor])
        return own, anchor

    # Comparisons

    def _find_anchor(self) -> None:
        """The first likely plan that runs here; what others are timed beside."""
        if self.anchor is not None and self.probe.prepare(self.anchor).status == "ok":
            return
        self.measured = {plan: m for plan, m in self.measured.items() if not m.timed}  # ratios to another anchor do not compare
        for plan in dict.fromkeys([*_likely(self.plans), *self.plans]):
            if plan != DENSE and plan not in self.measured:
                prepared = self.probe.prepare(plan)
                if prepared.status == "ok":
                    self.anchor = plan
                    self.study.set_user_attr("anchor", [plan.implementation, plan.max_chunk_size_mb])
                    return
                self.measured[plan] = _measurement(plan, prepared)

    def _best_plans(self) -> list[Plan]:
        """The plans that could still win, best first."""
        ranked = sorted((m for m in self.measured.values() if m.status == "ok"), key=lambda m: m.ratio)
        return [m.plan for m in ranked if m.ratio <= _CLOSE * ranked[0].ratio][: self.thoroughness.finalists]

    def _joint_rounds(self) -> None:
        """More rounds for the plans that are close, all in each round."""
        finalists = self._best_plans()
        if len(finalists) < 2 or self.anchor is None:
            return
        everyone = list(dict.fromkeys([self.anchor, *finalists]))
        extra: dict[Plan, list[tuple[float, float]]] = {plan: [] for plan in finalists}
        with contextlib.suppress(WorkerFailure):  # what was measured before stands
            for step in range(self.thoroughness.joint_rounds):
                order = everyone[step % len(everyone) :] + everyone[: step % len(everyone)]
                times = dict(zip(order, self.probe.time(order), strict=True))
                for plan in finalists:
                    # The anchor beside itself would be a ratio of exactly one, and look surer than it is.
                    if plan != self.anchor:
                        extra[plan].append((times[plan], times[plan] / times[self.anchor]))
        for plan, pairs in extra.items():
            old = self.measured[plan]
            update = {"seconds": (*old.seconds, *(p[0] for p in pairs)), "ratios": (*old.ratios, *(p[1] for p in pairs))}
            self.measured[plan] = old.model_copy(update=update)


def _parameter(implementation: str) -> str:
    return f"{implementation}.max_chunk_size_mb"


def _all_plans(shape: LogitsShape, thoroughness: Thoroughness, platform: str) -> list[Plan]:
    """Dense, fused kernels where there may be any, the default limit, and the ladder of limits; plans that come to the same slices once."""
    fused = [CUDNN] if platform == "gpu" else []
    plans = [DENSE, *fused, *candidate_plans(shape, step=thoroughness.step, most_slices=thoroughness.most_slices)]
    return plans if _equivalent(DEFAULT, plans, shape) else [*plans, DEFAULT]


def _equivalent(plan: Plan, plans: list[Plan], shape: LogitsShape) -> Plan | None:
    return next((other for other in plans if same_slices(plan, other, shape)), None)


def _likely(plans: list[Plan]) -> list[Plan]:
    """What to measure first: a fused kernel, which wins by far where there is one; a limit near 32 MB, which often wins and always fits; the baselines."""
    sliced = [plan for plan in plans if plan.implementation == "xla" and plan.max_chunk_size_mb is not None]
    middle = min(sliced, key=lambda plan: abs((plan.max_chunk_size_mb or 0) - 32), default=None)
    unsliced = [plan for plan in plans if plan.max_chunk_size_mb is None]
    fused = [plan for plan in plans if plan == CUDNN]
    others = [plan for plan in unsliced if plan != CUDNN]
    return [*fused, *([middle] if middle else []), *others, *(plan for plan in plans if plan == DEFAULT)]


def _measurement(plan: Plan, prepared: Prepared, **changes: object) -> Measurement:
    fields = {
        "implementation": plan.implementation,
        "max_chunk_size_mb": plan.max_chunk_size_mb,
        "status": prepared.status,
        "detail": prepared.detail[:2000],
        "temp_bytes": prepared.temp_bytes,
        "measured_bytes": prepared.measured_bytes,
        "compile_seconds": prepared.compile_seconds,
        "error": prepared.error,
    }
    return Measurement.model_validate(fields | changes)


def _open_journal(journal: Path) -> JournalStorage:
    journal.parent.mkdir(parents=True, exist_ok=True)
    # A process that was killed leaves its lock behind; nobody holds one for longer than it takes to append a line.
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal), grace_period=2)))
