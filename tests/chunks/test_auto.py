"""What answers "auto", and what is left where nothing does."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, draw
from click.testing import CliRunner
from factories import make_chunks, make_function_profile, make_measurement, run_python

import autochunk
from autochunk import chunked
from autochunk.chunks.chunked import call_of
from autochunk.chunks.describe import described
from autochunk.cli import main
from autochunk.errors import BudgetWarning, MissWarning, StaleWarning, StoreWarning
from autochunk.functions import FunctionCall
from autochunk.resolution import resolve
from autochunk.store import bundle
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.store.programs import Programs

Function = Callable[..., Any]
X, W = draw(64, 8), draw(8, 16)


def transition(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w) @ w.T


def made(fn: Function = transition, **settings: Any) -> Function:
    """A function that nothing has traced yet."""
    return chunked(lambda *args: fn(*args), **{"in_axes": (0, None), "name": "made", **settings})  # noqa: PLW0108


def call(fn: Function = transition, **settings: Any) -> FunctionCall:
    found = described(call_of(made(fn, **settings), (X, W), {}))
    assert found is not None
    return found


def profile(subject: FunctionCall | None = None, **fields: Any) -> Profile:
    given = {"device": autochunk.detect(), **fields}
    return make_function_profile(subject or call(), **given)


def loops(run: Function) -> int:
    """How often the loop of a traced call goes round; 0 if there is none."""
    _, _, after = str(jax.make_jaxpr(run)(X, W)).partition(" length=")
    return int(after.split()[0]) if after else 0


def test_a_profile_answers(store_path: Path) -> None:
    """A call that was measured runs as it was best, silently."""
    store = ProfileStore(store_path)
    for mode in ("forward", "training"):
        store.put(profile(call().with_mode(mode)))
    run = made()
    assert loops(run) == 4
    np.testing.assert_allclose(jax.jit(run)(X, W), transition(X, W), rtol=1e-5, atol=1e-6)


def test_a_miss_is_told_once_and_leaves_a_program(store_path: Path) -> None:
    """With the command that cures it; both modes are missed."""
    with pytest.warns(MissWarning, match="found no profile for function:name=made.*--missed"):
        assert loops(made()) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loops(made())
    missed = ProfileStore(store_path).missed_functions(autochunk.detect())
    assert sorted(one.mode for one in missed) == ["forward", "training"]
    assert all(Programs(store_path).has(one) for one in missed)


def test_no_program_is_left_where_none_is_wanted(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning says what else can be done."""
    monkeypatch.setenv("AUTOCHUNK_PROGRAMS", "no")
    with pytest.warns(MissWarning, match=r"AUTOCHUNK_PROGRAMS says so.*tune_chunks"):
        loops(made())
    assert not Programs(store_path).folder.exists()


def test_what_cannot_be_exported_is_said() -> None:
    """As a function that calls back to the host, or one that is merged by another."""
    calls_back = lambda x, w: jax.pure_callback(lambda x: x, jax.typeof(x), x) @ w  # noqa: E731
    merged = (jnp.zeros((8, 16)), lambda total, one: total + one)
    prints = lambda x, w: (jax.debug.print("{}", x.sum()), x @ w)[1]  # noqa: E731
    for name, fn, reduce in (
        ("calls back", calls_back, None),
        ("prints", prints, None),
        ("merged", lambda x, w: x.T @ x @ w, merged),
    ):
        with pytest.warns(MissWarning, match="left no program .*tune_chunks"):
            loops(made(fn, name=name, reduce=reduce))


def test_a_function_that_changed_is_stale(store_path: Path) -> None:
    """The user's own store answers for it, with a warning, and it is missed; a bundle does not."""
    changed = lambda x, w: transition(x, w) + 1  # noqa: E731
    store = ProfileStore(store_path)
    for mode in ("forward", "training"):
        store.put(profile(call(changed).with_mode(mode)))
    with pytest.warns(StaleWarning, match="computed something else when it was measured"):
        assert loops(made()) == 4
    assert call() in store.missed_functions(autochunk.detect())


