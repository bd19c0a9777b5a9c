"""The one text that names a workload: keys and shapes, read and written."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autochunk.errors import WorkloadError
from autochunk.workload import DTYPES, MODES, Workload

LARGEST = 2**40
ITEMS = ("b", "t", "s", "h", "kv_heads", "k", "v", "dtype", "causal", "mask", "bias", "mode")

sizes = st.one_of(st.integers(1, 8), st.integers(1, LARGEST))
letters = [st.sampled_from((letter, "1")) for letter in "bhts"]
patterns = st.one_of(st.just("none"), st.tuples(*letters).map("".join))


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Any workload there can be."""
    kv_heads = draw(st.one_of(st.integers(1, 8), st.integers(1, 2**20)))
    return Workload.make(
        batch=draw(sizes),
        query_length=draw(sizes),
        key_length=draw(sizes),
        num_heads=kv_heads * draw(st.one_of(st.integers(1, 8), st.integers(1, 2**20))),
        num_kv_heads=kv_heads,
        key_size=draw(sizes),
        value_size=draw(sizes),
        dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.booleans()),
        mask=draw(patterns),
        bias=draw(patterns),
        mode=draw(st.sampled_from(MODES)),
    )


def items_of(workload: Workload) -> dict[str, str]:
    """The items of a workload's key, in their order."""
    text = workload.key.removeprefix("attention:")
    return dict(item.split("=") for item in text.split(","))


@given(workloads())
def test_key_round_trip(workload: Workload) -> None:
    """A key names its workload: reading it back gives an equal workload with the same key."""
    again = Workload.parse(workload.key)
    assert again == workload
    assert again.key == workload.key
    assert hash(again) == hash(workload)


@given(workloads(), workloads())
def test_keys_are_injective(one: Workload, other: Workload) -> None:
    """Different workloads have different keys, equal ones the same."""
    assert (one.key == other.key) == (one == other)


@given(workloads(), st.sampled_from(ITEMS), workloads())
def test_changing_one_item_changes_the_key(workload: Workload, item: str, other: Workload) -> None:
    """No item is left out of the key."""
    items = {**items_of(workload), item: items_of(other)[item]}
    try:
        changed = Workload.parse(",".join(f"{name}={value}" for name, value in items.items()))
    except WorkloadError:
        return  # kv_heads that no longer divides
    assert (changed.key == workload.key) == (changed == workload)


@given(workloads())
def test_key_spells_every_item_in_one_order(workload: Workload) -> None:
    """Keys are a line of plain ASCII without spaces, with every item, always in the same order."""
    assert workload.key.startswith("attention:")
    assert tuple(items_of(workload)) == ITEMS
    assert workload.key.isascii()
    assert workload.key.isprintable()
    assert " " not in workload.key


@given(workloads())
def test_shape_round_trip(workload: Workload) -> None:
    """A shape, with its dtype and mode, names its workload."""
    assert Workload.parse(workload.shape, dtype=workload.dtype, mode=workload.mode) == workload


@given(workloads())
def test_shape_leaves_out_what_is_implied(workload: Workload) -> None:
    """A shape is as short as it can be: no dtype, no mode, nothing that parsing would fill in."""
    names = [item.partition("=")[0] for item in workload.shape.split(",")]
    assert names[:4] == ["b", "t", "s", "h"]
    assert "dtype" not in names
    assert "mode" not in names
    assert ("kv_heads" in names) == (workload.num_kv_heads != workload.num_heads)
    assert ("v" in names) == (workload.value_size != workload.key_size)
    assert ("causal" in names) == workload.causal
    assert ("mask" in names) == (workload.mask != "none")


@given(workloads())
def test_tune_command_names_the_workload(workload: Workload) -> None:
    """The printed command can be pasted without quoting, and its options give the workload back."""
    words = workload.tune_command.split(" ")
    assert words[:3] == ["autochunk", "tune", "--shape"]
    assert words[4::2] == ["--dtype", "--mode"]
    assert Workload.parse(words[3], dtype=words[5], mode=words[7]) == workload


