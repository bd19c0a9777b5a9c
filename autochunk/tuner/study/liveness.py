"""Who is alive: whether the worker of a trial is still at it.

A worker at work on a trial writes the time to it every few seconds. One whose process is gone, or
that was silent too long, is taken for dead: its trial fails and its plan is free again. Machines
that share a storage should agree about the time to within seconds.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

from optuna.trial import FrozenTrial, Trial

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""A worker that has not written for so long is taken for dead."""

_SIGNING_SECONDS = 1.0  # between a claim and the name on it


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


def sign(trial: Trial) -> None:
    """Writes this worker's name to a trial, and the time."""
    trial.set_user_attr("worker", worker_name())
    trial.set_user_attr("alive", time.time())


def keep_signed(trial: Trial, finished: threading.Event) -> None:
    """Writes the time to a trial again and again until it is finished."""
    while not finished.wait(BEAT_SECONDS):
        # The next beat may get through, and whatever else fails is told by who does it.
        with contextlib.suppress(Exception):
            trial.set_user_attr("alive", time.time())


def is_signed(trial: FrozenTrial) -> bool:
    """Whether it is known who is at work on a trial."""
    return "worker" in trial.user_attrs


def alive(trial: FrozenTrial, since: float = 0.0) -> bool:
    """Whether somebody is at work on a running trial.

    Silence counts from ``since`` on, by ``time.time()``: before it nobody could write.
    """
    here, _, process = str(trial.user_attrs.get("worker", "")).rpartition(" ")
    if here == worker_name().rpartition(" ")[0] and not _process_exists(int(process)):
        return False
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    # A worker signs what it claims at once. One that has not was killed in between, or, if it is
    # only slow, finds its claim gone and makes another.
    longest = SILENT_SECONDS if here else _SIGNING_SECONDS
    heard = max(since, float(trial.user_attrs.get("alive", started)))
    # A time to come is as far from now as one gone by: nobody is waited for until it is there.
    return abs(time.time() - heard) < longest


def _process_exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
