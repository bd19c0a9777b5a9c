"""The examples run, at a small size, and do what they say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from factories import quick_jit

import autochunk

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)  # they import what they share, as when they are run
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def run(name: str, options: str) -> str:
    """What an example prints, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return done.stdout


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
def test_the_transformer_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps on the standard library's docstrings lower the loss."""
    example = load("transformer", monkeypatch)
    sizes = {"steps": 12, "batch": 4, "length": 32, "layers": 1, "heads": 2, "key_size": 8}
    losses = example.train(**sizes, learning_rate=1e-2)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
def test_the_long_input_runs_short() -> None:
    """Every kind of attention gives a time and a memory at a small size, in its own process."""
    options = "--length 64 --size 32 --heads 2 --key-size 8 --rounds 1"
    printed = run("long_input", options)
    kinds = re.findall(r"^(\w.*?)  +[\d.]+ ms .* MB$", printed, re.MULTILINE)
    assert kinds == ["dense", "row loop", "1000 MB", "auto"]


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
def test_the_long_inputs_kinds_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of attention that are compared compute the same from the same parameters."""
    example = load("long_input", monkeypatch)
    sizes = example.Sizes(length=40, size=16, heads=2, key_size=8)
    x = np.random.default_rng(0).standard_normal((1, 40, 16), np.float32)
    parameters = example.module("dense", sizes).init(jax.random.key(0), x)
    outputs = [example.module(kind, sizes).apply(parameters, x) for kind in example.KINDS]
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-5)


def test_the_long_gpu_example_runs_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on any device where it is not asked to limit a GPU's memory."""
    example = load("long_gpu", monkeypatch)
    seconds = example.run(length=64, heads=2, key_size=8, max_chunk_size_mb=0.01, repeats=1)
    assert set(seconds) == {"forward", "training"}


@pytest.mark.gpu
def test_the_long_gpu_example_keeps_to_its_limit() -> None:
    """At a fifth of the length, 1.5 GB for what needs 4.6 GB."""
    printed = run("long_gpu", "--length 6000 --memory-gb 1.5 --max-chunk-size-mb 100")
    assert all(float(peak) < 1.5 for peak in re.findall(r"at most ([\d.]+) GB", printed))


VIT = {"layers": 1, "heads": 2, "size": 16, "pixels": 8, "patch": 4, "batch": 32}
GPT = {"layers": 1, "heads": 2, "size": 16, "length": 24, "batch": 4}


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
def test_the_gpt_learns_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with dropout lowers the loss; decoding gives what the whole text gives."""
    example = load("nnx_gpt", monkeypatch)
    model, losses = example.train(example.Sizes(**GPT), steps=8, learning_rate=1e-2)
    assert losses[-1] < losses[0] - 0.3
    prompt = np.frombuffer(b"Return", np.uint8)[None]
    written = example.write(model, prompt, 24)
    assert (written[:, :6] == prompt).all()
    likeliest = np.argmax(model(written[:, :-1]), axis=-1)
    np.testing.assert_array_equal(likeliest[:, 5:], written[:, 6:])


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
def test_the_vision_transformer_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patched model trains, with dropout."""
    example = load("equinox_vit", monkeypatch)
    _, losses = example.train(example.Sizes(**VIT), steps=15, learning_rate=1e-2)
    assert losses[-1] < losses[0] - 0.3


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KINDS: dict[str, dict[str, Any]] = {
    "nnx_gpt": GPT | {"dropout": 0.0},
    "equinox_vit": VIT | {"dropout": 0.0},
    "evoformer": {
        "residues": 7,
        "sequences": 6,
        "msa_size": 8,
        "pair_size": 8,
        "head_size": 4,
        "outer_size": 4,
    },
}


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
@pytest.mark.parametrize(("name", "sizes"), KINDS.items(), ids=KINDS.keys())
def test_kinds_that_are_compared_agree(
    name: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kinds of an example's step give the same."""
    monkeypatch.setenv("AUTOCHUNK_PROGRAMS", "no")  # which take time, and nobody measures
    example = load(name, monkeypatch)
    found = []
    for kind in example.KINDS:
        step, arguments = example.make(kind, example.Sizes(**sizes))
        found.append(jax.tree.leaves(jax.jit(step, compiler_options=QUICK)(*arguments)))
    for other in found[1:]:
        for received, expected in zip(other, found[0], strict=True):
            np.testing.assert_allclose(received, expected, atol=1e-4, rtol=1e-3)


def test_a_comparison_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A time and a memory of every kind, each from a process of its own."""
    monkeypatch.setenv("AUTOCHUNK_PROGRAMS", "no")
    example = load("evoformer", monkeypatch)
    sizes = example.Sizes(**KINDS["evoformer"])
    example.compare(example.make, ["dense", "subbatch"], sizes, repeats=1, rounds=1)
    printed = capsys.readouterr().out
    kinds = re.findall(r"^(\w+) +[\d.]+ ms +\d+ MB   [\d.]+ of the time", printed, re.MULTILINE)
    assert kinds == ["dense", "subbatch"]


def test_every_example_is_tested() -> None:
    """A new example needs a test here."""
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"measuring"}  # which three import
    assert names == {"transformer", "long_input", "long_gpu", "functions", *KINDS}


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
def test_the_ways_of_a_function_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a line, the best chunk of an exhaustive search and that within a budget, too."""
    example = load("functions", monkeypatch)
    task = example.tasks(size=6, points=10, samples=32)["gram"]
    found = example.measure("gram", task, "training", 1)
    printed = "\n".join(example.lines("gram", "training", found))
    every = re.findall(r"^gram +training +(\w.*?)  +[\d.]+ MB +[\d.]+ ms ", printed, re.MULTILINE)
    assert every[:-1] == list(example.ways("gram", task))
    assert every[-1].startswith("best of all: ")


def test_functions_are_the_same_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared computes the same: whole, mapped, in sub-batches, in chunks."""
    example = load("functions", monkeypatch)
    for name, task in example.tasks(size=6, points=10, samples=32).items():
        with autochunk.use(chunk_size=4):
            ways = example.ways(name, task).items()
            found = {way: quick_jit(run)(*task.args) for way, run in ways}
        for way, result in found.items():
            expected = found["whole"]
            np.testing.assert_allclose(
                result, expected, rtol=1e-3, atol=1e-4, err_msg=f"{name} {way}"
            )
