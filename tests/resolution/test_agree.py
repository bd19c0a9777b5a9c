"""Agreement: the processes of one program run one plan, whatever each of them has stored."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from factories import (
    devices_on_cpu,
    make_measurement,
    make_profile,
    make_workload,
    one_plan,
    run_python,
    start_python,
)

import autochunk
from autochunk.plan import Plan
from autochunk.store.profiles import ProfileStore

WORKLOAD = make_workload("b=4,t=64,s=64,h=2,k=8")

# Every process: batch sharded over all of them, attention, and a sum that needs them all. Prints
# what it resolved and got.
_PROCESS = """
import json, sys, warnings
process, count, address, before, after = json.loads(sys.argv[1])
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(address, count, process, initialization_timeout=60)
import autochunk
from autochunk.resolution import agree
agree.LIMIT_SECONDS = 5.0
warnings.simplefilter("ignore")
exec(before)
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
ones = np.ones((4, 64, 2, 8), np.float32)
x = jax.make_array_from_callback(ones.shape, sharding, lambda index: ones[index])
total = jax.jit(lambda x: jnp.sum(autochunk.dot_product_attention(x, x, x)))(x)
exec(after)
workload = autochunk.Workload.parse("b=4,t=64,s=64,h=2,k=8")
answer = autochunk.resolve(workload)
said = {"plan": str(answer.plan), "layer": answer.layer, "sum": float(total)}
print(json.dumps(said), flush=True)
"""


def start(
    count: int,
    stores: Sequence[Path],
    before: dict[int, str],
    after: dict[int, str],
    **environment: str,
) -> list[subprocess.Popen[str]]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    environment |= devices_on_cpu(1)
    processes = []
    for number, store in enumerate(stores):
        given = json.dumps([number, count, address, before.get(number, ""), after.get(number, "")])
        processes.append(start_python(_PROCESS, given, AUTOCHUNK_STORE=str(store), **environment))
    return processes


def finish(
    processes: list[subprocess.Popen[str]], seconds: float = 120.0
) -> list[tuple[int, str, str]]:
    """(exit status, output, complaints) of each; none outlives the test."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return [(code, *output) for code, output in zip(codes, outputs, strict=True)]


def answers(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    ended = finish(processes)
    complaints = "\n".join(err[-2000:] for _, _, err in ended)
    assert all(code == 0 for code, _, _ in ended), complaints
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ended]


def error_of(processes: list[subprocess.Popen[str]]) -> str:
    """What process 1 says last before it ends.

    JAX's runtime then makes it wait for process 0, which is not waited for.
    """
    assert processes[1].stderr is not None
    line = next(line for line in processes[1].stderr if "Error: process" in line)
    for process in processes:
        process.kill()
        process.communicate()
    return line


def stores_of(folder: Path, limits: Sequence[float | None]) -> list[Path]:
    """A store for each process that prefers its own limit in MB; no file for None."""
    device = autochunk.detect()
    paths = [folder / f"{number}.sqlite" for number in range(len(limits))]
    for path, limit in zip(paths, limits, strict=True):
        if limit is not None:
            ProfileStore(path).put(make_profile(WORKLOAD, device, one_plan(limit)))
    return paths


@pytest.mark.parametrize(
    "limits", [(0.01, 0.02), (0.01, None), (None, 0.02), (0.01, 0.02, None, 0.005)]
)
def test_one_plan_everywhere(limits: tuple[float | None, ...], tmp_path: Path) -> None:
    """Processes whose stores differ, or are not there, all have process 0's answers, and end."""
    found = answers(start(len(limits), stores_of(tmp_path, limits), {}, {}))
    expected = Plan("xla", limits[0]) if limits[0] is not None else Plan("xla", 17.0)
    assert {answer["plan"] for answer in found} == {str(expected)}
    assert len({answer["layer"] for answer in found}) == 1
    assert {answer["sum"] for answer in found} == {4 * 64 * 2 * 8}


# Training with query rows sharded over all processes, and over those of a part of the batch that a
# shard_map has, against the same on one device.
_TRAIN = """
def train(query, key):
    def loss(query, key):
        return jnp.sum(jnp.sin(autochunk.dot_product_attention(query, key, key, is_causal=True)))
    return jax.grad(loss, argnums=(0, 1))(query, key)
P = jax.sharding.PartitionSpec
noise = np.random.default_rng(0).standard_normal((4, 64, 2, 8), np.float32)
expected = jax.jit(train)(noise, noise)
def check(function, mesh, *specs):
    spread = tuple(jax.sharding.NamedSharding(mesh, spec) for spec in specs)
    given = [jax.make_array_from_callback(noise.shape, s, lambda i: noise[i]) for s in spread]
    received = jax.jit(function, out_shardings=spread)(*given)
    for one, other in zip(received, expected):
        for piece in one.addressable_shards:
            np.testing.assert_allclose(piece.data, np.asarray(other)[piece.index], atol=1e-5)
check(train, mesh, P(None, "batch"), P())
both = jax.sharding.Mesh(mesh.devices.reshape(-1, 2), ("batch", "rows"))
part = dict(in_specs=P("batch"), out_specs=P("batch"), axis_names={"batch"})
check(jax.shard_map(train, mesh=both, **part), both, P("batch", "rows"), P("batch"))
"""