@pytest.mark.parametrize(("other", "expected"), [({"name": "another"}, 4), ({}, 0)])
def test_a_bundle_answers_by_fingerprint_only(
    other: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the function is called there; not one of this name that computes something else."""
    change = other or {"fingerprint": "f" * 16}
    subject = FunctionCall.make(**{**call().model_dump(), **change})
    found = [profile(subject.with_mode(mode)) for mode in ("forward", "training")]
    (tmp_path / "bundle.json").write_text(bundle.dump(found))
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(tmp_path / "bundle.json"))
    resolve.forget_all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissWarning)
        assert loops(made()) == expected


def test_a_function_that_mixes_positions_is_not_chunked(store_path: Path) -> None:
    """What was found by measuring holds within any budget."""
    wrong = make_chunks(16, status="inaccurate", detail="the function mixes positions")
    for mode in ("forward", "training"):
        measurements = (make_measurement("dense"), wrong)
        ProfileStore(store_path).put(profile(call().with_mode(mode), measurements=measurements))
    with autochunk.use(memory_budget_mb=0.001), pytest.warns(BudgetWarning, match="mixes"):
        assert loops(made()) == 0


def test_a_budget_that_nothing_fits_is_told(store_path: Path) -> None:
    """What takes least runs."""
    for mode in ("forward", "training"):
        ProfileStore(store_path).put(profile(call().with_mode(mode)))
    with pytest.warns(BudgetWarning, match="chunks of 16, takes 10 MB"):
        assert loops(made(memory_budget_mb=1)) == 4


def test_chunks_that_were_not_measured_may_fit_a_budget(store_path: Path) -> None:
    """Smaller ones than any that were, by what memory they should take."""
    for mode in ("forward", "training"):
        whole = profile(call().with_mode(mode), measurements=(make_measurement("dense"),))
        ProfileStore(store_path).put(whole)
    with pytest.warns(BudgetWarning, match="uses chunks of .* no measured plan fits"):
        assert loops(made(memory_budget_mb=0.004)) > 1


def test_chunks_that_take_more_than_the_whole_call_save_nothing(store_path: Path) -> None:
    """As was measured, whatever the rule makes of smaller ones."""
    found = (make_measurement("dense", memory_mb=1.0), make_chunks(16, memory_mb=1000.0))
    for mode in ("forward", "training"):
        ProfileStore(store_path).put(profile(call().with_mode(mode), measurements=found))
    with pytest.warns(BudgetWarning, match="uses all at once .* no measured plan fits"):
        assert loops(made(memory_budget_mb=0.004)) == 0


def test_keys_of_a_newer_version_are_passed_over(store_path: Path) -> None:
    """One that has more items is no reason to fail, nor an answer."""
    ProfileStore(store_path).put(profile(call(name="another")))
    with closing(sqlite3.connect(store_path)) as file, file:
        file.execute("UPDATE profiles SET key = replace(key, 'another', 'another,device=2')")
    with pytest.warns(MissWarning):
        assert loops(made()) == 0
    assert CliRunner().invoke(main, ["explain", "--function", "made"]).exit_code == 0


def test_a_locked_store_is_waited_for_shortly(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for attention: were it waited for as by a command, this would take hours."""
    monkeypatch.setattr("autochunk.store.database._BUSY_MILLISECONDS", 3_600_000)
    monkeypatch.setattr("autochunk.store.database._BRIEF_MILLISECONDS", 100)
    ProfileStore(store_path).check_writable()
    with closing(sqlite3.connect(store_path, isolation_level=None)) as file:
        file.execute("BEGIN EXCLUSIVE")
        with pytest.warns(StoreWarning, match="without user store"), pytest.warns(MissWarning):
            assert loops(made()) == 0


def attends(x: jax.Array) -> jax.Array:
    return autochunk.dot_product_attention(x, x, x)


def test_a_function_with_attention_is_the_same_by_any_plan() -> None:
    """Else tuning the one would make a profile of the other stale."""
    x, found = draw(6, 8, 2, 4), set()
    for limit in (None, 0.001):
        with autochunk.use(max_chunk_size_mb=limit):
            one = described(call_of(chunked(lambda x: attends(x), name="f"), (x,), {}))  # noqa: PLW0108
        found.add(one)
    assert len(found) == 1
    causal = chunked(lambda x: autochunk.dot_product_attention(x, x, x, is_causal=True), name="f")
    assert described(call_of(causal, (x,), {})) not in found


def test_only_attention_that_runs_is_missed(store_path: Path) -> None:
    """Not that of programs which are left for the tuner, or weighed for their memory."""
    x = draw(6, 8, 2, 4)
    run: Function = chunked(lambda x: attends(x), name="with attention")  # noqa: PLW0108

    def loss(x: jax.Array) -> jax.Array:
        return jnp.asarray(run(x).sum())

    with autochunk.use(memory_budget_mb=0.001), pytest.warns(MissWarning):
        text = jax.jit(jax.grad(loss)).lower(x).as_text()
    assert "while" in text
    store, here = ProfileStore(store_path), autochunk.detect()
    assert [(one.batch, one.mode) for one in store.missed(here)] == [(1, "training")]
    assert len(list(Programs(store_path).folder.iterdir())) == 1


FINGERPRINTS = """
import sys
sys.path.insert(0, sys.argv[1])
from cases import CASES
from autochunk.chunks.chunked import call_of
from autochunk.chunks.describe import described
from autochunk.cli import main
for name in sys.argv[2:]:
    case = CASES[name]
    print(described(call_of(case.chunked, case.args, {})).fingerprint)
"""


def test_fingerprints_are_the_same_in_every_process() -> None:
    """And differ from function to function."""
    names = ["transition", "own rule", "recurrent", "dropout"]
    there = run_python(FINGERPRINTS, Path(__file__).parent, *names, PYTHONHASHSEED="1").split()
    calls = [call_of(CASES[name].chunked, CASES[name].args, {}) for name in names]
    assert there == [one.fingerprint for one in map(described, calls) if one]
    assert len(set(there)) == len(names)
