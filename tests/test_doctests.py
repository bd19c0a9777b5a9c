"""The examples in public docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
from typing import Any

import pytest

import autochunk

FRAMEWORKS = ["equinox", "flax", "haiku"]


def _own(module: str) -> dict[str, Any]:
    """What a framework's module offers, by its full name."""
    return {
        f"{module}.{name}": value
        for name, value in vars(importlib.import_module(module)).items()
        if getattr(value, "__module__", None) == module and not name.startswith("_")
    }


PUBLIC: dict[str, Any] = {
    "autochunk": autochunk,
    **{name: getattr(autochunk, name) for name in autochunk.__all__ if name != "__version__"},
    **{name: one for module in FRAMEWORKS for name, one in _own(f"autochunk.{module}").items()},
}


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
def test_an_example_runs(name: str) -> None:
    """Every public docstring has an example, which does what it says, as a user would type it."""
    docstring = inspect.getdoc(PUBLIC[name]) or ""
    example = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    assert example.examples
    told: list[str] = []
    failed, _ = doctest.DocTestRunner().run(example, out=told.append)
    assert not failed, "".join(told)
