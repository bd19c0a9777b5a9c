"""A FunctionCall: one tunable call of any function, and the one text that names it.

Beside ``Workload``, which is a call of attention. The key has what decides how a call is chunked,
and last a fingerprint of what the function computes: calls that differ in nothing else are of one
function that has changed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autochunk.errors import WorkloadError
from autochunk.workload import Mode, Workload

PREFIX = "function:"

# Neither ends an item of the key, nor the key in a store.
_Text = Annotated[str, Field(pattern=r"^[^\s,|=\p{Cc}]+$", max_length=1000)]

_ITEMS = ("name", "lengths", "arguments", "mode", "fingerprint")


class FunctionCall(BaseModel):
    """One tunable call of a function.

    Attributes:
      name: the function's.
      lengths: positions along each chunked axis, such as ``"768"`` or ``"256x256"``.
      arguments: of each array its dtype, its shape and which of its dims are chunked, as
        ``"float32[768.128]@0"``; of many, the first ones, how many more there are, and a digest.
      mode: whether it is differentiated.
      fingerprint: of what it computes.

    Raises:
      WorkloadError: from ``make`` and ``parse``; says which item is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    op: Literal["function"] = "function"
    name: _Text
    lengths: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,12}(x[1-9][0-9]{0,12}){0,7}$")]
    arguments: _Text
    mode: Mode = "forward"
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]

    @classmethod
    def make(cls, **fields: str) -> FunctionCall:
        """Builds one from its fields.

        Raises:
          WorkloadError: a field is missing, unknown or cannot be.
        """
        try:
            return cls(**fields)  # type: ignore[arg-type]
        except ValidationError as error:
            problems = error.errors(include_url=False)
            said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in problems)
            raise WorkloadError(said[:1000]) from None

    @classmethod
    def parse(cls, key: str) -> FunctionCall:
        """Reads a key.

        Raises:
          WorkloadError: it is none.
        """
        pairs = [item.partition("=") for item in key.removeprefix(PREFIX).split(",")]
        fields = {name: value for name, _, value in pairs}
        if not is_function(key) or tuple(fields) != _ITEMS or len(pairs) != len(_ITEMS):
            raise WorkloadError(
                f"{key[:300]!r} is not the key of a function's call, which is {PREFIX} and "
                f"{', '.join(f'{one}=' for one in _ITEMS)} between commas"
            )
        return cls.make(**fields)

    @property
    def key(self) -> str:
        """The canonical text of this call; ``FunctionCall.parse`` reads it back."""
        return PREFIX + ",".join(f"{item}={getattr(self, item)}" for item in _ITEMS)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Positions along each chunked axis."""
        return tuple(map(int, self.lengths.split("x")))

    @property
    def dtype(self) -> str:
        """Of the first array, which stands for all."""
        return self.arguments.partition("[")[0]

    @property
    def shape(self) -> str:
        """What tells it from other calls at a glance."""
        return f"{self.name} {self.lengths}"

    @property
    def tune_command(self) -> str:
        """The command line that tunes this call, if it left its program when it was missed."""
        return "autochunk tune --missed"

    def with_mode(self, mode: Mode) -> FunctionCall:
        """The same call in another mode."""
        return self if mode == self.mode else self.model_copy(update={"mode": mode})


Tunable = Workload | FunctionCall
"""What a profile can be of."""


def parsed(key: str) -> Tunable:
    """Reads the key of a workload of either kind.

    Raises:
      WorkloadError: it is none.
    """
    return FunctionCall.parse(key) if is_function(key) else Workload.parse(key)


def is_function(key: str) -> bool:
    """Whether a workload's key is of a function's call, and not of attention."""
    return key.startswith(PREFIX)


def nameless(key: str) -> str:
    """What a function's key has but for the name: calls that compute the same have it in common."""
    return key.partition(",lengths=")[2]


def unchanging(key: str) -> str:
    """What it has but for the fingerprint: the same call, also where the function has changed."""
    return key.rpartition(",fingerprint=")[0]


def usable_name(name: str) -> str:
    """A name as a key can have it: ``<locals>.<lambda>`` and such are kept."""
    plain = name.encode(errors="replace").decode()
    return "".join("_" if _ends_an_item(one) else one for one in plain)[:300] or "_"


def _ends_an_item(character: str) -> bool:
    return character in ",|=" or character.isspace() or not character.isprintable()
