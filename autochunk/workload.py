"""A Workload: one tunable attention call, and the one text that names it.

The same grammar serves the store's keys and the command line's ``--shape``: ``name=value`` items
between commas. The key spells every item, in one order, so that equal workloads have equal keys; a
shape may leave items out. Both are written by ``Workload.key`` / ``Workload.shape`` and read by
``Workload.parse``.
"""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autochunk.blocks import reach_of
from autochunk.errors import WorkloadError
from autochunk.operands import OPERANDS, TERMS

Mode = Literal["forward", "training"]
DType = Literal["float32", "bfloat16", "float16", "float64"]

MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES: tuple[DType, ...] = get_args(DType)

_LONGEST_QUOTE = 400  # no shape is longer

# Larger than any array that a device can hold; keeps products of sizes far from overflow in other
# readers of the key.
_Size = Annotated[int, Field(ge=1, le=2**40)]

# What the text calls each field, in the key's order.
_ITEMS = {
    "b": "batch",
    "t": "query_length",
    "s": "key_length",
    "h": "num_heads",
    "kv_heads": "num_kv_heads",
    "k": "key_size",
    "v": "value_size",
    "dtype": "dtype",
    "causal": "causal",
    "mask": "mask",
    "bias": "bias",
    "mode": "mode",
}
# Later ones, which a key has only where a call has them: keys from before stay as they are.
_LATER = {
    **{one.item: name for name, one in TERMS.items() if one.item not in _ITEMS},
    "window": "window",
    "soft_cap": "soft_cap",
    "residual": "residual",
    "precision": "precision",
}
_ALL_ITEMS = {**_ITEMS, **_LATER}
_FLAGS = ("causal", "soft_cap", "residual")
_TEXTS = ("dtype", "mode", "window", "precision", *(one.item for one in TERMS.values()))
_BOOLEANS = {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False}
_PREFIX = "attention:"