@given(workloads(), st.randoms())
def test_order_of_items_does_not_matter(workload: Workload, random: Any) -> None:
    """Items may come in any order, with spaces around them."""
    items = workload.key.removeprefix("attention:").split(",")
    random.shuffle(items)
    assert Workload.parse(" , ".join(items)) == workload


def test_defaults() -> None:
    """Of what is left out, sizes are one, or s is t, kv_heads h and v k.

    The rest is float32, no mask, no bias, not causal, forward.
    """
    workload = Workload.parse("t=128,k=64")
    sizes = "b=1,t=128,s=128,h=1,kv_heads=1,k=64,v=64"
    rest = "dtype=float32,causal=no,mask=none,bias=none,mode=forward"
    assert workload.key == f"attention:{sizes},{rest}"


@pytest.mark.parametrize(
    ("shape", "field", "value"),
    [
        ("t=128,k=64,s=256", "key_length", 256),
        ("t=128,k=64", "key_length", 128),
        ("t=128,k=64,h=8", "num_kv_heads", 8),
        ("t=128,k=64,h=8,kv_heads=2", "num_kv_heads", 2),
        ("t=128,k=64,v=32", "value_size", 32),
        ("t=128,k=64,causal=yes", "causal", True),
        ("t=128,k=64,causal=TRUE", "causal", True),
        ("t=128,k=64,causal=1", "causal", True),
        ("t=128,k=64,causal=no", "causal", False),
        ("t=128,k=64,causal=0", "causal", False),
        ("t=128,k=64,dtype=bfloat16", "dtype", "bfloat16"),
        ("t=128,k=64,mode=training", "mode", "training"),
        ("t=0128,k=64", "query_length", 128),
        (f"t={LARGEST},k=64", "query_length", LARGEST),
    ],
)
def test_item(shape: str, field: str, value: object) -> None:
    """Each item sets its field; a size may be as large as 2^40."""
    assert getattr(Workload.parse(shape), field) == value


@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ("b=2,t=3,s=4,h=5", "bhts"),
        ("b=1,t=3,s=4,h=5", "1hts"),
        ("b=2,t=1,s=4,h=5", "bh1s"),
        ("b=2,t=3,s=1,h=5", "bht1"),
        ("b=2,t=3,s=4,h=1", "b1ts"),
        ("b=1,t=1,s=1,h=1", "1111"),
        ("b=2,t=1,h=5", "bh11"),  # s follows t
    ],
)
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_pattern_is_canonical(shape: str, pattern: str, name: str) -> None:
    """A dim of size one cannot be told from a broadcast one, so both are written 1."""
    workload = Workload.parse(f"{shape},k=8,{name}=bhts")
    assert getattr(workload, name) == pattern
    assert workload == Workload.parse(f"{shape},k=8,{name}={pattern}")


@pytest.mark.parametrize("shape", ["t=4,k=8", "t=4,k=8,h=2", "b=2,t=4,k=8"])
def test_pattern_is_canonical_for_sizes_left_out(shape: str) -> None:
    """A batch or head count that is left out is one, and its letter in a pattern is 1."""
    workload = Workload.parse(f"{shape},mask=bhts,bias=bhts")
    assert Workload.parse(workload.key).key == workload.key


@pytest.mark.parametrize(
    ("item", "wrong"),
    [
        ("mask", "all"),
        ("mask", "bht"),
        ("mask", "bhtss"),
        ("mask", "sthb"),
        ("mask", ""),
        ("bias", "BHTS"),
        ("bias", "b1t1\n"),
    ],
)
def test_wrong_pattern(item: str, wrong: str) -> None:
    """A pattern is 'none' or four letters; the error names the item and shows what is right."""
    with pytest.raises(WorkloadError, match=f"{item}=") as error:
        Workload.make(query_length=4, key_size=4, **{item: wrong})
    assert "b1ts" in str(error.value)


