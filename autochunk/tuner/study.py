"""Studies.

Which plans of a workload are measured, and by whom. Kept by Optuna, whose only importer this is.

A study is one workload on one kind of device, with one effort; a trial is one plan. In a journal
file of its own a study survives an interruption. In a storage that several machines share
(PostgreSQL, or a journal file on a shared folder) they work on it together: a worker claims a plan
by taking its trial from the queue, which the storage lets happen once. Two workers may queue the
same plan at the same time; then the trial with the higher number is given up.

A worker at work on a trial writes the time to it every few seconds. One whose process is gone, or
that was silent too long, is taken for dead: its trial fails and its plan is free again. Machines
that share a storage should agree about the time to within seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from autochunk.device import Device
from autochunk.errors import StorageError
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import Plan
from autochunk.store.merge import rank
from autochunk.store.profile import Effort, Measurement, Profile
from autochunk.tuner.probe import wire
from autochunk.workload import Workload

logging.getLogger("optuna").setLevel(logging.ERROR)
# known: a plan may have more rounds than the best had time for
for _text in ("WilcoxonPruner", "The value of `grace_period` might be too small"):
    warnings.filterwarnings("ignore", _text)

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""A worker that has not written for so long is taken for dead."""

_SIGNING_SECONDS = 1.0  # between a claim and the name on it
_ATTEMPTS = 10  # at opening a database
# a killed process leaves its lock behind; nobody holds one for longer than it takes to append a
# line
_LOCK_SECONDS = 2

