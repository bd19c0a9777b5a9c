"""Who may import whom: the plan of the house.

It is held by reading every source and by looking at what a fresh process loads.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import run_python

import autochunk

PACKAGE = Path(autochunk.__file__).parent
MODULES = {
    ".".join(("autochunk", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in PACKAGE.rglob("*.py")
}

FLOOR = {"errors", "implementations", "plan", "workload", "device"}
# Each room and the other rooms it may import. A module belongs to the longest room name that it
# starts with; "" is the package itself (for its version).
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "implementations": set(),
    "plan": {"errors", "implementations"},
    "workload": {"errors"},
    "device": {"errors"},
    "store": FLOOR | {""},
    "attention.kernels": {"implementations", "plan", "errors"},
    "attention": FLOOR | {"store", "attention.kernels"},
    "tuner": FLOOR | {"", "store", "attention"},
    "doctor": FLOOR | {"", "store", "tuner"},
    "report": FLOOR | {"", "store", "attention", "tuner"},
    "cli": FLOOR | {"", "store", "attention", "tuner", "doctor", "report"},
}

# Heavy or risky packages, and the only module that imports each.
ONLY_IMPORTER = {
    "optuna": "autochunk.tuner.study",
    "sqlitedict": "autochunk.store.database",
    "haiku": "autochunk.attention.haiku",
    "click": "autochunk.cli",
    "fsspec": "autochunk.store.remote",
}


def test_every_module_has_a_room() -> None:
    """A new module at the top level is a decision: it gets a line in the table above."""
    homeless = [module for module in MODULES if _room(module) == "" and module != "autochunk"]
    assert homeless == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_direction_of_imports(module: str) -> None:
    """cli, report -> tuner -> attention -> store -> floor, wherever the import stands."""
    room = _room(module)
    allowed = MAY_IMPORT[room] | {room}
    wrong = sorted(
        {
            name
            for name in _imports(MODULES[module])
            if name.partition(".")[0] == "autochunk" and _room(name) not in allowed
        }
    )
    assert wrong == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_package_is_not_imported_relatively(module: str) -> None:
    """Imports are absolute, so that the table above can be held."""
    assert not [
        node
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]


@pytest.mark.parametrize(("package", "importer"), ONLY_IMPORTER.items())
def test_only_importer(package: str, importer: str) -> None:
    """Each heavy package enters through one module."""
    assert [
        module
        for module, path in MODULES.items()
        if package in {name.partition(".")[0] for name in _imports(path)}
    ] == [importer]


@pytest.mark.parametrize(
    "module",
    ["autochunk.plan", "autochunk.errors", "autochunk.workload", "autochunk.store.profile"],
)
def test_no_jax_at_the_top_of_the_floor(module: str) -> None:
    """Plain data needs no jax."""
    assert "jax" not in {name.partition(".")[0] for name in _imports(MODULES[module])}


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import autochunk", {"optuna", "sqlitedict", "haiku", "jax", "numpy", "pydantic"}),
        (
            "import autochunk.plan",
            {"optuna", "sqlitedict", "haiku", "jax", "pydantic", "pydantic_core"},
        ),
        (
            "import autochunk.attention.kernels",
            {"optuna", "sqlitedict", "haiku", "pydantic", "pydantic_core"},
        ),
        ("import autochunk.workload, autochunk.device", {"optuna", "sqlitedict", "haiku", "jax"}),
        ("import autochunk.store.resolve, autochunk.store.bundle", {"optuna", "haiku", "jax"}),
        (
            "from autochunk import Workload, Plan, Profile, Device",
            {"optuna", "sqlitedict", "haiku", "jax"},
        ),
        ("from autochunk import dot_product_attention", {"optuna", "haiku"}),
        ("from autochunk import MultiHeadAttention", {"optuna"}),
    ],
)
def test_import_loads_no_more_than_it_needs(statement: str, forbidden: set[str]) -> None:
    """What a user does not use is not loaded."""
    loaded = json.loads(
        run_python(f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    )
    assert forbidden & {name.partition(".")[0] for name in loaded} == set()


def _room(module: str) -> str:
    inside = module.removeprefix("autochunk").removeprefix(".")
    return max(
        (room for room in MAY_IMPORT if room in ("", inside) or inside.startswith(f"{room}.")),
        key=len,
    )


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
