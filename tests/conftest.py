"""What every test gets: a store of its own, no reports of other tests', strict JAX settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

from autochunk.resolution import places, resolve

# Compiling takes most of the tests' time; how fast a CPU's machine code is matters to none of them,
# and programs as small as theirs are compiled faster in one piece than in many.
# Read when jax first compiles, here and in the processes that tests start.
if not Path("/dev/nvidiactl").exists():
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quick += " --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}".strip()

# A shape that broadcasts by accident is an error here, not a silent outer product.
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run; `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("autochunk", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, database=None)
hypothesis.settings.load_profile("autochunk")


@pytest.fixture(autouse=True)
def store_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of this test's own store (not yet there), which AUTOCHUNK_STORE names.

    No other layer has anything, whatever this machine is.
    """
    path = tmp_path / "store" / "profiles.sqlite"
    monkeypatch.setenv("AUTOCHUNK_STORE", str(path))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "site"))
    monkeypatch.delenv("AUTOCHUNK_PROFILES", raising=False)
    monkeypatch.setattr(places, "shipped_profiles", lambda: tmp_path / "shipped")
    resolve.forget_all()
    yield path
    resolve.forget_all()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--every N``: a sample of all files, for another interpreter; ``--cases K/N``: for CI."""
    parser.addoption("--every", type=int, default=1, metavar="N", help="only one test in N")
    parser.addoption(
        "--cases",
        default="0/1",
        metavar="K/N",
        help="of a test that has N cases or more only one in N, from number K on",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps one test in ``--every`` and ``--cases``; skips ``gpu`` ones where jax has no GPU."""
    kept = _sampled(items, config.getoption("cases"))[:: config.getoption("every")]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="jax has no GPU here"))


def _sampled(items: list[pytest.Item], cases: str) -> list[pytest.Item]:
    first, step = map(int, cases.split("/"))
    of_a_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_a_test.setdefault(item.nodeid.split("[")[0], []).append(item)
    left_out = {
        item
        for same in of_a_test.values()
        if len(same) >= step > 1
        for number, item in enumerate(same)
        # Not each time the same of an inner parameter that has as many values.
        if (number + number // step) % step != first % step
    }
    return [item for item in items if item not in left_out]


def _has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False