_JOINT = "joint rounds"
_LARGEST_LIMIT = 1e12
_LIVING = (TrialState.WAITING, TrialState.RUNNING)
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Storage:
    """Where studies are kept.

    Args:
      place: a database's URL as SQLAlchemy reads it (``postgresql://user:password@host/name``), or
        the path of a journal file.
      make: whether a journal file that is not there is made.

    Raises:
      StorageError: it cannot be reached, or is not there and not to be made.
    """

    def __init__(self, place: str | os.PathLike[str], *, make: bool = True) -> None:
        self.place = os.fspath(place)
        if self.place.count("@") > 1 and "://" in self.place:
            raise StorageError(
                "in a storage's URL there is one @, before the host; one in a password is written "
                "%40 (PGPASSWORD needs no such care)"
            )
        if not make and "://" not in self.place and not Path(self.place).exists():
            raise StorageError(
                f"there is no storage {self.place}; name the one that `autochunk tune --storage` "
                "was given"
            )
        try:
            with self.errors():
                self._optuna: BaseStorage = (
                    _open_database(self.place)
                    if "://" in self.place
                    else _open_journal(Path(self.place))
                )
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            # what Optuna makes of a file that it did not write
            raise StorageError(
                f"{_without_password(self.place)} is no storage that `autochunk tune --storage` "
                f"made: {_first_line(error)}"
            ) from error

    def study(self, device: Device, workload: Workload, effort: Effort) -> Study:
        """The study of a workload; made if it is not there."""
        with self.errors():
            return Study(self, self._optuna, study_name(device, workload, effort))

    def profiles(self) -> tuple[list[Profile], int]:
        """Of each device and workload the profile of best effort, and how many studies have none,
        or one that only a newer autochunk can read.
        """
        with self.errors():
            summaries = optuna.get_all_study_summaries(
                storage=self._optuna, include_best_trial=False
            )
        found = [_readable(summary.user_attrs.get("profile")) for summary in summaries]
        best = {
            profile.key: profile
            for profile in sorted(
                filter(None, found), key=lambda profile: rank(profile, "best-effort")
            )
        }
        return list(best.values()), found.count(None)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Makes one error of all that a storage can fail with."""
        try:
            yield
        except (
            SQLAlchemyError,
            optuna.exceptions.StorageInternalError,
            OSError,
            ImportError,
            json.JSONDecodeError,
            UnicodeDecodeError,
        ) as error:
            raise StorageError(
                f"the storage {_without_password(self.place)} cannot be used: {_first_line(error)}"
            ) from error


def _readable(text: str | None) -> Profile | None:
    try:
        return Profile.model_validate_json(text) if text else None
    except ValidationError:
        return None


def study_name(device: Device, workload: Workload, effort: Effort) -> str:
    """What machines must have in common to share a study.

    The device, and the libraries whose programs are timed.
    """
    cudnn = f" cudnn={device.cudnn}" if device.cudnn else ""
    return f"{device.key} jaxlib={device.jaxlib}{cudnn} | {workload.key} | {effort}"


class Study:
    """One workload's trials; made by ``Storage.study``."""

    def __init__(self, storage: Storage, optuna_storage: BaseStorage, name: str) -> None:
        self._storage = storage
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=4)
        # never asked: every trial is queued with its plan
        sampler = optuna.samplers.RandomSampler()
        self._study = optuna.create_study(
            study_name=name,
            storage=optuna_storage,
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )

    @property
    def anchor(self) -> Plan | None:
        """The plan that all others are timed beside; ratios to another one do not compare."""
        with self._storage.errors():
            anchor = self._anchor()
        return Plan(*anchor) if anchor else None

    @anchor.setter
    def anchor(self, plan: Plan) -> None:
        with self._storage.errors():
            self._study.set_user_attr("anchor", wire(plan))

    @property
    def profile(self) -> Profile | None:
        """What became of the study, once it is finished."""
        with self._storage.errors():
            text = self._study.user_attrs.get("profile")
        profile = _readable(text)
        if text and profile is None:
            raise StorageError(
                f"the profile of {self._study.study_name} in the storage was written by a newer "
                "autochunk; upgrade this one"
            )
        return profile

    @profile.setter
    def profile(self, profile: Profile) -> None:
        with self._storage.errors():
            self._study.set_user_attr("profile", profile.model_dump_json())

    def measured(self) -> dict[Plan, Measurement]:
        """What was measured beside the present anchor, by whomever; joint rounds included."""
        with self._storage.errors():
            trials, anchor = self._trials(), self._anchor()
        found: dict[Plan, Measurement] = {}
        counting = [trial for trial in trials if _counts(trial, anchor)]
        for trial in sorted(counting, key=lambda trial: trial.user_attrs.get("subject") == _JOINT):
            for text in trial.user_attrs.get("measurements", ()):
                measurement = Measurement.model_validate_json(text)
                found[measurement.plan] = measurement
        return found

    def workers(self) -> int:
        """How many plans are being measured at this moment by living workers.

        One that is queued does not count: whoever claims next takes it.
        """
        with self._storage.errors():
            self._free_the_dead()
            return sum(trial.state == TrialState.RUNNING for trial in self._trials())

    def claim(self, plans: Sequence[Plan]) -> Claim | None:
        """The first plan that nobody has measured or is measuring; None if there is none."""
        return self._claim({str(plan): plan for plan in plans})

    def claim_joint_rounds(self) -> Claim | None:
        """The right to time the best plans together; None if somebody has it or has done it."""
        return self._claim({_JOINT: None})

    def _claim(self, wanted: dict[str, Plan | None]) -> Claim | None:
        with self._storage.errors():
            while True:
                self._free_the_dead()
                trials, anchor = self._trials(), self._anchor()
                taken = {
                    trial.user_attrs.get("subject")
                    for trial in trials
                    if trial.state in _LIVING or _counts(trial, anchor)
                }
                free = [subject for subject in wanted if subject not in taken]
                if not any(trial.state == TrialState.WAITING for trial in trials):
                    if not free:
                        return None
                    self._queue(free[0], wanted[free[0]])
                trial = self._study.ask()
                subject = trial.user_attrs.get("subject")
                # Without a subject it is a new trial: another worker took the one that was queued.
                if subject in wanted and not self._is_second(trial, subject):
                    # taken for dead already
                    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                        return Claim(self._storage, self._study, trial, wanted[subject])
                _tell(self._study, trial.number, TrialState.FAIL)

    def _queue(self, subject: str, plan: Plan | None) -> None:
        self._study.enqueue_trial(
            {} if plan is None else _parameters(plan), user_attrs={"subject": subject}
        )

    def _is_second(self, mine: optuna.Trial, subject: str) -> bool:
        others = [
            trial
            for trial in self._trials()
            if trial.user_attrs.get("subject") == subject and trial.number != mine.number
        ]
        anchor = self._anchor()
        return any(
            _counts(trial, anchor) or (trial.state in _LIVING and trial.number < mine.number)
            for trial in others
        )

    def _anchor(self) -> Any:
        return self._study.user_attrs.get("anchor")

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _free_the_dead(self) -> None:
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not _alive(trial):
                _tell(self._study, trial.number, TrialState.FAIL)


def _counts(trial: FrozenTrial, anchor: Any) -> bool:
    """Whether a trial has measured what need not be measured again.

    Without times, or beside the present anchor.
    """
    found = trial.user_attrs
    return trial.state in _FINISHED and (not found.get("timed") or found.get("anchor") == anchor)


