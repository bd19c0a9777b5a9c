"""Functions that are not attention, measured: from a program, in a worker, or where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_call, make_function_profile, quick_jit, run_python
from hypothesis import given
from hypothesis import strategies as st

import autochunk
from autochunk.chunks.chunked import call_of
from autochunk.chunks.describe import described
from autochunk.chunks.export import description, drawn, exported
from autochunk.chunks.gradients import has_gradients
from autochunk.errors import ArgumentError, MissWarning, StaleWarning
from autochunk.plan import Plan
from autochunk.store.choice import DENSE
from autochunk.store.profiles import ProfileStore
from autochunk.store.programs import Programs
from autochunk.tuner.functions.candidates import Candidates
from autochunk.tuner.functions.subject import (
    Subject,
    as_numbers,
    deviation,
    of_program,
    tolerance_of,
)
from autochunk.tuner.functions.tune import Limits, tune_missed
from autochunk.tuner.functions.worker import plan_of
from autochunk.tuner.reference import error_of_product
from autochunk.tuner.tune import stale_functions
from autochunk.workload import MODES


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=3))
def test_candidates(lengths: list[int]) -> None:
    """Each once, none too small, and what is coarse among all."""
    found = Candidates(lengths, 64)
    coarse, fine = found.coarse(), found.fine()
    assert len(set(fine)) == len(fine) <= 60
    for one in (*coarse, *fine, *found.neighbours(found.whole)):
        assert all(1 <= size <= length for size, length in zip(one, lengths, strict=True))
        chunks = [-(-length // size) for size, length in zip(one, lengths, strict=True)]
        assert 1 < np.prod(chunks) <= 64


def test_candidates_from_coarse_to_fine() -> None:
    """Powers of four from the middle; beside one what divides well, and its power of two."""
    found = Candidates([768], 1024)
    assert found.coarse() == [(32,), (128,), (8,), (512,), (2,)]
    assert set(found.neighbours((128,))) == {(192,), (96,)}


def test_a_plan_is_read_back() -> None:
    """What a worker is told is the plan."""
    for plan in (DENSE, Plan("chunks", None, (2, 3))):
        assert plan_of(plan.as_data()) == plan


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_a_program_computes_what_the_function_does(mode: Any) -> None:
    """Exported with what is around it, with sizes that are symbolic, by any plan."""
    w = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    fn = autochunk.chunked(lambda x: (jnp.sin(x @ w), x.sum()), 0, (0, None), reduce="sum")
    call = call_of(fn, (jnp.ones((7, 2)),), {})
    header, program = exported(call)
    assert header["around"] == [{"shape": [2, 2], "dtype": "float32"}]
    function, arrays = of_program(header, program)
    subject = Subject(function, arrays, mode)
    results = [
        as_numbers(jax.jit(subject.function(plan))(*subject.passed))
        for plan in (DENSE, Plan("chunks", None, (3,)))
    ]
    assert len(results[0]) == (2 if mode == "forward" else 4)
    assert deviation(results[1], results[0]) < 1e-5


def _until_small(x: jax.Array) -> jax.Array:
    """A while loop, which has no backward pass."""

    def halve(one: jax.Array) -> Any:
        return jax.lax.while_loop(lambda r: jnp.abs(r).max() > 0.5, lambda r: r / 2, one)

    found: jax.Array = jax.vmap(halve)(x)
    return found


def _by_position(x: jax.Array) -> jax.Array:
    """A loop of Python's, for which the number of positions must be one."""
    return jnp.stack([jnp.sin(x[number]) for number in range(len(x))])


def _pairs(x: jax.Array, y: jax.Array) -> jax.Array:
    """The same of two axes."""
    return jnp.stack([x * y[number][None] for number in range(len(y))], 1)


KINDS: dict[str, tuple[Any, ...]] = {
    "while loop": (_until_small, 0, 0, (2,)),
    "loop of Python": (_by_position, 0, 0, (2,)),
    "two axes": (_pairs, ((0, None), (None, 0)), (0, 1), (2, 4)),
}


