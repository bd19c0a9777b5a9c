"""Options that several commands share; those that belong together reach a command as one object."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import click

from autochunk.store import merge
from autochunk.store.profile import Profile
from autochunk.tuner.presets import PRESETS, of_kind, workloads_of
from autochunk.workload import DTYPES, MODES, DType, Mode, Workload

_EXAMPLE = "b=1,t=4096,s=4096,h=8,k=64"

_Command = Callable[..., None]
_Decorator = Callable[[_Command], _Command]

store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Profile store file; the default is AUTOCHUNK_STORE, or else the user's own.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
stale_option = click.option(
    "--stale",
    is_flag=True,
    help="Only profiles of this machine that were measured with other versions.",
)


def _as_one(name: str, kind: type[Any], *options: _Decorator) -> _Decorator:
    """Adds options to a command, which gets them as its argument ``name``, a dataclass ``kind``."""

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            mine = {field.name for field in fields(kind)} & values.keys()
            one = kind(**{field: values.pop(field) for field in mine})
            command(**values, **{name: one})

        for option in reversed(options):  # as if each were a decorator, the first on top
            option(run)
        return run

    return decorate


# --- Workloads, to be measured or explained -------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """The workloads that are wanted, by their shapes, dtypes and modes."""

    shapes: tuple[str, ...]
    dtypes: tuple[DType, ...]
    mode: Mode | Literal["both"]
    presets: tuple[str, ...] = ()

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Both, or the one."""
        return MODES if self.mode == "both" else (self.mode,)

    def named(self) -> list[Workload]:
        """Those of --shape and --preset."""
        shapes = (*self.shapes, *(PRESETS[preset] for preset in self.presets))
        return workloads_of(shapes, self.dtypes or ("float32",), self.modes)

    def among(self, workloads: Iterable[Workload]) -> list[Workload]:
        """Those of other workloads that --dtype and --mode let through."""
        return of_kind(workloads, self.dtypes, self.modes)


def _shape() -> _Decorator:
    return click.option(
        "--shape",
        "shapes",
        multiple=True,
        metavar="SHAPE",
        help=f"A workload such as {_EXAMPLE}: batch, query length, key length, heads, key size. b "
        "left out is 1, s is t. Also v= (value size), kv_heads=, causal=yes, mask=b1ts, bias=1hts "
        "(1 is a dim that is broadcast), window=255:0, precision=highest, and each =yes: "
        "q_lengths, kv_lengths, q_segments, kv_segments, offset, alibi, dropout, soft_cap, "
        "residual. Repeatable.",
    )


_dtype = click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(DTYPES),
    help="Repeatable. The default for a shape or preset is float32.",
)
_mode = click.option(
    "--mode", type=click.Choice([*MODES, "both"]), default="both", show_default=True
)
_preset = click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(list(PRESETS)),
    help="The typical shape of a family of models. Repeatable.",
)

shape_or_preset_options = _as_one("wanted", Wanted, _shape(), _dtype, _mode, _preset)


# --- Profiles, to be chosen among those that are stored -------------------------------------------


@dataclass(frozen=True)
class Filters:
    """What a profile must be like to be chosen."""

    device: str | None
    shapes: tuple[str, ...]
    dtype: str | None
    mode: str | None

    def __bool__(self) -> bool:
        """Whether any is given."""
        return any(astuple(self))

    def select(self, profiles: Iterable[Profile]) -> list[Profile]:
        """The profiles that pass every filter."""
        return merge.select(
            profiles, device=self.device, shapes=self.shapes, dtype=self.dtype, mode=self.mode
        )


filter_options = _as_one(
    "filters",
    Filters,
    click.option(
        "--device",
        metavar="TEXT",
        help="Only profiles of devices with this in their name, as `autochunk show` prints it.",
    ),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        metavar="SHAPE",
        help="Only workloads with these items, such as t=4096,h=8; functions by "
        "name=NAME,lengths=768. Repeatable.",
    ),
    click.option("--dtype", type=click.Choice(DTYPES), help="Only profiles of this dtype."),
    click.option("--mode", type=click.Choice(MODES), help="Only profiles of this mode."),
)
