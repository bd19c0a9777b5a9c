"""Who may import whom: the plan of the house.

It is held by reading every source and by looking at what a fresh process loads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import run_python

import autochunk

PACKAGE = Path(autochunk.__file__).parent


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {_name(path): path for path in PACKAGE.rglob("*.py")}

WORDS = {"errors", "text", "operands", "implementations", "plan", "blocks", "workload", "functions"}
WORDS |= {"host", "nvidia", "nvml", "device"}
# Each room and the other rooms it may import. A module belongs to the longest room name that it
# starts with; "" is the package itself (for its version).
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "text": set(),
    "operands": set(),
    "implementations": set(),
    "plan": {"errors", "implementations"},
    "blocks": {"plan"},
    "workload": {"errors", "operands", "blocks"},
    "functions": {"errors", "workload"},
    "host": set(),
    "nvidia": {"errors", "host"},
    "nvml": set(),
    "device": {"errors", "text", "host", "nvidia"},
    "store": WORDS | {""},
    "predict": WORDS | {"store"},
    "resolution": WORDS | {"", "store", "predict"},
    "attention.kernels": {"operands", "implementations", "plan", "blocks"},
    "attention": WORDS | {"resolution", "attention.kernels"},
    "haiku": {"plan", "workload", "attention"},
    "flax": {"errors", "plan", "attention"},
    "equinox": {"errors", "plan", "attention"},
    "chunks": WORDS | {"store", "resolution", "attention.kernels"},
    "tuner": WORDS | {"", "store", "resolution", "attention", "chunks"},
    "watch": WORDS | {"", "store", "tuner"},
    "report": WORDS | {"", "store", "predict", "resolution", "attention", "tuner"},
    "doctor": WORDS | {"", "store", "resolution", "tuner"},
    "cli": WORDS
    | {"", "store", "predict", "resolution", "attention", "tuner", "watch", "report", "doctor"},
}

# Heavy or risky packages, and the only module, or package, that imports each.
ONLY_IMPORTER = {
    "optuna": "autochunk.tuner.study",
    "sqlitedict": "autochunk.store.database",
    "haiku": "autochunk.haiku",
    "flax": "autochunk.flax",
    "equinox": "autochunk.equinox",
    "click": "autochunk.cli",
    "fsspec": "autochunk.store.remote",
    "matplotlib": "autochunk.report",
    "jinja2": "autochunk.report.page",
    "plotext": "autochunk.report.terminal",
}


def test_every_module_has_a_room() -> None:
    """A new module at the top level is a decision: it gets a line in the table above."""
    homeless = [module for module in MODULES if _room(module) == "" and module != "autochunk"]
    assert homeless == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_direction_of_imports(module: str) -> None:
    """Command, report, tuner, attention, resolution, store, words: each imports later ones only."""
    room = _room(module)
    allowed = MAY_IMPORT[room] | {room}
    own = [name for name in _imports(MODULES[module]) if _top(name) == "autochunk"]
    assert [name for name in own if _room(name) not in allowed] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_package_is_not_imported_relatively(module: str) -> None:
    """Imports are absolute, so that the table above can be held."""
    nodes = ast.walk(ast.parse(MODULES[module].read_text()))
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize(("package", "importer"), ONLY_IMPORTER.items())
def test_only_importer(package: str, importer: str) -> None:
    """Each heavy package enters through one module, or one package of modules."""
    tops = {module: set(map(_top, _imports(path))) for module, path in MODULES.items()}
    importers = [module for module in tops if package in tops[module]]
    assert importers
    assert {module for module in importers if not f"{module}.".startswith(f"{importer}.")} == set()


@pytest.mark.parametrize("module", sorted(WORDS | {"store.profile", "store.choice"}))
def test_no_jax_at_the_top_of_the_words(module: str) -> None:
    """Plain data needs no jax."""
    at_top = ast.parse(MODULES[f"autochunk.{module}"].read_text()).body
    names = [ast.unparse(one) for one in at_top if isinstance(one, ast.Import | ast.ImportFrom)]
    assert not [name for name in names if "jax" in name]


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import autochunk", "optuna sqlitedict haiku jax numpy pydantic"),
        ("import autochunk.plan", "optuna sqlitedict haiku jax pydantic pydantic_core"),
        ("import autochunk.attention.kernels", "optuna sqlitedict haiku pydantic pydantic_core"),
        ("import autochunk.workload, autochunk.device", "optuna sqlitedict haiku jax"),
        ("import autochunk.resolution.resolve, autochunk.store.bundle", "optuna haiku jax"),
        ("from autochunk import Workload, Plan, Profile, Device", "optuna sqlitedict haiku jax"),
        ("from autochunk import dot_product_attention", "optuna haiku flax equinox"),
        ("from autochunk import patch_jax_nn", "optuna haiku flax equinox"),
        ("from autochunk import MultiHeadAttention", "optuna equinox"),  # haiku loads flax
        ("from autochunk import chunked", "optuna haiku"),
    ],
)
def test_import_loads_no_more_than_it_needs(statement: str, forbidden: str) -> None:
    """What a user does not use is not loaded."""
    loaded = run_python(f"{statement}\nimport sys\nprint(*sys.modules)").split()
    assert set(forbidden.split()) & set(map(_top, loaded)) == set()


def _room(module: str) -> str:
    inside = module.removeprefix("autochunk").removeprefix(".")
    around = [room for room in MAY_IMPORT if room in ("", inside) or inside.startswith(f"{room}.")]
    return max(around, key=len)


def _top(module: str) -> str:
    return module.partition(".")[0]


def _imports(path: Path) -> Iterator[str]:
    """Names of all modules that a source imports when it runs, not only for type checkers."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names a module, too.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if name in MODULES]
            yield from modules
            if len(modules) < len(names):
                yield node.module
        nodes += ast.iter_child_nodes(node)