@pytest.mark.parametrize(("fn", "in_axes", "out_axes", "sizes"), KINDS.values(), ids=KINDS)
def test_kinds_of_which_less_is_exported(fn: Any, in_axes: Any, out_axes: Any, sizes: Any) -> None:
    """What has no gradients leaves what it computes; what refuses symbolic sizes some that are not.

    In the second case of all chunks of the plans that are named, also those that are left.
    """
    count = len(sizes)
    args = tuple(jnp.asarray(np.random.default_rng(0).normal(size=(7, 3))) for _ in range(count))
    call = call_of(autochunk.chunked(fn, in_axes, out_axes), args, {})
    header, program = exported(call)
    assert header["gradients"] is has_gradients(call) is (fn is not _until_small)
    plans = header.get("plans", [sizes])
    assert ("plans" in header) is (fn is not _until_small)
    assert plans == sorted(plans, key=np.prod, reverse=True)
    for mode in MODES if header["gradients"] else MODES[:1]:
        subject = Subject(*of_program(header, program), mode)
        every = [DENSE, *(Plan("chunks", None, tuple(one)) for one in (plans[0], plans[-1]))]
        found = [as_numbers(quick_jit(subject.function(one))(*subject.passed)) for one in every]
        assert max(deviation(one, found[0]) for one in found) < 1e-5


def test_what_has_no_gradients_is_missed_forward_alone(store_path: Path) -> None:
    """And measured, in the sizes of which there is a program if those are few."""
    x, store, device = jnp.ones((16, 4)), ProfileStore(store_path), autochunk.detect()
    whole: Any = autochunk.chunked(_until_small, name="while loop")
    unrolled: Any = autochunk.chunked(lambda x: _by_position(x).astype(jnp.int32), name="unrolled")
    with pytest.warns(MissWarning, match="autochunk tune --missed"):
        jax.eval_shape(lambda x: (whole(x), unrolled(x.astype(jnp.int32))), x)
    assert {(one.name, one.mode) for one in store.missed_functions(device)} == {
        ("while_loop", "forward"),
        ("unrolled", "forward"),
    }
    found = tune_missed(store, Limits("quick")).profiles
    assert len(found) == 2
    assert all(one.complete for one in found)
    assert all((2,) in {m.chunk_sizes for m in one.measurements} for one in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "complex64"])
def test_arguments_of_any_dtype(dtype: str) -> None:
    """What is drawn is as described, and finite."""
    given = jnp.zeros((2, 3), dtype)
    array = drawn(description(given), 0)
    assert (array.shape, array.dtype) == (given.shape, given.dtype)
    assert np.isfinite(as_numbers([array])[0]).all()


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_keys_of_any_kind(kind: str) -> None:
    """Keys of random numbers are of the algorithm that the function had."""
    given = jax.random.split(jax.random.key(0, impl=kind), 4)
    array = drawn(description(given), 0)
    assert (array.shape, array.dtype) == (given.shape, given.dtype)


@pytest.mark.parametrize("inner", [lambda f: f, jax.jit, jax.checkpoint])
def test_what_is_computed_in_half_precision_may_differ_by_its_rounding(inner: Any) -> None:
    """Of float32 arguments, too, and wherever that is: else chunks would seem to mix positions."""

    def half(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16).sum(0).astype(jnp.float32)

    allowed = []
    for fn in (lambda x: x.sum(0), inner(half)):
        call = call_of(autochunk.chunked(fn, reduce="sum"), (jnp.ones((4, 2)),), {})
        function, arrays = of_program(*exported(call))
        allowed.append(Subject(function, arrays, "forward").tolerance)
    assert allowed[0] < 1e-3
    assert 1e-2 < allowed[1] < 0.1


def _as_tf32(left: jax.Array, right: jax.Array) -> jax.Array:
    """A product as a GPU may compute it, whose operands have ten bits after the first."""
    return jax.lax.reduce_precision(left, 8, 10) @ jax.lax.reduce_precision(right, 8, 10)


