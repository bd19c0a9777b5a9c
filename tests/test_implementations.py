"""The table of implementations: each entry is complete, and whoever lists them follows it."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

from autochunk import dot_product_attention
from autochunk.attention.kernels.libraries import Kernel
from autochunk.implementations import IMPLEMENTATIONS, is_fused, is_sliced, kernels_on
from autochunk.plan import Plan
from autochunk.workload import DTYPES

README = Path(__file__).resolve().parent.parent / "README.md"

# name: (slices, is a kernel of another library, platforms that it runs on, that it does not)
ROWS = {
    "dense": (False, False, ["cpu", "gpu", "cuda", "rocm", "tpu"], []),
    "cudnn": (False, True, ["cuda", "gpu"], ["cpu", "rocm", "tpu"]),
    "xla": (True, False, ["cpu", "gpu", "cuda", "rocm", "tpu"], []),
    "xla_rows": (True, False, ["cpu", "gpu", "cuda", "rocm", "tpu"], []),
    "tokamax_mosaic": (False, True, ["cuda", "gpu"], ["cpu", "rocm", "tpu"]),
    "tokamax_triton": (False, True, ["cuda", "gpu"], ["cpu", "rocm", "tpu"]),
}


def test_every_implementation_has_a_row() -> None:
    """In the order of the table, which stored trials depend on."""
    assert list(ROWS) == list(IMPLEMENTATIONS)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementation(name: str) -> None:
    """Slices or not, a kernel or not, where it runs; a kernel is there to be called."""
    sliced, fused, here, not_here = ROWS[name]
    entry = IMPLEMENTATIONS[name]
    assert (is_sliced(name), is_fused(name)) == (entry.sliced, entry.fused) == (sliced, fused)
    assert all(map(entry.runs_on, here))
    assert not any(map(entry.runs_on, not_here))
    assert set(entry.slicing) <= {"batch", "heads", "rows", "keys"}
    if fused:
        assert isinstance(pkgutil.resolve_name(entry.kernel), Kernel)
        assert set(entry.dtypes) <= set(DTYPES)
    assert Plan(name, 8.0).sliced().implementation == (name if sliced else "xla_rows")
    assert ("8 MB" in str(Plan(name, 8.0))) is sliced


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_users_are_told_of_it(name: str) -> None:
    """By the op's docstring and README."""
    for text in (dot_product_attention.__doc__ or "", README.read_text()):
        assert re.search(rf'"{name}"', text)


@pytest.mark.parametrize("name", [None, "", "future"])
def test_unknown_names(name: str | None) -> None:
    """As a newer version's profile may have them: neither slices nor a kernel, and no error."""
    assert not is_sliced(name)
    assert not is_fused(name)


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_kernels_of_a_platform(dtype: str | None) -> None:
    """Those installed that run there and take the dtype, in the table's order."""
    found = kernels_on("gpu", dtype)
    rest = [name for name in IMPLEMENTATIONS if name not in found]
    assert not {"cudnn", "tokamax_mosaic", "tokamax_triton"} & set(kernels_on("cpu", dtype))
    assert ("cudnn" in found) is (dtype in (None, "bfloat16", "float16"))
    assert found == sorted(found, key=list(IMPLEMENTATIONS).index)
    for name in found:
        assert IMPLEMENTATIONS[name].fused
    for name in rest:
        one = IMPLEMENTATIONS[name]
        refuses = dtype is not None and not one.takes(dtype)
        assert not one.fused or not one.installed or refuses