class Claim:
    """The right to measure a plan, or (``plan`` is None) to hold the joint rounds.

    A context: left without ``done``, others may claim it again.
    """

    def __init__(
        self, storage: Storage, study: optuna.Study, trial: optuna.Trial, plan: Plan | None
    ) -> None:
        self.plan = plan
        self._storage, self._study, self._trial = storage, study, trial
        self._finished = threading.Event()
        self._mark()
        self._beat = threading.Thread(target=self._keep_marking, daemon=True)

    def __enter__(self) -> Claim:
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished.is_set():
            self._finish(TrialState.FAIL)
        self._beat.join()

    def report(self, ratio: float, step: int) -> None:
        """Tells the pruner of a round."""
        with (
            self._storage.errors(),
            contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError),
        ):
            self._trial.report(ratio, step)

    def hopeless(self) -> bool:
        """Whether the plan is probably slower than the best so far, by Wilcoxon's signed-rank test
        over the rounds.
        """
        with self._storage.errors():
            return self._trial.should_prune()

    def done(self, measurements: Sequence[Measurement], anchor: Plan | None) -> None:
        """Hands in what was measured beside ``anchor``.

        A worker that was taken for dead meanwhile hands in nothing: another has the plan.
        """
        with (
            self._storage.errors(),
            contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError),
        ):
            self._trial.set_user_attr("anchor", wire(anchor) if anchor else None)
            self._trial.set_user_attr(
                "timed", any(measurement.timed for measurement in measurements)
            )
            self._trial.set_user_attr(
                "measurements", [measurement.model_dump_json() for measurement in measurements]
            )
            if self.plan is not None and measurements[0].timed:
                self._suggest(self.plan)
                self._finish(TrialState.COMPLETE, measurements[0].ratio)
                return
        self._finish(TrialState.PRUNED)

    def _suggest(self, plan: Plan) -> None:
        """Makes the plan the trial's parameters, which Optuna's own tools show."""
        self._trial.suggest_categorical("implementation", list(IMPLEMENTATIONS))
        if plan.max_chunk_size_mb is not None:
            self._trial.suggest_float(_limit_of(plan), 0.0, _LARGEST_LIMIT)

    def _finish(self, state: TrialState, value: float | None = None) -> None:
        self._finished.set()
        with self._storage.errors():
            _tell(self._study, self._trial.number, state, value)

    def _mark(self) -> None:
        self._trial.set_user_attr("worker", worker_name())
        self._trial.set_user_attr("alive", time.time())

    def _keep_marking(self) -> None:
        while not self._finished.wait(BEAT_SECONDS):
            # the next beat may get through
            with contextlib.suppress(optuna.exceptions.OptunaError, SQLAlchemyError, OSError):
                self._trial.set_user_attr("alive", time.time())


def _tell(study: optuna.Study, number: int, state: TrialState, value: float | None = None) -> None:
    """Ends a trial, unless another worker did."""
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
        study.tell(number, value, state=state, skip_if_finished=True)


def _parameters(plan: Plan) -> dict[str, Any]:
    """What the plan is in Optuna's space.

    An implementation, and one for slices has a limit of its own.
    """
    limit = {} if plan.max_chunk_size_mb is None else {_limit_of(plan): plan.max_chunk_size_mb}
    return {"implementation": plan.implementation, **limit}


def _limit_of(plan: Plan) -> str:
    return f"{plan.implementation}.max_chunk_size_mb"


# --- Who is alive ---------------------------------------------------------------------------------


def worker_name() -> str:
    """Machine, namespace of process numbers, process.

    Equal only for one process of one machine or container.
    """
    return f"{socket.gethostname()} {_boot()} {_process_namespace()} {os.getpid()}"


def _boot() -> str:
    """What tells machines of one name apart; no two starts of a system have the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "?"


def _process_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "?"


def _alive(trial: FrozenTrial) -> bool:
    here, _, process = str(trial.user_attrs.get("worker", "")).rpartition(" ")
    if here == worker_name().rpartition(" ")[0] and not _process_exists(int(process)):
        return False
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    # A worker signs what it claims at once: it was killed in between, or, if it is only slow, finds
    # its claim gone and makes another.
    return time.time() - float(trial.user_attrs.get("alive", started)) < (
        SILENT_SECONDS if here else _SIGNING_SECONDS
    )


def _process_exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --- Opening --------------------------------------------------------------------------------------


def open_private(journal: Path) -> Storage:
    """The storage in a journal of this machine's own.

    What a crash left torn is cut off; what cannot be read is thrown away: it saves work, no more.
    """
    with contextlib.suppress(FileNotFoundError):
        lock = JournalFileOpenLock(str(journal), grace_period=_LOCK_SECONDS)
        lock.acquire()
        try:
            with journal.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        finally:
            lock.release()
    try:
        return Storage(journal)
    except StorageError:
        journal.unlink(missing_ok=True)
        return Storage(journal)


def _open_journal(journal: Path) -> JournalStorage:
    journal.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(
        JournalFileBackend(
            str(journal), lock_obj=JournalFileOpenLock(str(journal), grace_period=_LOCK_SECONDS)
        )
    )


def _open_database(url: str) -> RDBStorage:
    # SQLAlchemy's default for PostgreSQL is psycopg2; psycopg is its successor.
    for scheme in ("postgresql://", "postgres://"):
        url = url.replace(scheme, "postgresql+psycopg://", 1) if url.startswith(scheme) else url
    for _ in range(_ATTEMPTS):
        # Workers that start together make the tables of a new database at the same time.
        with contextlib.suppress(IntegrityError, ProgrammingError):
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        time.sleep(0.5)
    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})


def _without_password(place: str) -> str:
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", place)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