@pytest.mark.parametrize("count", [2, 4])
def test_a_mesh_of_several_processes(count: int, tmp_path: Path) -> None:
    """Each process computes its share, forward and backward, by one plan."""
    stores = stores_of(tmp_path, (0.01, *[None] * (count - 1)))
    found = answers(start(count, stores, {}, dict.fromkeys(range(count), _TRAIN)))
    assert {answer["plan"] for answer in found} == {"xla, 0.01 MB"}


def test_a_store_that_changes_later_changes_nothing(tmp_path: Path) -> None:
    """On whichever process: what was agreed upon at the start holds while the program runs."""
    change = f"""
from factories import make_profile, one_plan
profile = make_profile({WORKLOAD.key!r}, autochunk.detect(), one_plan(0.003))
autochunk.ProfileStore().put(profile)
"""
    found = answers(start(2, stores_of(tmp_path, (0.01, 0.02)), {}, {0: change, 1: change}))
    assert {answer["plan"] for answer in found} == {"xla, 0.01 MB"}


def test_many_profiles_travel(tmp_path: Path) -> None:
    """More than one message of the runtime holds."""
    device = autochunk.detect()
    paths = stores_of(tmp_path, (0.01, None))
    profiles = []
    for length in range(1, 301):
        failed = [
            make_measurement(limit=limit, status="crashed", detail=os.urandom(1000).hex())
            for limit in (1.0, 2.0, 3.0, 4.0)  # it does not compress
        ]
        workload = make_workload(f"t={length},h=2,k=8")
        profiles.append(make_profile(workload, device, (*one_plan(0.5), *failed)))
    ProfileStore(paths[0]).put_all(profiles)
    assert {answer["plan"] for answer in answers(start(2, paths, {}, {}))} == {"xla, 0.01 MB"}


def test_waiting_for_process_0_has_an_end(tmp_path: Path) -> None:
    """Process 0 never comes to an "auto": the others say so, by number, instead of hanging."""
    sleep = "import time; jax.devices(); time.sleep(60)"
    complaints = error_of(start(2, stores_of(tmp_path, (0.01, 0.02)), {0: sleep}, {}))
    assert "AgreementError: process 1 of 2 waited 5 s for the profiles of process 0" in complaints


def test_versions_must_be_the_same(tmp_path: Path) -> None:
    """Two versions may choose differently from the same profiles."""
    other = "autochunk.__version__ = '9.9'"
    complaints = error_of(start(2, stores_of(tmp_path, (0.01, 0.02)), {1: other}, {}))
    said = f"process 1 of 2 runs autochunk 9.9, process 0 runs {autochunk.__version__}"
    assert f"AgreementError: {said}" in complaints


def test_a_damaged_layer_of_process_0_is_left_out_everywhere(tmp_path: Path) -> None:
    """As in a program of one process."""
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    stores = stores_of(tmp_path, (0.01, 0.02))
    found = answers(start(2, stores, {}, {}, AUTOCHUNK_PROFILES=str(bad)))
    assert {answer["plan"] for answer in found} == {"xla, 0.01 MB"}


def test_a_row_that_cannot_be_read_costs_itself_only(tmp_path: Path) -> None:
    """The other profiles of process 0's store answer, as in a program of one process."""
    paths = stores_of(tmp_path, (0.01, None))
    with contextlib.closing(sqlite3.connect(paths[0])) as file, file:
        key = f"{autochunk.detect().key} | {make_workload('t=3,k=8').key}"
        row = (key, '{"schema_version": 7}')
        file.execute("INSERT INTO profiles (key, value) VALUES (?, ?)", row)
    assert {answer["plan"] for answer in answers(start(2, paths, {}, {}))} == {"xla, 0.01 MB"}


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        # Stores of their own by use(): agreed upon as the first such store of the program.
        ("store=os.environ['AUTOCHUNK_STORE']", "xla, 0.01 MB"),
        ("max_chunk_size_mb=64", "xla, 64 MB"),
    ],
)
def test_use_in_a_program_of_several(settings: str, plan: str, tmp_path: Path) -> None:
    """A store by each process's own path, or a plan pinned."""
    use = f"import os; used = autochunk.use({settings}); used.__enter__()"
    found = answers(start(2, stores_of(tmp_path, (0.01, 0.02)), {0: use, 1: use}, {}))
    assert {answer["plan"] for answer in found} == {plan}


def test_one_process_pays_nothing() -> None:
    """Without jax.distributed nothing of the runtime is touched."""
    code = """
import autochunk
autochunk.resolve(autochunk.Workload.parse("t=64,h=2,k=8"))
from jax._src import distributed
print(distributed.global_state.client)
"""
    assert run_python(code).strip() == "None"
