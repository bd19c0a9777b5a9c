"""The arrays of an attention call, in one table.

Whoever checks, names, draws, flattens or slices the arrays of a call goes by this table, so that a
new kind of array is an entry here, an argument of the op, a field of ``Workload`` with its pattern,
and whatever ``attention/kernels`` compute from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_DType = Literal["query", "floating", "boolean", "integer", "bits"]


@dataclass(frozen=True)
class Operand:
    """One array that a call may have.

    Attributes:
      dims: what follows its leading dims [...], in letters: ``h`` query heads, ``n`` key/value
        heads, ``t`` query rows, ``s`` keys, ``k`` key features, ``v`` value features.
      item: what the text of a Workload calls it, where a call may be without it.
      dtype: "query" (the query's), "floating", "boolean", "integer" or "bits" (random ones).
      optional: whether a call may be without it; any of its dims, the leading ones too, may then be
        of size one and broadcast.
      differentiable: whether training computes its gradient.
    """

    dims: str
    item: str = ""
    dtype: _DType = "query"
    optional: bool = False
    differentiable: bool = True

    @property
    def letters(self) -> str:
        """A letter for each dim in the pattern of an optional array: ``b`` stands for [...]."""
        return f"b{self.dims}"


def _term(dims: str, item: str, dtype: _DType) -> Operand:
    return Operand(dims, item, dtype, optional=True, differentiable=dtype == "floating")


# In the order in which they are passed on.
OPERANDS: dict[str, Operand] = {
    "query": Operand("thk"),
    "key": Operand("snk"),
    "value": Operand("snv"),
    "bias": _term("hts", "bias", "floating"),
    "mask": _term("hts", "mask", "boolean"),
    "query_seq_lengths": _term("", "q_lengths", "integer"),
    "key_value_seq_lengths": _term("", "kv_lengths", "integer"),
    "query_segment_ids": _term("t", "q_segments", "integer"),
    "key_value_segment_ids": _term("s", "kv_segments", "integer"),
    "query_offset": _term("", "offset", "integer"),
    "alibi_slopes": _term("h", "alibi", "floating"),
    "dropout_bits": _term("ht", "dropout", "bits"),
}

TERMS: dict[str, Operand] = {name: one for name, one in OPERANDS.items() if one.optional}
"""Those that a call may be without. Their patterns are a Workload's fields of the same names."""


def pattern_of(name: str, sizes: tuple[int, ...]) -> str:
    """The pattern of an array of these sizes, one for each letter: "1" where it is of size one."""
    letters = TERMS[name].letters
    return "".join("1" if size == 1 else one for one, size in zip(letters, sizes, strict=True))
