"""Imports point down: tensors go down, tokens come up, and no floor knows the floors above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pyext"
FLOORS = (
    {"errors", "checks", "fields", "registry", "_cpu", "_cuda"},
    {"native", "native_cuda", "memory", "tree", "sampling"},
    {"reference"},
    {"backends"},
    {"floors"},
    {"quant"},
    {"ops", "cache"},
    {"model"},
    {"verify", "draft", "size"},
    {"decode"},
    {"hf", "zoo"},
    {"convert"},
    {"testing"},
    {"cli", "docs", "results", "__main__", "__init__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ABOVE = {
    "reference/model.py": "model",  # the oracle of a whole model: it reads that model's config
    "draft/oracle.py": "decode",  # decodes the true text first; for tests
}
"""File -> the floor that it really stands on, with the reason."""


def imported(tree: ast.AST) -> set[str]:
    """Rooms of ramify that a module imports when it runs; imports for type checkers do not count."""
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    rooms = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ramify":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ramify.")}
    return rooms & set(FLOOR)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    inside = path.relative_to(PACKAGE)
    room = ABOVE.get(str(inside), inside.parts[0].removesuffix(".py"))
    assert room in FLOOR, f"{room} stands on no floor; add it to FLOORS"
    own = inside.parts[0].removesuffix(".py")
    wrong = {other for other in imported(ast.parse(path.read_text())) if other != own and FLOOR[other] > FLOOR[room]}
    assert not wrong, f"{inside} imports {', '.join(sorted(wrong))} from above"


def test_an_upward_import_is_noticed():
    assert imported(ast.parse("from ramify.decode.loop import decode")) == {"decode"}
    assert FLOOR["decode"] > FLOOR["cache"]
