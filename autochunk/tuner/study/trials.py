"""A study and its trials: which plans of one workload are measured, and who may measure which.

A worker claims a plan by taking its trial from the queue, which the storage lets happen once. Two
workers may queue the same plan at the same time; then the trial with the higher number is given up.

What a worker is about to run is written to its trial first. Where that ends the worker itself, as a
kernel does that kills the whole container for its memory, the next one finds it there. Plans that
did so come last, and are given up in the end.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from autochunk.errors import StorageError
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import Plan
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.tuner.study.failures import Patience, one_error
from autochunk.tuner.study.liveness import alive, is_signed, keep_signed, sign
from autochunk.tuner.study.shown import distributions, figures, limit_of, limits_around, parameters

JOINT = "joint rounds"
LOADING = "loading"
"""What a worker runs that is no plan, as its trial calls it."""
MOST_DEATHS = 2
"""So many workers may die of a plan before it is given up: one death may have been chance."""

_VALUE = "time over that of the anchor"
_POLL_SECONDS = 0.05
_LIVING = (TrialState.WAITING, TrialState.RUNNING)
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Study:
    """One workload's trials; made by ``Storage.study``."""

    def __init__(
        self, place: str, storage: BaseStorage, name: str, patience: Patience | None = None
    ) -> None:
        self._place = place
        self._patience = patience or Patience(0.0)
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
            raise self._newer("the profile")
        return profile

    @profile.setter
    def profile(self, profile: Profile) -> None:
        with one_error(self._place):
            self._study.set_user_attr("profile", profile.model_dump_json())

    def attribute(self, name: str) -> Any:
        """What is noted of the whole study under a name; None if nothing is."""
        return self._study.user_attrs.get(name)

    def set_attribute(self, name: str, value: Any) -> None:
        """Notes something of the whole study."""
        self._study.set_user_attr(name, value)

    def measured(self) -> dict[Plan, Measurement]:
        """What was measured beside the present anchor, by whomever; joint rounds included."""
        with one_error(self._place):
            trials, anchor = self._trials(), self._anchor()
            counting = [trial for trial in trials if _counts(trial, anchor)]
            counting.sort(key=lambda trial: _subject(trial) == JOINT)  # which overwrite
            texts = [
                text for trial in counting for text in trial.user_attrs.get("measurements", ())
            ]
        try:
            measurements = [Measurement.model_validate_json(text) for text in texts]
        except ValidationError as error:  # to leave it out would be to wait for it
            raise self._newer("a measurement") from error
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

    def deaths(self) -> Counter[str]:
        """How many workers died while they ran what, by a plan's text, ``LOADING`` or ``JOINT``."""
        with one_error(self._place):
            return _deaths(self._trials())

    def claim(self, plans: Sequence[Plan]) -> Claim | None:
        """The first plan that nobody has measured or is measuring; None if there is none.

        Those come last that workers died of.
        """
        return self._claim({str(plan): plan for plan in plans})

    def claim_joint_rounds(self) -> Claim | None:
        """The right to time the best plans together; None if somebody has it or has done it."""
        return self._claim({JOINT: None})

    def _claim(self, wanted: dict[str, Plan | None]) -> Claim | None:
        with one_error(self._place):
            while self._queue_one_of(wanted):
                trial = self._study.ask()
                subject = _subject(trial)
                # Without a subject it is a new trial: another worker took the one that was queued.
                if subject in wanted and not self._is_second(trial, subject):
                    # taken for dead already
                    with contextlib.suppress(UpdateFinishedTrialError):
                        deaths = _deaths(self._trials())[subject]
                        return Claim(self._place, self._study, trial, wanted[subject], deaths)
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
        deaths = _deaths(trials)
        left = (subject for subject in wanted if subject not in taken)
        free = min(left, key=lambda subject: deaths[subject], default=None)
        if free is not None:
            self._queue(free, wanted[free])
        return free is not None

    def _queue(self, subject: str, plan: Plan | None) -> None:
        self._study.enqueue_trial(
            {} if plan is None else parameters(plan), user_attrs={"subject": subject}
        )

    def _is_second(self, mine: optuna.Trial, subject: str) -> bool:
        anchor = self._anchor()
        return any(
            _counts(trial, anchor) or (trial.state in _LIVING and trial.number < mine.number)
            for trial in self._trials()
            if _subject(trial) == subject and trial.number != mine.number
        )

    def _newer(self, what: str) -> StorageError:
        return StorageError(
            f"{what} of {self._study.study_name} in the storage was written by a newer autochunk; "
            "upgrade this one"
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
        while any(self._alive(trial) and not is_signed(trial) for trial in self._running()):
            time.sleep(_POLL_SECONDS)
        for trial in self._running():
            if not self._alive(trial):
                _tell(self._study, trial.number, TrialState.FAIL)

    def _alive(self, trial: FrozenTrial) -> bool:
        # While the storage was away nobody could write to it.
        return alive(trial, self._patience.returned)

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


def _deaths(trials: Iterable[FrozenTrial]) -> Counter[str]:
    """How many trials ended because their worker died, by what it ran then."""
    failed = (trial.user_attrs for trial in trials if trial.state == TrialState.FAIL)
    return Counter(str(found["running"]) for found in failed if found.get("running"))


def _counts(trial: FrozenTrial, anchor: Any) -> bool:
    """Whether a trial has measured what need not be measured again.

    That is what has no times, or has them beside the present anchor.
    """
    found = trial.user_attrs
    return trial.state in _FINISHED and (not found.get("timed") or found.get("anchor") == anchor)


class Claim:
    """The right to measure a plan, or (``plan`` is None) to hold the joint rounds.

    A context: left without ``done``, others may claim it again.

    Attributes:
      deaths: how many workers died of it before.
    """

    def __init__(
        self,
        place: str,
        study: optuna.Study,
        trial: optuna.Trial,
        plan: Plan | None,
        deaths: int,
    ) -> None:
        self.plan = plan
        self.deaths = deaths
        self._running = ""
        self._place, self._study, self._trial = place, study, trial
        self._finished = threading.Event()
        sign(trial)
        self._beat = threading.Thread(target=keep_signed, args=(trial, self._finished), daemon=True)

    def __enter__(self) -> Claim:
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished.is_set():
            self.runs("")
            self._finish(TrialState.FAIL)
        self._beat.join()

    def runs(self, what: str) -> None:
        """Notes what is run from now on: a plan's text, ``LOADING``, ``JOINT``, or "" for nothing.

        A worker that dies leaves it behind.
        """
        if what != self._running:
            with one_error(self._place), contextlib.suppress(UpdateFinishedTrialError):
                self._trial.set_user_attr("running", what)
            self._running = what

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
            limits = limits_around(plan.max_chunk_size_mb)
            with contextlib.suppress(ValueError):
                self._trial.suggest_float(limit_of(plan), limits.low, limits.high, log=True)

    def _finish(self, state: TrialState, value: float | None = None) -> None:
        self._finished.set()
        with one_error(self._place):
            _tell(self._study, self._trial.number, state, value)


def _notes(measurements: Sequence[Measurement], anchor: Plan | None) -> dict[str, Any]:
    """What is written to a trial of what was measured."""
    return {
        "anchor": anchor.as_data() if anchor else None,
        "timed": any(measurement.timed for measurement in measurements),
        **(figures(measurements[0]) if len(measurements) == 1 else {}),
        "measurements": [measurement.model_dump_json() for measurement in measurements],
    }


def _measured_trial(measurement: Measurement, anchor: Plan) -> FrozenTrial:
    """A finished trial of a plan, as if it had been claimed and measured here."""
    plan, timed = measurement.plan, measurement.timed
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if timed else TrialState.PRUNED,
        value=measurement.ratio if timed else None,
        params=parameters(plan),
        distributions=distributions(plan),
        user_attrs={"subject": str(plan), **_notes([measurement], anchor)},
        intermediate_values=dict(enumerate(measurement.ratios)),
    )


def _tell(study: optuna.Study, number: int, state: TrialState, value: float | None = None) -> None:
    """Ends a trial, unless another worker did."""
    with contextlib.suppress(UpdateFinishedTrialError, ValueError):
        study.tell(number, value, state=state, skip_if_finished=True)