def test_a_gpus_rounding_of_products_is_no_mixing() -> None:
    """Ten layers in TF32 differ from ten in float32 by more than float32 explains, and may."""
    x, *layers = jax.random.normal(jax.random.key(0), (11, 64, 64))

    def network(multiply: Any, x: jax.Array) -> jax.Array:
        for one in layers:
            x = jnp.tanh(multiply(x, one) / 8)
        return x

    exact, rounded = (as_numbers(network(one, x)) for one in (jnp.matmul, _as_tf32))
    eps = float(jnp.finfo(jnp.float32).eps)
    allowed = tolerance_of([eps, error_of_product("float32", _as_tf32)])
    assert tolerance_of([eps]) < deviation(rounded, exact) < allowed
    mixed = as_numbers(network(jnp.matmul, x - x[:32].mean(0, keepdims=True)))
    assert deviation(mixed, exact) > allowed


@pytest.mark.parametrize("precision", [None, "highest"])
def test_the_precision_of_products_is_kept(precision: Any) -> None:
    """With a program goes in which one its float32 products are, inside of others, too."""

    def fn(x: jax.Array) -> jax.Array:
        product: jax.Array = jax.jit(lambda x: jnp.matmul(x, x.T, precision=precision))(x)
        return product.sum(1)

    header, program = exported(call_of(autochunk.chunked(fn), (jnp.ones((4, 2)),), {}))
    assert header["products"] == [precision or "default"]
    assert of_program(header, program)[0].products == header["products"]


def test_deviation() -> None:
    """Relative to the values; NaN where NaN is expected is right, elsewhere wrong."""
    nan, expected = float("nan"), [np.array([3.0, -4.0])]
    assert deviation([np.array([3.0, -4.0])], expected) == 0
    assert deviation([np.array([3.0, -3.0])], expected) == pytest.approx(1 / 5)
    assert deviation([np.array([1.0, nan])], expected) == float("inf")
    assert deviation([np.array([1.0, nan])], [np.array([1.0, nan])]) == 0
    assert deviation([np.zeros(0)], [np.zeros(0)]) == 0
    assert deviation([], []) == 0


