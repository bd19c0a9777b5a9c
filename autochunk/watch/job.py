"""What a job's process does: it reads what to do, does it, and prints what comes of it.

Its first line of input is the job, as JSON. It ends when the input does, as when the service is
killed, or by SIGTERM; what is measured by then is kept. Each line that it prints is JSON, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from autochunk.errors import AutochunkError, AutochunkWarning
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.events import Ending, Event, Failed, Finished
from autochunk.tuner.process import weigh_session
from autochunk.workload import Workload

_NICE = 19  # whoever comes has the cores at once


def main() -> None:
    """The process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    weigh_session(os.getpid())
    warnings.simplefilter("ignore", AutochunkWarning)
    try:
        job = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_input, daemon=True).start()
        for result in _do(job):
            print(json.dumps(result), flush=True)
    except AutochunkError as error:
        print(json.dumps({"result": "failed", "detail": str(error)}), flush=True)
    except KeyboardInterrupt:
        print(json.dumps({"result": "stopped"}), flush=True)


def _end_with_input() -> None:
    while sys.stdin.readline():
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _do(job: dict[str, Any]) -> list[dict[str, Any]]:
    store = ProfileStore(Path(job["store"]))
    if job["kind"] == "verify":
        return [_verify(job, store)]
    if job["kind"] == "functions":
        return _functions(job, store)
    return _tune(job, store)


def _tune(job: dict[str, Any], store: ProfileStore) -> list[dict[str, Any]]:
    from autochunk.tuner.tune import tune

    told: list[Event] = []
    drifted = job["kind"] == "drifted"
    tune(
        [Workload.parse(job["workload"])],
        effort=job["effort"],
        force=drifted,
        store=store,
        memory_budget_mb=job["memory_budget_mb"],
        on_event=told.append,
        worker_command=job["worker"],
        storage=None if drifted else job["storage"],
    )
    endings = [event for event in told if isinstance(event, Ending)]
    return [_told(event) for event in endings[-1:]]


def _told(event: Ending) -> dict[str, Any]:
    if isinstance(event, Failed):
        return {"result": "failed", "detail": event.detail}
    profile = getattr(event, "profile", None)
    if isinstance(event, Finished) and event.profile.complete:
        return {"result": "measured", "detail": _choice(event.profile)}
    if profile is not None and profile.complete:
        return {"result": "measured", "detail": "it was there already"}
    return {"result": "unfinished", "detail": "out of time; it is gone on with later"}


def _choice(profile: Profile) -> str:
    choice = profile.choose()
    return str(choice.plan) if choice else "no plan could be measured"


def _functions(job: dict[str, Any], store: ProfileStore) -> list[dict[str, Any]]:
    from autochunk.tuner.functions.tune import Limits, tune_missed

    limit = EFFORT_SETTINGS[job["effort"]].timeout
    deadline = None if limit is None else time.monotonic() + limit
    lines: list[str] = []
    found = tune_missed(
        store, Limits(job["effort"], deadline, job["memory_budget_mb"]), lines.append
    )
    if not found.profiles:
        return [{"result": "failed", "detail": "; ".join(lines[-3:]) or "nothing was measured"}]
    return [{"result": "measured", "detail": f"{len(found.profiles)} functions"}]


def _verify(job: dict[str, Any], store: ProfileStore) -> dict[str, Any]:
    from autochunk.tuner.verify import verify

    key = job["workload"]
    profile = next((one for one in store.profiles() if one.key == (job["device"], key)), None)
    if profile is None:
        return {"result": "failed", "detail": "the profile is gone"}
    found = verify(profile, worker_command=job["worker"])
    if found.failure:
        return {"result": "failed", "detail": found.failure}
    change = f"{found.plan} is {found.change.middle:+.1%} slower than it was"
    return {"result": "drifted" if found.drifted else "verified", "detail": change}


if __name__ == "__main__":
    main()
