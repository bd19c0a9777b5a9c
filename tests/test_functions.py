"""The words for a function's call: its key, and what can be one."""

from __future__ import annotations

import re

import pytest
from factories import make_call
from hypothesis import given
from hypothesis import strategies as st

from autochunk.errors import WorkloadError
from autochunk.functions import FunctionCall, is_function, nameless, parsed, unchanging, usable_name
from autochunk.workload import Workload


@given(st.text(), st.lists(st.integers(1, 10**6), min_size=1, max_size=3))
def test_a_key_is_read_back(name: str, lengths: list[int]) -> None:
    """Whatever a function is called, its key is one line and names it."""
    call = make_call(name=usable_name(name), lengths="x".join(map(str, lengths)))
    assert FunctionCall.parse(call.key) == parsed(call.key) == call
    assert call.sizes == tuple(lengths)
    assert not re.search(r"[\s|]", call.key)


def test_a_name_is_kept() -> None:
    """What Python calls functions can be in a key."""
    assert usable_name("model.make.<locals>.<lambda>") == "model.make.<locals>.<lambda>"
    assert usable_name("a, b|c=\n") == "a__b_c__"
    assert usable_name("") == "_"


def test_kinds_are_told_apart() -> None:
    """A key says of which kind its workload is."""
    attention = Workload.parse("t=8,k=8")
    assert not is_function(attention.key)
    assert parsed(attention.key) == attention
    with pytest.raises(WorkloadError, match="not an item of a shape"):
        Workload.parse(make_call().key)


@pytest.mark.parametrize(
    "key",
    [
        "function:",
        "attention:b=1",
        make_call().key.replace("lengths=64,", ""),
        make_call().key.replace("lengths=64", "lengths=0"),
        make_call().key.replace("lengths=64", "lengths=64,lengths=64"),
        make_call().key.replace("fingerprint=01", "fingerprint=xx"),
        make_call().key.replace("forward", "backward"),
        make_call().key + ",more=1",
    ],
)
def test_what_is_no_key(key: str) -> None:
    """Everything else is refused."""
    with pytest.raises(WorkloadError):
        FunctionCall.parse(key)


def test_keys_are_compared_in_parts() -> None:
    """The same by another name; the same by this name, and changed."""
    named, changed = make_call(name="other"), make_call(fingerprint="f" * 16)
    assert nameless(named.key) == nameless(make_call().key) != nameless(changed.key)
    assert unchanging(changed.key) == unchanging(make_call().key) != unchanging(named.key)