@pytest.mark.parametrize("size", [1, 1 << 17, (1 << 17) + 1, 300_000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_deviation_of_many_values(size: int, dtype: Any) -> None:
    """However many are compared at a time, it is that of all of them at once."""
    rng = np.random.default_rng(size)
    expected = rng.normal(size=size).astype(dtype)
    received = expected + (0.01 * rng.normal(size=size)).astype(dtype)
    received[-1] = expected[-1] + 2  # the largest difference counts by its square
    one, other = (array.astype(np.float64) for array in (received, expected))
    typical = np.sqrt(np.square(one - other).mean() / np.square(other).mean())
    largest = np.abs(one - other).max() / np.abs(other).max()
    found = deviation([received.reshape(-1, 1)], [expected.reshape(-1, 1)])
    assert found == pytest.approx(max(typical, largest**2))
    received[size // 2] = np.inf
    assert deviation([received], [expected]) == float("inf")


def test_a_kink_is_no_mixing() -> None:
    """Gradients jump where a ReLU's input is rounded to its other side; a wrong edge shows."""
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(256, 1024))
    jumped, wrong = expected.copy(), expected.copy()
    jumped.flat[::50_000] += 0.1 * expected.max()
    wrong[-1] = 0
    allowed = tolerance_of([error_of_product("float32", _as_tf32)])
    assert deviation([jumped], [expected]) < allowed < deviation([wrong], [expected])


MODEL = """
import warnings
warnings.simplefilter({warnings!r})
import autochunk, jax, jax.numpy as jnp
def transition(x, w):
    return jnp.tanh(x @ w) @ w.T
def mixes(x):
    return x - x.mean(0)
x, w = jnp.ones((256, 8)), jnp.ones((8, 64))
for fn, axes, args in ((transition, (0, None), (x, w)), (mixes, 0, (x,))):
    run = autochunk.chunked(fn, axes, name=fn.__name__)
    print(str(jax.make_jaxpr(run)(*args)).count("scan"))
"""


def test_missed_in_one_process_tuned_in_another(store_path: Path) -> None:
    """The tuner has nothing of the user's code; a third process runs what was found."""
    run_python(MODEL.format(warnings="ignore"))
    kept = Programs(store_path).folder
    assert len(list(kept.iterdir())) == 2
    tune = "import sys; from autochunk.cli import main; sys.argv[1:] = sys.argv[1:]; main()"
    printed = run_python(
        tune, "tune", "--missed", "--effort", "quick", "--timeout", "200", timeout=280
    )
    assert "transition 256" in printed
    store = ProfileStore(store_path)
    profiles = store.profiles()
    assert len(profiles) == 4
    assert all(one.complete for one in profiles)
    assert not store.missed_functions(autochunk.detect())
    assert list(kept.iterdir()) == []
    mixed = [m for one in profiles if "mixes" in one.workload for m in one.measurements]
    assert {m.status for m in mixed if m.chunk_sizes} == {"inaccurate"}
    assert all("mixes positions" in m.detail for m in mixed if m.chunk_sizes)
    run_python(MODEL.format(warnings="error"))


def test_what_is_stale_is_measured_where_it_was_met(store_path: Path) -> None:
    """A program is left by whoever runs by it; other functions that were missed wait."""
    x, store, device = jnp.ones((16, 4), jnp.int32), ProfileStore(store_path), autochunk.detect()
    made: list[Any] = [autochunk.chunked(lambda x: x + 1, name=one) for one in ("met", "other")]
    met, other = made
    call = described(call_of(met, (x,), {}))
    older = device.model_copy(update={"jaxlib": "0.1.0"})
    store.put(make_function_profile(call, device=older))
    gone = make_function_profile(make_call(name="gone"), device=device, complete=False)
    store.put(gone)
    with pytest.warns(StaleWarning), pytest.warns(MissWarning):
        jax.eval_shape(lambda x: (met(x), other(x + 0.0)), x)
    assert len(store.missed_functions(device)) == 3
    assert {one.function for one in stale_functions(store, device)} == {call, gone.function}
    tuned = tune_missed(store, Limits("quick"), known_only=True)
    assert [one.function for one in tuned.profiles] == [call]
    assert (tuned.wanted, tuned.left) == (1, 0)
    assert stale_functions(store, device) == [gone]
    assert {one.name for one in store.missed_functions(device)} == {"other"}


def test_a_function_is_measured_where_it_is(store_path: Path) -> None:
    """What cannot be exported: a call back to the host, a merge of its own."""
    x = jnp.ones((32, 4))
    back = autochunk.chunked(
        lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x), name="back"
    )
    merged = autochunk.chunked(
        lambda x: jnp.exp(x).sum(0), reduce=(jnp.zeros(4), lambda a, b: a + b), name="merged"
    )
    said: list[str] = []
    given: dict[str, Any] = {"modes": ("forward",), "effort": "quick", "on_line": said.append}
    found = [*autochunk.tune_chunks(back, (x,), **given)]
    found += autochunk.tune_chunks(merged, (x,), **given)
    assert [one.complete for one in found] == [True, True]
    assert said[0].startswith("back 32 forward: ")
    assert sorted(ProfileStore(store_path).profiles(), key=str) == sorted(found, key=str)
    assert {m.status for one in found for m in one.measurements} <= {"ok", "pruned", "skipped"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fn": jnp.sin}, "what autochunk.chunked returned"),
        ({"effort": "much"}, "effort must be one of"),
        ({"modes": ()}, "modes must be some of"),
        ({"timeout": 0}, "timeout must be"),
        ({"args": (jnp.ones(()),)}, "axis 0 of"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    """Before anything is measured."""
    given = {"fn": autochunk.chunked(jnp.sin), "args": (jnp.ones(3),), **arguments}
    with pytest.raises(ArgumentError, match=message):
        autochunk.tune_chunks(**given)
