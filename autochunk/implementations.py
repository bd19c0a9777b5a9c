"""The implementations of attention: what each is, said once.

Whoever needs to know whether an implementation slices, where it runs or what installs it asks this
table. A new one is an entry here and a row in ``tests/test_implementations.py``; if it is a kernel
of another library, its entry names that in ``attention/kernels/libraries.py``.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Protocol


class Form(Protocol):
    """A call, as far as it decides which kernels may take it: a ``Workload``."""

    @property
    def dtype(self) -> str:
        """Of its inputs."""

    @property
    def mode(self) -> str:
        """``"forward"`` or ``"training"``."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
      summary: what it is, in words that follow its name.
      slicing: the axes along which it slices, first choice first; empty where it does not slice.
      kernel: for a kernel of another library that holds no logits, ``"module:function"``: a
        ``kernels.libraries.Kernel``, loaded when it is first asked for; else empty.
      platforms: where it runs, as JAX's lowering names them; empty is everywhere.
      dtypes: of its inputs, by name; empty is any.
      lacks: what it never takes, as a ``Workload`` names its fields. What else it does not take,
        by more than a workload tells, is known where it is called (``kernels.libraries``).
      lacks_gradients: what else it does not take where it is differentiated.
      extra: the extra of autochunk that installs the library that it is of, by whose name it is
        imported; empty where JAX has it all.
    """

    summary: str
    slicing: tuple[str, ...] = ()
    kernel: str = ""
    platforms: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    lacks_gradients: tuple[str, ...] = ()
    extra: str = ""

    @property
    def sliced(self) -> bool:
        """Whether it computes logits slice by slice, within a limit."""
        return bool(self.slicing)

    @property
    def fused(self) -> bool:
        """Whether it is a kernel of another library, which holds no logits at all."""
        return bool(self.kernel)

    @property
    def installed(self) -> bool:
        """Whether the library that it is of is there."""
        return not self.extra or _is_installed(self.extra)

    @property
    def how_to_install(self) -> str:
        """What is missing where it is not installed, and what brings it."""
        return f"{self.extra} is not installed: pip install 'autochunk[{self.extra}]' brings it"

    def takes(self, dtype: str) -> bool:
        """Whether it takes inputs of this dtype."""
        return not self.dtypes or dtype in self.dtypes

    def may_take(self, form: Form) -> bool:
        """Whether it takes a call, as far as its workload tells."""
        lacks = self.lacks + (self.lacks_gradients if form.mode == "training" else ())
        return self.takes(form.dtype) and not any(_has(form, name) for name in lacks)

    def runs_on(self, platform: str) -> bool:
        """Whether it runs on a platform, as lowering ("cuda") or a Device ("gpu") names it."""
        names = {"gpu": {"cuda", "rocm"}}.get(platform, {platform})
        return not self.platforms or bool(names & set(self.platforms))


def kernels_on(platform: str, dtype: str | None = None) -> list[str]:
    """The fused kernels that are installed and run on a platform; that take a dtype, if given."""
    return [
        name
        for name, one in IMPLEMENTATIONS.items()
        if one.fused and one.runs_on(platform) and one.installed
        if dtype is None or one.takes(dtype)
    ]


def kernels_for(form: Form, platform: str) -> list[str]:
    """The fused kernels that are installed, run on a platform and may take a call."""
    return [name for name in kernels_on(platform) if IMPLEMENTATIONS[name].may_take(form)]


def _has(form: Form, name: str) -> bool:
    return getattr(form, name) not in (False, "none")


@functools.cache
def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


_NOT_IN_KERNELS = ("alibi_slopes", "dropout_bits")

# Optuna keeps the names in this order with every trial, so that new ones come last.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "dense": Implementation("haiku's own order of operations, all logits at once"),
    "cudnn": Implementation(
        "cuDNN's fused kernel, on NVIDIA GPUs, in half precision",
        kernel="autochunk.attention.kernels.libraries:cudnn",
        platforms=("cuda",),
        dtypes=("bfloat16", "float16"),
        lacks=(*_NOT_IN_KERNELS, "soft_cap"),
        lacks_gradients=("residual",),
    ),
    "xla": Implementation(
        "slices over batch, then heads, then query rows, then keys",
        slicing=("batch", "heads", "rows", "keys"),
    ),
    "xla_rows": Implementation(
        "slices over query rows first, then keys, batch and heads",
        slicing=("rows", "keys", "batch", "heads"),
    ),
    "tokamax_mosaic": Implementation(
        "Tokamax's fused kernel for NVIDIA GPUs since Hopper, in half precision",
        kernel="autochunk.attention.kernels.libraries:tokamax_mosaic",
        platforms=("cuda",),
        dtypes=("bfloat16", "float16"),
        lacks=_NOT_IN_KERNELS,
        lacks_gradients=("residual",),
        extra="tokamax",
    ),
    "tokamax_triton": Implementation(
        "Tokamax's fused kernel for NVIDIA GPUs since Ampere, in any precision",
        kernel="autochunk.attention.kernels.libraries:tokamax_triton",
        platforms=("cuda",),
        dtypes=("bfloat16", "float16", "float32"),
        lacks=_NOT_IN_KERNELS,
        lacks_gradients=("residual", "soft_cap"),
        extra="tokamax",
    ),
}


def is_sliced(name: str | None) -> bool:
    """Whether this is the name of an implementation that slices; a file may have unknown ones."""
    return name in IMPLEMENTATIONS and IMPLEMENTATIONS[name].sliced


def is_fused(name: str | None) -> bool:
    """Whether this is the name of a kernel of another library."""
    return name in IMPLEMENTATIONS and IMPLEMENTATIONS[name].fused