@pytest.mark.parametrize(
    ("shape", "names", "cure"),
    [
        ("t=4,k=8,x=1", "'x=1'", "NAME one of b, t, s, h"),
        ("t=4,k=8,heads=1", "'heads=1'", "kv_heads"),
        ("t=4,k=8,", "''", "NAME=VALUE"),
        ("", "''", "NAME=VALUE"),
        (",", "''", "NAME=VALUE"),
        ("t", "'t'", "NAME=VALUE"),
        ("t=4;k=8", "t=4;k=8", "not a whole number"),
        ("T=4,k=8", "'T=4'", "NAME one of"),
        ("attention:attention:t=4,k=8", "'attention:t=4'", "NAME=VALUE"),
        ("t=4,k=8,t=4", "t=", "twice"),
        ("t=4,k=8,causal=no,causal=yes", "causal=", "twice"),
        ("k=8", "t=", "must be given; for example"),
        ("t=4", "k=", "must be given; for example"),
        ("b=2", "t= and k=", "must be given; for example"),
        ("t=0,k=8", "t=0", "greater than or equal to 1"),
        ("t=4,k=0", "k=0", "greater than or equal to 1"),
        ("b=0,t=4,k=8", "b=0", "greater than or equal to 1"),
        ("s=0,t=4,k=8", "s=0", "greater than or equal to 1"),
        ("t=4,k=8,v=0", "v=0", "greater than or equal to 1"),
        ("t=-4,k=8", "t=-4", "whole number of at least 1"),
        ("t=+4,k=8", "t=+4", "whole number of at least 1"),
        ("t=4.0,k=8", "t=4.0", "whole number of at least 1"),
        ("t=4e3,k=8", "t=4e3", "whole number of at least 1"),
        ("t=0x10,k=8", "t=0x10", "whole number of at least 1"),
        ("t=1_000,k=8", "t=1_000", "whole number of at least 1"),
        ("t=٤,k=8", "t=٤", "whole number of at least 1"),
        ("t=nan,k=8", "t=nan", "whole number of at least 1"),
        ("t=,k=8", "t=", "whole number of at least 1"),
        ("t=4=4,k=8", "t=4=4", "whole number of at least 1"),
        (f"t={LARGEST + 1},k=8", f"t={LARGEST + 1}", f"less than or equal to {LARGEST}"),
        (f"t=4,k={10**14}", f"k={10**14}", f"less than or equal to {LARGEST}"),
        (f"t={'9' * 400},k=8", "t=999", "whole number"),
        ("t=4,k=8,h=8,kv_heads=3", "kv_heads=3", "h=8 is not a multiple"),
        ("t=4,k=8,h=2,kv_heads=4", "kv_heads=4", "h=2 is not a multiple"),
        ("t=4,k=8,h=2,kv_heads=0", "kv_heads=0", "greater than or equal to 1"),
        ("t=4,k=8,dtype=int8", "dtype='int8'", "'float32', 'bfloat16', 'float16' or 'float64'"),
        ("t=4,k=8,dtype=f32", "dtype='f32'", "'float32'"),
        ("t=4,k=8,dtype=", "dtype=''", "'float32'"),
        ("t=4,k=8,mode=train", "mode='train'", "'forward' or 'training'"),
        ("t=4,k=8,mask=all", "mask=all", "b1ts"),
        ("t=4,k=8,bias=some", "bias=some", "b1ts"),
        ("t=4,k=8,causal=maybe", "causal=maybe", "yes nor no"),
        ("t=4,k=8,causal=2", "causal=2", "yes nor no"),
    ],
)
def test_error_names_the_item_and_the_cure(shape: str, names: str, cure: str) -> None:
    """Every text that is no shape is a WorkloadError of one line.

    It repeats the text, names the item and says what is right.
    """
    with pytest.raises(WorkloadError) as error:
        Workload.parse(shape)
    message = str(error.value)
    assert repr(shape)[:100] in message
    assert names in message
    assert cure in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, "t="),
        ({"query_length": 4}, "k="),
        ({"query_length": 4, "key_size": 4, "sequence": 1}, "sequence="),
        ({"query_length": 4, "key_size": None}, "k="),
        ({"query_length": 4.5, "key_size": 4}, "t=4.5"),
        ({"query_length": [4], "key_size": 4}, "t="),
        ({"query_length": 4, "key_size": 4, "mask": 3}, "mask="),
        ({"query_length": 4, "key_size": 4, "batch": -1}, "b=-1"),
        ({"query_length": 4, "key_size": 4, "dtype": "int32"}, "dtype="),
        ({"query_length": 4, "key_size": 4, "op": "convolution"}, "op="),
        ({"query_length": float("nan"), "key_size": 4}, "t=nan"),
        ({"query_length": float("inf"), "key_size": 4}, "t=inf"),
        ({"query_length": 10**400, "key_size": 4}, "t="),
    ],
)
def test_make_names_the_field(fields: dict[str, Any], names: str) -> None:
    """Built from fields, a wrong one is a WorkloadError under the name that shapes have for it."""
    with pytest.raises(WorkloadError) as error:
        Workload.make(**fields)
    assert names in str(error.value)


