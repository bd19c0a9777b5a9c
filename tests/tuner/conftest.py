"""Scripted measuring processes and real storages for the tuner's tests."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import Scripted, make_device

from autochunk.workload import Workload

SCRIPTED_WORKER = Path(__file__).with_name("scripted_worker.py")


@pytest.fixture
def scripted() -> Scripted:
    """The command of a worker that follows the script; see scripted_worker.py."""

    def make(**script: Any) -> tuple[str, ...]:
        return sys.executable, str(SCRIPTED_WORKER), json.dumps(script)

    return make


@pytest.fixture
def scripted_gpu(scripted: Scripted) -> Scripted:
    """The same of a worker that finds a GPU."""
    device = make_device(platform="gpu", kind="scripted", cores=0)
    return functools.partial(scripted, device=device.model_dump())


@pytest.fixture
def small() -> Workload:
    """A workload that takes a real worker milliseconds, and still has something to slice."""
    return Workload.parse("b=2,t=96,s=80,h=4,kv_heads=2,k=8,v=16", mode="training")


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL server of this test session's own, on a free port.

    Skips where there is none to start.
    """
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), *map(Path, os.get_exec_path())]
    programs = [folder for folder in folders if (folder / "initdb").exists()]
    if not programs:
        pytest.skip("no PostgreSQL server is installed (Debian's package postgresql)")
    user: dict[str, Any] = {}
    # A socket's path is short, and others' folders are not for its user to enter.
    folder = Path(tempfile.mkdtemp(prefix="postgresql", dir="/tmp"))
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        shutil.chown(folder, "postgres", "postgres")

    def run(program: str, *arguments: str) -> None:
        command = [str(programs[-1] / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)

    port = _free_port()
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run("initdb", "-U", "autochunk", "--auth=trust", "-E", "UTF8", "--no-sync")
    run("pg_ctl", "-o", options, "-l", str(folder / "log"), "-w", "start")
    yield f"postgresql://autochunk:secret@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def database(postgresql: str, tmp_path: Path) -> str:
    """URL of a database on that server, empty."""
    import psycopg

    name = f"test_{tmp_path.name.lower().replace('-', '_')}"[:60]
    with psycopg.connect(postgresql, autocommit=True) as server:
        server.execute(f'DROP DATABASE IF EXISTS "{name}"')
        server.execute(f'CREATE DATABASE "{name}"')
    return postgresql.removesuffix("postgres") + name


@pytest.fixture(params=["journal", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where studies are kept: each kind of storage that machines share, empty."""
    if request.param == "journal":
        return str(tmp_path / "shared" / "studies.journal")
    url: str = request.getfixturevalue("database")
    return url
