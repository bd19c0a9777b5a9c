"""A measuring process that does as its script says: dies, hangs, talks nonsense.

A real one does that too rarely. ``python scripted_worker.py SCRIPT``: SCRIPT is JSON, {"plans":
{plan text: act}, "default": act}; an act is {"seconds": x, "first": y, "temp": n, "do": deed}, of
which the first timing takes y times as long, with deed "" (answer well), "die N" (by signal N),
"end-parent" (as a kernel does that kills a whole container), "exit N", "hang", "sleep N" (N
seconds), "take N" (N MB), "babble", "refuse" (answer with an error) or a status to answer with.
"do" may begin with "time:" to happen while timing instead of while preparing, with "once:FILE:" to
happen only until FILE exists, and with "after:FILE:" only then. "log" names a file that every
request is appended to; times scatter by a fraction "jitter"; "ahead" lists the plans that it says
it has compiled.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from autochunk.plan import Plan

NOISE = random.Random(os.getpid())  # another process, other noise
TIMED: set[str] = set()
DEVICE = {"platform": "cpu", "kind": "scripted", "cores": 2, "memory_gib": 8}
DEVICE |= {"jax": "0.12.0", "jaxlib": "0.12.0", "driver": ""}


def perform(deed: str) -> str:
    """Does what the script says; returns what is left to answer."""
    if deed.startswith("once:"):
        _, flag, deed = deed.split(":", 2)
        if Path(flag).exists():
            return ""
        Path(flag).touch()
        return perform(deed)
    if deed.startswith("after:"):
        _, flag, deed = deed.split(":", 2)
        return perform(deed) if Path(flag).exists() else ""
    name, _, argument = deed.partition(" ")
    if name == "die":
        os.kill(os.getpid(), int(argument))
    if name == "end-parent":
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exit":
        print("giving up", file=sys.stderr, flush=True)
        os._exit(int(argument))
    if name == "hang":
        time.sleep(3600)
    if name == "sleep":
        time.sleep(float(argument))
        return ""
    if name == "take":
        _ = bytearray(b"x") * (int(argument) * 10**6)
        return ""
    if name == "babble":
        print("Segmentation fault imminent", flush=True)
        time.sleep(3600)
    return deed


def answer(script: dict[str, Any], request: dict[str, Any], prepared: set[str]) -> dict[str, Any]:
    """The reply to one request; ``prepared`` are the plans that may be timed."""

    def act(plan: list[Any]) -> dict[str, Any]:
        default = script.get("default", {"seconds": 0.01, "temp": 1000})
        found: dict[str, Any] = script.get("plans", {}).get(str(Plan(*plan)), default)
        return found

    def first(plan: list[Any]) -> float:
        if str(plan) in TIMED:
            return 1.0
        TIMED.add(str(plan))
        return float(act(plan).get("first", 1.0))

    if request["do"] == "hello":
        return {"device": script.get("device", DEVICE)}
    if request["do"] == "load":
        perform(script.get("load", ""))
        ahead = [one for one in request["ahead"] if str(Plan(*one)) in script.get("ahead", [])]
        return {"available_bytes": 10**9 - 1000, "ahead": ahead}
    if request["do"] == "prepare":
        chosen = act(request["plan"])
        deed = chosen.get("do", "")
        status = "" if deed.startswith("time:") else perform(deed)
        if status == "refuse":
            raise ValueError("refused as scripted")
        detail = f"scripted {status}" if status else ""
        result = {"status": status or "ok", "detail": detail, "compile_seconds": 0.1}
        if status:
            return result | {"temp_bytes": chosen.get("temp")}
        prepared.add(str(request["plan"]))
        return result | {"temp_bytes": chosen.get("temp", 1000), "error": 1e-7}
    if request["do"] == "time":
        for plan in request["plans"]:
            if str(plan) not in prepared:
                raise ValueError(f"{plan} was not prepared")
            deed = act(plan).get("do", "")
            if deed.startswith("time:"):
                perform(deed.removeprefix("time:"))
        time.sleep(script.get("delay", 0))
        spread = script.get("jitter", 0.0)
        scatter = [1 + spread * NOISE.uniform(-1, 1) for _ in request["plans"]]
        seconds = [act(plan).get("seconds", 0.01) * first(plan) for plan in request["plans"]]
        return {"seconds": [one * by for one, by in zip(seconds, scatter, strict=True)]}
    return {}


def main() -> None:
    """Serves requests by the script."""
    script = json.loads(sys.argv[1])
    prepared: set[str] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "log" in script:
            with Path(script["log"]).open("a") as log:
                gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
                log.write(json.dumps(request | {"gpu": gpu}) + "\n")
        try:
            reply = {"ok": True} | answer(script, request, prepared)
        except ValueError as error:
            reply = {"ok": False, "error": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
