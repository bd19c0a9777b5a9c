"""A study and its trials: which plans of one workload are measured, and who may measure which.

A worker claims a plan by taking its trial from the queue, which the storage lets happen once. Two
workers may queue the same plan at the same time; then the trial with the higher number is given up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from autochunk.errors import StorageError
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import BYTES_PER_MB, Plan
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.tuner.study.failures import one_error
from autochunk.tuner.study.liveness import alive, is_signed, keep_signed, sign

_JOINT = "joint rounds"
# What limits in MB are mostly between; Optuna's own tools draw axes as long.
_SMALL_LIMIT, _LARGE_LIMIT = 1e-3, 1e5
_VALUE = "time over that of the anchor"
_POLL_SECONDS = 0.05
_LIVING = (TrialState.WAITING, TrialState.RUNNING)
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Study:
    """One workload's trials; made by ``Storage.study``."""

    def __init__(self, place: str, storage: BaseStorage, name: str) -> None:
        self._place = place
        self._study = optuna.create_study(
            study_name=name,
            storage=storage,
            # never asked: every trial is queued with its plan
            sampler=optuna.samplers.RandomSampler(),
            pruner=optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=4),
            load_if_exists=True,
        )
        with one_error(place):
            if self._study.metric_names is None:
                self._study.set_metric_names([_VALUE])

    @property
    def anchor(self) -> Plan | None:
        """The plan that all others are timed beside; ratios to another one do not compare."""
        with one_error(self._place):
            anchor = self._anchor()
        return Plan(*anchor) if anchor else None

    @anchor.setter
    def anchor(self, plan: Plan) -> None:
        with one_error(self._place):
            self._study.set_user_attr("anchor", plan.as_data())

    @property
    def profile(self) -> Profile | None:
        """What became of the study, once it is finished."""
        with one_error(self._place):
            text = self._study.user_attrs.get("profile")
        profile = readable(text)
        if text and profile is None:
            raise StorageError(
                f"the profile of {self._study.study_name} in the storage was written by a newer "
                "autochunk; upgrade this one"
            )
        return profile

    @profile.setter
    def profile(self, profile: Profile) -> None:
        with one_error(self._place):
            self._study.set_user_attr("profile", profile.model_dump_json())

    def measured(self) -> dict[Plan, Measurement]:
        """What was measured beside the present anchor, by whomever; joint rounds included."""
        with one_error(self._place):
            trials, anchor = self._trials(), self._anchor()
        counting = [trial for trial in trials if _counts(trial, anchor)]
        counting.sort(key=lambda trial: _subject(trial) == _JOINT)  # which overwrite
        measurements = [
            Measurement.model_validate_json(text)
            for trial in counting
            for text in trial.user_attrs.get("measurements", ())
        ]
        return {measurement.plan: measurement for measurement in measurements}

    def contribute(self, measurements: Sequence[Measurement], anchor: Plan) -> None:
        """Hands in what was measured beside ``anchor`` elsewhere, unless something is there."""
        with one_error(self._place):
            if self._trials():
                return
            self._study.set_user_attr("anchor", anchor.as_data())
            self._study.add_trials([_measured_trial(one, anchor) for one in measurements])

    def workers(self) -> int:
        """How many plans are being measured at this moment by living workers.

        One that is queued does not count: whoever claims next takes it.
        """
        with one_error(self._place):
            self._free_the_dead()
            return sum(trial.state == TrialState.RUNNING for trial in self._trials())

    def claim(self, plans: Sequence[Plan]) -> Claim | None:
        """The first plan that nobody has measured or is measuring; None if there is none."""
        return self._claim({str(plan): plan for plan in plans})

    def claim_joint_rounds(self) -> Claim | None:
        """The right to time the best plans together; None if somebody has it or has done it."""
        return self._claim({_JOINT: None})

    def _claim(self, wanted: dict[str, Plan | None]) -> Claim | None:
        with one_error(self._place):
            while self._queue_one_of(wanted):
                trial = self._study.ask()
                subject = _subject(trial)
                # Without a subject it is a new trial: another worker took the one that was queued.
                if subject in wanted and not self._is_second(trial, subject):
                    # taken for dead already
                    with contextlib.suppress(UpdateFinishedTrialError):
                        return Claim(self._place, self._study, trial, wanted[subject])
                _tell(self._study, trial.number, TrialState.FAIL)
        return None

    def _queue_one_of(self, wanted: dict[str, Plan | None]) -> bool:
        """Sees to it that a trial waits; returns whether one may, or all are taken."""
        self._free_the_dead()
        trials, anchor = self._trials(), self._anchor()
        if any(trial.state == TrialState.WAITING for trial in trials):
            return True
        taken = {
            _subject(trial) for trial in trials if trial.state in _LIVING or _counts(trial, anchor)
        }
        free = next((subject for subject in wanted if subject not in taken), None)
        if free is not None:
            self._queue(free, wanted[free])
        return free is not None

    def _queue(self, subject: str, plan: Plan | None) -> None:
        self._study.enqueue_trial(
            {} if plan is None else _parameters(plan), user_attrs={"subject": subject}
        )

    def _is_second(self, mine: optuna.Trial, subject: str) -> bool:
        anchor = self._anchor()
        return any(
            _counts(trial, anchor) or (trial.state in _LIVING and trial.number < mine.number)
            for trial in self._trials()
            if _subject(trial) == subject and trial.number != mine.number
        )

    def _anchor(self) -> Any:
        return self._study.user_attrs.get("anchor")

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _free_the_dead(self) -> None:
        """Ends the trials of dead workers.

        For a name on those that were claimed a moment ago it waits: who takes them for living
        workers' leaves to others what nobody does.
        """
        while any(alive(trial) and not is_signed(trial) for trial in self._running()):
            time.sleep(_POLL_SECONDS)
        for trial in self._running():
            if not alive(trial):
                _tell(self._study, trial.number, TrialState.FAIL)

    def _running(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def readable(text: str | None) -> Profile | None:
    """The profile that a study keeps; None if it has none, or one of a newer autochunk."""
    try:
        return Profile.model_validate_json(text) if text else None
    except ValidationError:
        return None


def _subject(trial: FrozenTrial | optuna.Trial) -> Any:
    """What a trial is about: a plan's text, or the joint rounds."""
    return trial.user_attrs.get("subject")


def _counts(trial: FrozenTrial, anchor: Any) -> bool:
    """Whether a trial has measured what need not be measured again.

    That is what has no times, or has them beside the present anchor.
    """
    found = trial.user_attrs
    return trial.state in _FINISHED and (not found.get("timed") or found.get("anchor") == anchor)


class Claim:
    """The right to measure a plan, or (``plan`` is None) to hold the joint rounds.

    A context: left without ``done``, others may claim it again.
    """

    def __init__(
        self, place: str, study: optuna.Study, trial: optuna.Trial, plan: Plan | None
    ) -> None:
        self.plan = plan
        self._place, self._study, self._trial = place, study, trial
        self._finished = threading.Event()
        sign(trial)
        self._beat = threading.Thread(target=keep_signed, args=(trial, self._finished), daemon=True)

    def __enter__(self) -> Claim:
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished.is_set():
            self._finish(TrialState.FAIL)
        self._beat.join()

    def report(self, ratio: float, step: int) -> None:
        """Tells the pruner of a round."""
        with one_error(self._place), contextlib.suppress(UpdateFinishedTrialError):
            self._trial.report(ratio, step)

    def hopeless(self) -> bool:
        """Whether the plan is probably slower than the best so far.

        That is by Wilcoxon's signed-rank test over the rounds.
        """
        with one_error(self._place):
            return self._trial.should_prune()

    def done(self, measurements: Sequence[Measurement], anchor: Plan | None) -> None:
        """Hands in what was measured beside ``anchor``.

        A worker that was taken for dead meanwhile hands in nothing: another has the plan.
        """
        with one_error(self._place), contextlib.suppress(UpdateFinishedTrialError):
            self._write(measurements, anchor)
            if self.plan is not None:
                self._suggest(self.plan)
                if measurements[0].timed:
                    self._finish(TrialState.COMPLETE, measurements[0].ratio)
                    return
        self._finish(TrialState.PRUNED)

    def _write(self, measurements: Sequence[Measurement], anchor: Plan | None) -> None:
        for name, value in _notes(measurements, anchor).items():
            self._trial.set_user_attr(name, value)

    def _suggest(self, plan: Plan) -> None:
        """Makes the plan the trial's parameters, which Optuna's own tools show.

        A study that a version with other implementations, or without logarithms, began goes on
        without: Optuna lets none be added.
        """
        with contextlib.suppress(ValueError):
            self._trial.suggest_categorical("implementation", list(IMPLEMENTATIONS))
        if plan.max_chunk_size_mb is not None:
            limits = _limits(plan.max_chunk_size_mb)
            with contextlib.suppress(ValueError):
                self._trial.suggest_float(_limit_of(plan), limits.low, limits.high, log=True)

    def _finish(self, state: TrialState, value: float | None = None) -> None:
        self._finished.set()
        with one_error(self._place):
            _tell(self._study, self._trial.number, state, value)


def _notes(measurements: Sequence[Measurement], anchor: Plan | None) -> dict[str, Any]:
    """What is written to a trial of what was measured."""
    return {
        "anchor": anchor.as_data() if anchor else None,
        "timed": any(measurement.timed for measurement in measurements),
        **(_figures(measurements[0]) if len(measurements) == 1 else {}),
        "measurements": [measurement.model_dump_json() for measurement in measurements],
    }


def _figures(measurement: Measurement) -> dict[str, Any]:
    """What Optuna's own tools can draw of a plan beside its value; nothing here reads it."""
    memory = measurement.temp_bytes
    return {
        "status": measurement.status,
        **({"seconds": measurement.seconds_median} if measurement.timed else {}),
        **({} if memory is None else {"memory_mb": memory / BYTES_PER_MB}),
    }


def _measured_trial(measurement: Measurement, anchor: Plan) -> FrozenTrial:
    """A finished trial of a plan, as if it had been claimed and measured here."""
    plan, timed = measurement.plan, measurement.timed
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if timed else TrialState.PRUNED,
        value=measurement.ratio if timed else None,
        params=_parameters(plan),
        distributions=_distributions(plan),
        user_attrs={"subject": str(plan), **_notes([measurement], anchor)},
        intermediate_values=dict(enumerate(measurement.ratios)),
    )