WORDS = ("attention:", "none", "bhts", "yes", "float32", "training", "1", "4", "²", "\uff19")
SIGNS = (",", "=", "-", " ", "\n", "\0")
fragments = st.sampled_from([*(f"{item}=" for item in ITEMS), *WORDS, *SIGNS])
alike = st.lists(fragments).map("".join)
mixed = st.lists(st.one_of(fragments, st.text(max_size=3))).map("".join)


@given(st.one_of(st.text(), alike, mixed))
@example("t=1\n,k=1")
@example("\ud800")
@example("t=\x1b[31m,k=1")
def test_hostile_text_is_a_workload_error_or_a_workload(text: str) -> None:
    """Any text is a workload with a canonical key, or a WorkloadError and nothing else."""
    try:
        workload = Workload.parse(text)
    except WorkloadError:
        return
    assert Workload.parse(workload.key).key == workload.key


@pytest.mark.parametrize("text", ["t=1\n2,k=4", "t=4,k=4,causal=\x1b[31m", "t=4,k=4,mask=a\nb"])
def test_error_is_one_printable_line(text: str) -> None:
    """An error can be printed in a terminal or a log whatever the text was.

    It is one line without control characters.
    """
    with pytest.raises(WorkloadError) as error:
        Workload.parse(text)
    assert str(error.value).isprintable()


def test_defaults_fill_in_what_the_text_leaves_out() -> None:
    """Defaults are for items left out; the text wins over them."""
    workload = Workload.parse("t=4,k=8,mode=forward", mode="training", dtype="float16", batch=3)
    assert (workload.mode, workload.dtype, workload.batch) == ("forward", "float16", 3)


def test_defaults_may_give_what_must_be_given() -> None:
    """T and k may come from the defaults."""
    assert Workload.parse("b=2", query_length=4, key_size=8) == Workload.parse("b=2,t=4,k=8")


@pytest.mark.parametrize(
    ("dtype", "itemsize"), [("float32", 4), ("bfloat16", 4), ("float16", 4), ("float64", 8)]
)
def test_logits_bytes(dtype: str, itemsize: int) -> None:
    """Logits are float32 for half-precision inputs; key/value heads do not change their number."""
    workload = Workload.parse("b=2,t=3,s=5,h=6,kv_heads=2,k=7,v=11", dtype=dtype)
    assert workload.logits_itemsize == itemsize
    assert workload.logits_bytes == 2 * 6 * 3 * 5 * itemsize


@given(workloads())
def test_with_mode(workload: Workload) -> None:
    """Both modes of a call differ in nothing else, and a workload in its own mode is itself."""
    for mode in MODES:
        other = workload.with_mode(mode)
        assert other == Workload.parse(workload.key.rpartition(",")[0] + f",mode={mode}")
    assert workload.with_mode(workload.mode) == workload


@pytest.mark.parametrize(
    "change",
    [
        lambda w: setattr(w, "batch", 2),
        lambda w: delattr(w, "batch"),
        lambda w: setattr(w, "new", 2),
    ],
)
def test_workload_is_frozen(change: Callable[[Workload], None]) -> None:
    """A workload never changes, so it may be a key of a dict."""
    workload = Workload.parse("t=4,k=8")
    with pytest.raises(ValueError, match=r"frozen|no field"):
        change(workload)
    assert workload == Workload.parse("t=4,k=8")


