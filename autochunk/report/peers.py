"""Other libraries' times, read from what ``autochunk bench --json`` printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from autochunk.errors import ReportError

# What a bench compares with that is in every profile, too.
_OURS = ("haiku dense", "1000 MB", "auto", "row loop")

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Contender(BaseModel):
    name: Annotated[str, Field(max_length=200)]
    ratio: _Positive | None = None
    temp_bytes: Annotated[int, Field(ge=0, le=2**60)] | None = None


class _Bench(BaseModel):
    workload: str
    contenders: list[_Contender]


_BENCHES = TypeAdapter(list[_Bench])


def read_peers(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The libraries that were timed beside dense attention, by workload key.

    Raises:
      ReportError: the file cannot be read, or is none that ``autochunk bench --json`` printed.
    """
    try:
        benches = _BENCHES.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise ReportError(
            f"{file} is not what `autochunk bench --json` prints: {str(error).splitlines()[0]}"
        ) from error
    return {
        bench.workload: [
            one.model_dump()
            for one in bench.contenders
            if one.ratio is not None and not one.name.startswith(_OURS)
        ]
        for bench in benches
    }
