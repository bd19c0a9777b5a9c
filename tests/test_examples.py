"""The examples run, at a small size, and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
def test_the_transformer_learns() -> None:
    """A few steps on the standard library's docstrings lower the loss."""
    losses = load("transformer").train(steps=12, batch=4, length=32, layers=1, heads=2, key_size=8, learning_rate=1e-2)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
def test_the_long_input_runs_short() -> None:
    """All three kinds of attention give a time and a memory at a small size."""
    results = load("long_input").run(length=64, size=32, heads=2, key_size=8, repeats=1)
    assert set(results) == {"haiku", "1000 MB", "auto"}


def test_every_example_is_tested() -> None:
    """A new example needs a test here."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"transformer", "long_input"}