class Workload(BaseModel):
    """One tunable attention call.

    Sizes are element counts: ``batch`` is the product of the leading dims, ``query_length`` is T'
    (``t`` in texts), ``key_length`` is T (``s``), ``num_heads`` is H and ``num_kv_heads`` divides
    it. ``mask`` and ``bias`` are ``"none"`` or four letters for the dims [batch, heads, query, key]
    with ``1`` where the array broadcasts: ``"b1ts"`` is a mask per batch element, shared by the
    heads. The other arrays that a call may have are named in the same way by their own dims
    (``"b"``, ``"bt"``, ``"bs"``, ``"bh"``, ``"bht"``), and ``"yes"`` is the whole pattern.
    ``causal`` is the op's ``is_causal``, ``window`` its ``local_window_size`` as ``"left:right"``,
    ``residual`` its ``return_residual``; ``soft_cap`` says whether there is one. ``precision`` is
    that of ``jax.lax``, such as ``"highest"``.

    Raises:
      WorkloadError: from ``make`` and ``parse``; says which item is wrong.

    Example:
      >>> import autochunk
      >>> workload = autochunk.Workload.parse("b=2,t=1024,h=8,k=64", mode="training")
      >>> print(workload.tune_command)
      autochunk tune --shape b=2,t=1024,s=1024,h=8,k=64 --dtype float32 --mode training
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    op: Literal["attention"] = "attention"
    batch: _Size = 1
    query_length: _Size
    key_length: _Size
    num_heads: _Size = 1
    num_kv_heads: _Size
    key_size: _Size
    value_size: _Size
    dtype: DType = "float32"
    causal: bool = False
    mask: str = "none"
    bias: str = "none"
    mode: Mode = "forward"
    query_seq_lengths: str = "none"
    key_value_seq_lengths: str = "none"
    query_segment_ids: str = "none"
    key_value_segment_ids: str = "none"
    query_offset: str = "none"
    alibi_slopes: str = "none"
    dropout_bits: str = "none"
    window: str = "none"
    soft_cap: bool = False
    residual: bool = False
    precision: Annotated[str, Field(pattern="^[a-z0-9_-]{1,60}$")] = "default"

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        for name, source, default in (
            ("key_length", "query_length", None),
            ("num_kv_heads", "num_heads", 1),
            ("value_size", "key_size", None),
        ):
            data.setdefault(name, data.get(source, default))
        sizes = {"b": 1, "h": 1} | {item: data[field] for item, field in _sizes_in(data)}
        for name in TERMS:
            data[name] = _canonical_pattern(name, data.get(name, "none"), sizes)
        data["window"] = _canonical_window(data.get("window", "none"))
        return data

    @model_validator(mode="after")
    def _check_heads(self) -> Workload:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"h={self.num_heads} is not a multiple of kv_heads={self.num_kv_heads}"
            )
        if (self.query_segment_ids == "none") != (self.key_value_segment_ids == "none"):
            raise ValueError("q_segments= and kv_segments= must be given together")
        return self

    @classmethod
    def make(cls, **fields: Any) -> Workload:
        """Builds a Workload from its fields.

        ``key_length``, ``num_kv_heads`` and ``value_size`` may be left out.

        Raises:
          WorkloadError: a field is missing, unknown or out of range.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise WorkloadError(_explain(error)) from None

    @classmethod
    def parse(cls, text: str, **defaults: Any) -> Workload:
        """Reads a key, or a shape such as ``b=1,t=4096,s=4096,h=8,k=64``.

        Items left out come from ``defaults`` (fields, by name).

        Raises:
          WorkloadError: an item is unknown, given twice or out of range, or ``t`` or ``k`` is
            missing.
        """
        fields = dict(defaults)
        given: set[str] = set()
        quoted = _quoted(text)
        for item in text.removeprefix(_PREFIX).split(","):
            name, equals, value = item.strip().partition("=")
            if not equals or name not in _ALL_ITEMS:
                raise WorkloadError(
                    f"{quoted}: {_quoted(item.strip())} is not an item of a shape; items are "
                    f"NAME=VALUE between commas, NAME one of {', '.join(_ALL_ITEMS)}"
                )
            if name in given:
                raise WorkloadError(f"{quoted}: {name}= is given twice")
            given.add(name)
            fields[_ALL_ITEMS[name]] = _read_value(text, name, value)
        missing = [name for name in ("t", "k") if _ITEMS[name] not in fields]
        if missing:
            raise WorkloadError(
                f"{quoted}: {' and '.join(f'{name}=' for name in missing)} must be given; for "
                "example b=1,t=4096,h=8,k=64"
            )
        try:
            return cls.make(**fields)
        except WorkloadError as error:
            raise WorkloadError(f"{quoted}: {error}") from None

    @property
    def key(self) -> str:
        """The canonical text of this workload; ``Workload.parse`` reads it back."""
        later = {item: field for item, field in _LATER.items() if self._has(field)}
        return _PREFIX + ",".join(
            f"{item}={_text(getattr(self, field))}" for item, field in {**_ITEMS, **later}.items()
        )

    def _has(self, field: str) -> bool:
        """Whether a field is not as it is by default."""
        return bool(getattr(self, field) != type(self).model_fields[field].default)

    @property
    def shape(self) -> str:
        """The shortest ``--shape`` that, with ``--dtype`` and ``--mode``, names this workload."""
        implied = {
            "kv_heads": self.num_heads,
            "v": self.key_size,
            "causal": False,
            "mask": "none",
            "bias": "none",
            "dtype": self.dtype,
            "mode": self.mode,
        }
        later = {item: field for item, field in _LATER.items() if self._has(field)}
        return ",".join(
            f"{item}={_text(getattr(self, field))}"
            for item, field in {**_ITEMS, **later}.items()
            if getattr(self, field) != implied.get(item)
        )

    @property
    def family(self) -> str:
        """All of the key but its sizes: workloads of one family differ in nothing else."""
        return split_key(self.key)[1]

    @property
    def tune_command(self) -> str:
        """The command line that tunes this workload."""
        return f"autochunk tune --shape {self.shape} --dtype {self.dtype} --mode {self.mode}"

    def operand_shape(self, name: str) -> tuple[int, ...] | None:
        """Sizes [batch, ...] of one of OPERANDS, 1 where it broadcasts; None if it is not there."""
        letters: str = getattr(self, name) if name in TERMS else OPERANDS[name].letters
        if letters == "none":
            return None
        sizes = {"1": 1, "n": self.num_kv_heads}
        return tuple(sizes.get(letter) or getattr(self, _ITEMS[letter]) for letter in letters)

    def with_mode(self, mode: Mode) -> Workload:
        """The same call in another mode."""
        return self if mode == self.mode else self.model_copy(update={"mode": mode})

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """How many positions to its left and right a query sees; None is all."""
        window = None
        if self.window != "none":
            left, right = map(int, self.window.split(":"))
            window = left, right
        return reach_of(window, self.causal)

    @property
    def covering(self) -> list[str]:
        """Names of the arrays by which blocks are known to have no visible key, or only such."""
        names = [name for name in TERMS if name.endswith(("_seq_lengths", "_segment_ids"))]
        own = [name for name in names if getattr(self, name) != "none"]
        return [*own, "mask"] if self.mask != "none" and self.mask[2] == "1" else own

    @property
    def has_row_mask(self) -> bool:
        """Whether a mask says of each row on its own which keys it sees."""
        return self.mask[2:] == "ts" and 1 not in (self.query_length, self.key_length)

    @property
    def logits_itemsize(self) -> int:
        """Bytes of one logit: half-precision inputs have float32 logits."""
        return 8 if self.dtype == "float64" else 4

    @property
    def logits_bytes(self) -> int:
        """Bytes of the whole logits array [batch, H, T', T]."""
        return (
            self.batch * self.num_heads * self.query_length * self.key_length * self.logits_itemsize
        )


