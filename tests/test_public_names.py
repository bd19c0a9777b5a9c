"""The names that other people's code may rely on."""

from __future__ import annotations

import inspect

import pytest

import autochunk
from autochunk import errors

NAMES = [
    "Device",
    "Measurement",
    "MultiHeadAttention",
    "Plan",
    "Profile",
    "ProfileStore",
    "Resolution",
    "Workload",
    "__version__",
    "chunked",
    "detect",
    "dot_product_attention",
    "patch_jax_nn",
    "resolve",
    "ring_attention",
    "ring_order",
    "tune",
    "tune_chunks",
    "use",
]

# Each exception's place in the tree: its family and the built-in that keeps plain `except` clauses
# working.
TREE = {
    "AutochunkError": (Exception,),
    "ArgumentError": (errors.AutochunkError, ValueError),
    "WorkloadError": (errors.AutochunkError, ValueError),
    "DeviceError": (errors.AutochunkError, RuntimeError),
    "StoreError": (errors.AutochunkError, OSError),
    "BundleError": (errors.AutochunkError, ValueError),
    "AgreementError": (errors.AutochunkError, RuntimeError),
    "StorageError": (errors.AutochunkError, RuntimeError),
    "ProbeError": (errors.AutochunkError, RuntimeError),
    "ReportError": (errors.AutochunkError, RuntimeError),
    "AutochunkWarning": (UserWarning,),
    "MissWarning": (errors.AutochunkWarning,),
    "BudgetWarning": (errors.AutochunkWarning,),
    "StaleWarning": (errors.AutochunkWarning,),
    "StoreWarning": (errors.AutochunkWarning,),
}


def test_public_names_are_frozen() -> None:
    """A public name is added or taken away on purpose, by changing this list too."""
    assert autochunk.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_there(name: str) -> None:
    """Every public name can be imported, and asking again gives the same object."""
    value = getattr(autochunk, name)
    assert value is not None
    assert getattr(autochunk, name) is value


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_public_name_says_what_it_is(name: str) -> None:
    """Every public name is a class or a function, with a docstring."""
    value = getattr(autochunk, name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    assert inspect.getdoc(value)


def test_star_import_gives_the_public_names() -> None:
    """``from autochunk import *`` gives all public names and nothing else."""
    namespace: dict[str, object] = {}
    exec("from autochunk import *", namespace)
    assert sorted(set(namespace) - {"__builtins__"}) == sorted(NAMES)


@pytest.mark.parametrize("name", ["Chunk", "Detect", "_Device", "dense", ""])
def test_unknown_name_is_an_attribute_error(name: str) -> None:
    """A name that is not there is an AttributeError that says so, and ``hasattr`` is False."""
    with pytest.raises(AttributeError, match=f"module 'autochunk' has no attribute '{name}'"):
        getattr(autochunk, name)
    assert not hasattr(autochunk, name)


def test_unknown_name_is_an_import_error() -> None:
    """``from autochunk import x`` fails as for any module."""
    with pytest.raises(ImportError, match="Chunk"):
        exec("from autochunk import Chunk")


def test_dir_shows_the_public_names() -> None:
    """Completion in a shell offers the public names, loaded or not."""
    assert dir(autochunk) == sorted(NAMES)


def test_error_names_are_frozen() -> None:
    """The exception tree is public."""
    assert sorted(errors.__all__) == sorted(TREE)


@pytest.mark.parametrize(("name", "bases"), TREE.items())
def test_error_family(name: str, bases: tuple[type[BaseException], ...]) -> None:
    """Errors are caught by family or as the built-in that they also are."""
    error = getattr(errors, name)
    assert all(issubclass(error, base) for base in bases)
    assert name in (errors.__doc__ or "")
