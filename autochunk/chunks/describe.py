"""Describes a call of a function: its key, and a fingerprint of what it computes."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import jax

from autochunk.chunks.axes import Axes
from autochunk.chunks.call import Call
from autochunk.errors import WorkloadError
from autochunk.functions import FunctionCall, usable_name
from autochunk.workload import Mode

_MOST = 6  # arrays that are told one by one
_ADDRESS = re.compile(r"0x[0-9a-f]+")
# The plans of autochunk's own attention, which tuning and budgets change.
_PLANS = re.compile(r"plans=Plans\(.*?, window=", re.DOTALL)


def described(call: Call, mode: Mode = "forward") -> FunctionCall | None:
    """The call as the store knows it; None where its sizes are symbolic.

    Arrays that a function closes over are not among its arguments; the fingerprint shows that they
    are there.
    """
    if call.symbolic or 0 in call.lengths:
        return None
    pairs = zip(call.arrays, call.inputs, strict=True)
    try:
        return FunctionCall.make(
            name=usable_name(call.settings.name),
            lengths="x".join(map(str, call.lengths)),
            arguments=_arguments([_array(array, dims) for array, dims in pairs]),
            mode=mode,
            fingerprint=fingerprint(call.traced),
        )
    except WorkloadError:
        return None


def _arguments(each: list[str]) -> str:
    if len(each) <= _MOST:
        return ";".join(each)
    digest = hashlib.sha256(";".join(each).encode()).hexdigest()[:16]
    return ";".join([*each[:_MOST], f"{len(each) - _MOST}_more", digest])


def _array(array: jax.Array, dims: Axes) -> str:
    shape = ".".join(map(str, array.shape))
    chunked = ".".join("-" if dim is None else str(dim) for dim in dims)
    return f"{array.dtype}[{shape}]" + ("" if set(dims) == {None} else f"@{chunked}")


def fingerprint(traced: Any) -> str:
    """16 hex digits of a closed jaxpr's text, in which literals are the only values.

    Addresses of objects, which differ from process to process, and plans of attention are removed;
    variables are named in order of appearance. Another version of JAX may print another text.
    """
    text = _PLANS.sub("", _ADDRESS.sub("", str(traced.jaxpr)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