def _sizes_in(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(item, field) of each size that is given."""
    return ((item, field) for item, field in _ITEMS.items() if field in data)


def _canonical_pattern(name: str, pattern: Any, sizes: Mapping[str, Any]) -> Any:
    """Writes ``1`` for dims of size one, which cannot be told from broadcast ones."""
    if pattern == "none" or not isinstance(pattern, str):
        return pattern
    letters, item = TERMS[name].letters, TERMS[name].item
    pattern = letters if pattern == "yes" else pattern
    if not re.fullmatch("".join(f"[{letter}1]" for letter in letters), pattern):
        if len(letters) == 4:
            raise ValueError(
                f"{item}={_quoted(pattern)} is neither 'none' nor four letters like b1ts ('1' "
                "where the array broadcasts over batch, heads, t or s)"
            )
        raise ValueError(
            f"{item}={_quoted(pattern)} is neither 'none' nor 'yes' nor a pattern like {letters} "
            "('1' where the array broadcasts)"
        )
    return "".join("1" if sizes.get(letter) == 1 else letter for letter in pattern)


def _canonical_window(window: Any) -> Any:
    """Writes both sides: "256" is "256:256"."""
    if window == "none" or not isinstance(window, str):
        return window
    if not re.fullmatch("[0-9]{1,12}(:[0-9]{1,12})?", window):
        raise ValueError(
            f"window={_quoted(window)} is neither 'none' nor positions to both sides like 256 or "
            "255:0"
        )
    sides = [str(int(side)) for side in window.split(":")]
    return ":".join(sides if len(sides) == 2 else sides * 2)


def _text(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


LATER_DEFAULTS = {
    item: _text(Workload.model_fields[field].default) for item, field in _LATER.items()
}
"""What keys that lack one of the later items mean by it, as texts."""


def key_items(text: str) -> dict[str, str]:
    """The ``name=value`` items of a key or a shape, as texts and unchecked."""
    pairs = (item.partition("=") for item in text.removeprefix(_PREFIX).split(","))
    return {name.strip(): value.strip() for name, _, value in pairs}


@functools.lru_cache(maxsize=100_000)
def split_key(key: str) -> tuple[tuple[int, ...], str]:
    """(sizes, everything else) of a key as ``Workload.key`` writes it; no sizes for another text.

    It is quicker than ``Workload.parse``.
    """
    sizes, comma, rest = key.removeprefix(_PREFIX).partition(",dtype=")
    numbers = [item.partition("=")[2] for item in sizes.split(",")]
    if not comma or not all(number.isdecimal() for number in numbers):
        return (), key
    return tuple(map(int, numbers)), rest


def _read_value(text: str, name: str, value: str) -> Any:
    value = value.strip()
    if name in _FLAGS:
        if value.lower() not in _BOOLEANS:
            raise WorkloadError(f"{_quoted(text)}: {name}={_quoted(value)} is neither yes nor no")
        return _BOOLEANS[value.lower()]
    if name in _TEXTS:
        return value
    if not re.fullmatch("[0-9]{1,15}", value):
        said = f"{name}={_quoted(value)} is not a whole number of at least 1"
        raise WorkloadError(f"{_quoted(text)}: {said}")
    return int(value)


def _quoted(value: object) -> str:
    """A value as an error shows it: of what is very long, both ends."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = _LONGEST_QUOTE
    return short.repr(value)


def _explain(error: ValidationError) -> str:
    names = {field: item for item, field in _ALL_ITEMS.items()}
    details = []
    for problem in error.errors(include_url=False):
        location = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        details.append(
            f"{names.get(location, location)}={_quoted(problem['input'])}: {message}"
            if location
            else message
        )
    return "; ".join(details)