@given(workloads())
def test_workload_survives_pickling_and_json(workload: Workload) -> None:
    """A workload goes to other processes unchanged."""
    assert pickle.loads(pickle.dumps(workload)) == workload
    assert Workload.model_validate_json(workload.model_dump_json()) == workload


LATER = {
    "kv_lengths=yes": "kv_lengths=b",
    "q_lengths=1": "q_lengths=1",
    "window=256": "window=256:256",
    "window=255:0": "window=255:0",
    "q_segments=yes,kv_segments=1s": "q_segments=bt,kv_segments=1s",
    "offset=b": "offset=b",
    "alibi=1h": "alibi=1h",
    "dropout=yes": "dropout=bht",
    "soft_cap=yes": "soft_cap=yes",
    "residual=yes": "residual=yes",
    "precision=highest": "precision=highest",
}


@pytest.mark.parametrize(("given", "written"), LATER.items())
def test_later_items_are_in_the_keys_that_need_them(given: str, written: str) -> None:
    """They come last, so that the keys of calls without them are what they always were."""
    plain = Workload.parse("b=2,t=8,h=2,k=4")
    workload = Workload.parse(f"b=2,t=8,h=2,k=4,{given}")
    assert workload.key == f"{plain.key},{written}"
    assert workload.shape.endswith(written)
    assert Workload.parse(workload.key) == workload
    assert Workload.parse(workload.shape) == workload
    assert workload != plain


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("kv_lengths=t", "neither 'none' nor 'yes' nor a pattern like b"),
        ("window=-3", "positions to both sides like 256"),
        ("window=1:2:3", "window='1:2:3'"),
        ("q_segments=yes", "must be given together"),
        ("soft_cap=50", "soft_cap='50' is neither yes nor no"),
        ("precision=", "precision"),
    ],
)
def test_wrong_later_items(item: str, said: str) -> None:
    """Errors name the item."""
    with pytest.raises(WorkloadError, match=re.escape(said)):
        Workload.parse(f"t=8,k=4,{item}")


@pytest.mark.parametrize(
    ("items", "reach", "covering"),
    [
        ("", (None, None), []),
        ("causal=yes", (None, 0), []),
        ("window=3:5", (3, 5), []),
        ("causal=yes,window=3:5", (3, 0), []),
        ("mask=11ts", (None, None), []),
        ("mask=b11s,kv_lengths=b", (None, None), ["key_value_seq_lengths", "mask"]),
    ],
)
def test_what_blocks_are_known_by(items: str, reach: object, covering: list[str]) -> None:
    """As the kernels know it of a call."""
    workload = Workload.parse(",".join(filter(None, ["b=2,t=8,h=2,k=4", items])))
    assert workload.reach == reach
    assert workload.covering == covering


@given(st.integers(1, 9), st.integers(1, 9999), st.sampled_from([1, 2, 4]), st.integers(1, 99))
def test_a_family_differs_in_sizes_only(batch: int, length: int, heads: int, size: int) -> None:
    """Whatever the sizes are; not in dtype, mode or form."""
    sizes = f"b={batch},t={length},h={4 * heads},kv_heads={heads},k={size}"
    one = Workload.parse(f"{sizes},causal=yes", mode="training")
    assert one.family == Workload.parse("t=7,k=8,causal=yes", mode="training").family
    others = [Workload.parse(sizes, mode="training"), Workload.parse(f"{sizes},causal=yes")]
    others.append(Workload.parse(f"{sizes},causal=yes", mode="training", dtype="bfloat16"))
    others.append(Workload.parse(f"{sizes},causal=yes,window=9:0", mode="training"))
    assert len({one.family, *(other.family for other in others)}) == 5


@pytest.mark.parametrize(
    "text",
    [
        "x" * 10**6,
        "t=" + "9" * 10**6,
        "t=1,k=8,mask=" + "b" * 10**6,
        "t=1,k=8,causal=" + "y" * 10**6,
    ],
)
def test_an_error_is_short_however_long_the_text(text: str) -> None:
    """It shows both ends of what is very long."""
    with pytest.raises(WorkloadError, match=r"\.\.\.") as error:
        Workload.parse(text)
    assert len(str(error.value)) < 3000