def _tell(study: optuna.Study, number: int, state: TrialState, value: float | None = None) -> None:
    """Ends a trial, unless another worker did."""
    with contextlib.suppress(UpdateFinishedTrialError, ValueError):
        study.tell(number, value, state=state, skip_if_finished=True)


def _parameters(plan: Plan) -> dict[str, Any]:
    """What the plan is in Optuna's space.

    An implementation; one for slices has a limit of its own.
    """
    limit = {} if plan.max_chunk_size_mb is None else {_limit_of(plan): plan.max_chunk_size_mb}
    return {"implementation": plan.implementation, **limit}


def _distributions(plan: Plan) -> dict[str, BaseDistribution]:
    """What each of a plan's parameters is one of."""
    mb = plan.max_chunk_size_mb
    limit = {} if mb is None else {_limit_of(plan): _limits(mb)}
    return {"implementation": CategoricalDistribution(list(IMPLEMENTATIONS)), **limit}


def _limits(mb: float) -> FloatDistribution:
    """What a limit is one of, on an axis of logarithms."""
    return FloatDistribution(min(mb, _SMALL_LIMIT), max(mb, _LARGE_LIMIT), log=True)


def _limit_of(plan: Plan) -> str:
    return f"{plan.implementation}.max_chunk_size_mb"
