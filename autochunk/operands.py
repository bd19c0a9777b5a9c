"""The arrays of an attention call, in one table.

Whoever checks, names, draws, flattens or slices the arrays of a call goes by this table, so that a
new kind of array is an entry here, an argument of the op, a field of ``Workload`` with its pattern,
and whatever ``attention/kernels`` compute from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Operand:
    """One array that a call may have.

    Attributes:
      dims: what follows its leading dims [...], in letters: ``h`` query heads, ``n`` key/value
        heads, ``t`` query rows, ``s`` keys, ``k`` key features, ``v`` value features.
      dtype: "query" (the query's), "floating" or "boolean".
      optional: whether a call may be without it; any of its dims, the leading ones too, may then be
        of size one and broadcast.
      differentiable: whether training computes its gradient.
    """

    dims: str
    dtype: Literal["query", "floating", "boolean"] = "query"
    optional: bool = False
    differentiable: bool = True

    @property
    def letters(self) -> str:
        """A letter for each dim in the pattern of an optional array: ``b`` stands for [...]."""
        return f"b{self.dims}"


# In the order in which they are passed on.
OPERANDS: dict[str, Operand] = {
    "query": Operand("thk"),
    "key": Operand("snk"),
    "value": Operand("snv"),
    "bias": Operand("hts", "floating", optional=True),
    "mask": Operand("hts", "boolean", optional=True, differentiable=False),
}

TERMS: dict[str, Operand] = {name: one for name, one in OPERANDS.items() if one.optional}
"""Those that a call may be without. Their patterns are a Workload's fields of the same names."""


def pattern_of(name: str, sizes: tuple[int, ...]) -> str:
    """The pattern of an array of these sizes, one for each letter: "1" where it is of size one."""
    letters = TERMS[name].letters
    return "".join("1" if size == 1 else one for one, size in zip(letters, sizes, strict=True))
