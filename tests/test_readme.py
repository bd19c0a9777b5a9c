"""README: its command lines are understood, its Python runs, its links and figures hold."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import autochunk
from autochunk.cli import main
from autochunk.store import bundle, merge
from autochunk.tuner.presets import PRESETS, workloads_of
from autochunk.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "profiles" / "README.md")
README = DOCUMENTS[0].read_text()
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A command starts its line or span, or stands behind a path, a host or a separator.
COMMAND = re.compile(r"(?:^|[\s/])autochunk ([a-z]+(?: [^\n|;&#)]*)?)", re.MULTILINE)
# Words that stand for something of the reader's, and what they might be.
STANDS_FOR = {"SHAPE": "t=64", "NAME": "transition", "URL": "/tmp/tune.journal"}


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return [code for found, code in FENCED.findall(text) if found == language]


def command_lines() -> list[str]:
    """What follows ``autochunk`` in blocks and in spans of code, tables included, once each."""
    lines: dict[str, None] = {}
    for document in DOCUMENTS:
        text = document.read_text()
        joined = "\n".join(blocks("sh", text)).replace("\\\n", " ")
        spans = re.findall(r"`([^`]+)`", FENCED.sub("", text))
        commands = COMMAND.findall(joined)
        for span in spans:
            commands += COMMAND.findall(" ".join(span.split()))
        lines |= dict.fromkeys(" ".join(command.split()) for command in commands)
    return list(lines)


def deployed_lines() -> list[str]:
    """The same in what examples deploy."""
    lines = []
    for name in ("tune-job.yaml", "watch-cronjob.yaml"):
        joined = (ROOT / "examples" / name).read_text().replace("\n", " ")
        lines += re.findall(r"autochunk ((?:tune|watch) [^|]*) \|\|", joined)
    unit = (ROOT / "examples" / "autochunk-watch.service").read_text()
    lines += re.findall(r"^ExecStart=\S*/autochunk (.*)$", unit, re.MULTILINE)
    assert len(lines) == 3
    return lines


def words_of(line: str) -> list[str]:
    """A line as the shell hands it on, with something for the words that stand for others."""
    words = shlex.split(line.replace("$storage", STANDS_FOR["URL"]))
    return [STANDS_FOR.get(word, word) for word in words]


@pytest.mark.parametrize("line", command_lines() + deployed_lines())
def test_commands_are_understood(line: str) -> None:
    """Their options, the values of these, shapes and presets are all there are."""
    name, *words = words_of(line)
    command = main.commands[name]
    if not words:  # only spoken of
        return
    given = command.make_context(name, words).params
    if "presets" in given:  # of a command that reads whole workloads
        workloads_of(given["shapes"], given["dtypes"] or ("float32",))
        for shape in given.get("beside", ()):
            Workload.parse(shape)
    else:
        merge.select([], shapes=given.get("shapes", ()))


def test_commands_are_found() -> None:
    """In blocks, in tables, behind a path, on the second line of a command and of a paragraph."""
    found = command_lines()
    assert {line.split()[0] for line in found} == set(main.commands)
    assert "show --plot t=4096,mode=training" in found
    assert sum("--effort thorough --storage $storage" in line for line in found) == 1
    assert any(line.startswith("report profiles/overview-h100.svg --from") for line in found)


QUICK = re.compile(r"(show|evaluate|explain .*--shape [^A-Z]*)( --stale| --memory)?$")


@pytest.mark.parametrize("line", [line for line in command_lines() if QUICK.match(line)])
def test_quick_commands_run(line: str) -> None:
    """Those that only look run as they are written."""
    done = CliRunner().invoke(main, words_of(line))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("example", re.findall(r"examples/\S+?\.(?:py|yaml|service)", README))
def test_examples_are_there(example: str) -> None:
    """README names no example that is gone, and every one that there is."""
    assert (ROOT / example).is_file()
    for script in (ROOT / "examples").glob("*.py"):
        assert script.name in README or script.name == "measuring.py"


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)\s]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    """To a file of the repository, or to a heading of README."""
    if not target.startswith("#"):
        # Those of a source distribution go by the package that is installed.
        installed = Path(autochunk.__file__).parent.parent
        assert ((installed if target.startswith("autochunk/") else ROOT) / target).exists()
        return
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", README), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert target[1:] in anchors


def test_every_preset_is_named() -> None:
    """In the table of commands."""
    assert [name for name in PRESETS if f"`{name}`" not in README] == []


def names() -> dict[str, Any]:
    """What README's Python takes for granted: the reader's arrays, functions and models, small."""

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)

    def attend(x: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(x, x, x)

    def attention() -> hk.MultiHeadAttention:
        return hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())

    model = hk.transform(lambda x: attention()(x, x, x))
    x, rng = array(2, 8, 8), jax.random.key(0)
    step: Callable[..., Any] = lambda state, batch: state * attend(batch).sum()  # noqa: E731
    arrays = {"query": array(2, 8, 2, 4), "value": array(2, 8, 2, 4), "batch": array(2, 8, 2, 4)}
    arrays |= {"mask": jnp.tri(8, dtype=bool)[None, None], "state": jnp.ones(()), "w": array(8, 8)}
    functions = {"train_step": step, "loss": step, "model": model, "params": model.init(rng, x)}
    modules = {"jax": jax, "autochunk": autochunk}
    return {**arrays, **functions, **modules, "rng": rng, "key": rng, "x": x, "position": 7}


def of_flax(scope: dict[str, Any]) -> None:
    pytest.importorskip("flax")
    from flax import linen, nnx

    scope |= {"nnx": nnx, "linen": linen, "rngs": nnx.Rngs(0)}


def of_equinox(scope: dict[str, Any]) -> None:
    equinox = pytest.importorskip("equinox")
    scope["model"] = equinox.nn.MultiheadAttention(2, 8, key=scope["key"])


def of_heads(scope: dict[str, Any]) -> None:
    scope["key"] = scope["query"]  # an array of keys, not of random numbers


def of_jax_nn(scope: dict[str, Any]) -> None:
    scope |= {"model": lambda x: jax.nn.dot_product_attention(x, x, x), "x": scope["query"]}


def of_functions(scope: dict[str, Any]) -> None:
    scope |= {"transition": lambda x, w: x @ w, "loss": jnp.sum, "fn": lambda z, a, b: z + a + b}


PRELUDES = {  # by what a block has in it; the first that fits
    "autochunk.flax": of_flax,
    "autochunk.equinox": of_equinox,
    "patch_jax_nn": of_jax_nn,
    "autochunk.chunked": of_functions,
    "dot_product_attention": of_heads,
}


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[-2][:40])
def test_python_runs(code: str) -> None:
    """Each block, with what it takes for granted and nothing of the blocks before it."""
    scope = names()
    for word, prelude in PRELUDES.items():
        if word in code:
            prelude(scope)
            break
    run = compile(code, "README.md", "exec")
    made_at_once = re.search(r"^attention = autochunk\.Multi", code, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()):
        if made_at_once:  # a module of haiku's, which is made inside of a model
            hk.transform(lambda: exec(run, scope)).init(None)
        else:
            exec(run, scope)
    if "apply = autochunk.chunked" in code:
        applied = jax.jit(scope["apply"])(scope["x"], scope["w"])
        np.testing.assert_allclose(applied, scope["x"] @ scope["w"], atol=1e-5)


def test_auto_is_what_the_profile_recommends() -> None:
    """In the table of a GPU "auto" runs the fastest kernel of the profile that ships, within 2%."""
    start = README.index("| `autochunk bench --dtype bfloat16` (last row")
    table, *_ = README[start:].split("\n\n")
    row = r"^\| `--mode (\S+) --shape (\S+)`(, float32)? .*\*\*, (\w+) \|$"
    rows = re.findall(row, table, re.MULTILINE)
    assert len(rows) == table.count("**, ") >= 7
    profiles = {
        profile.workload: profile
        for profile in bundle.read(ROOT / "profiles" / "nvidia-h100.json").profiles
    }
    for mode, shape, wide, kernel in rows:
        dtype = "float32" if wide else "bfloat16"
        profile = profiles[Workload.parse(shape, dtype=dtype, mode=mode).key]
        finished = [one for one in profile.measurements if one.status == "ok"]
        most = 1.02 * min(one.ratio for one in finished)
        fast = [one.implementation for one in finished if one.ratio <= most]
        assert any(kernel.lower() in name for name in fast), shape
