"""The imports of the package `conversion` run one way: readers and layouts know nothing of what uses them."""

import ast
from pathlib import Path

import pytest

import vit_embed

PACKAGE = Path(vit_embed.__file__).parent / "conversion"
# A folder, and what its modules must not import.
ABOVE = {
    "layouts": ("convert", "command_line", "compare", "card", "source", "writer", "download", "reading"),
    "reading": ("convert", "command_line", "compare", "card", "source", "writer", "download", "layouts"),
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names)


@pytest.mark.parametrize("folder", ABOVE)
def test_imports_run_one_way(folder):
    files = sorted((PACKAGE / folder).rglob("*.py"))
    forbidden = tuple(f"vit_embed.conversion.{name}" for name in ABOVE[folder])
    found = [
        f"{path.name}: {name}"
        for path in files
        for name in imports_of(path)
        if any(name == each or name.startswith(f"{each}.") for each in forbidden)
    ]
    assert files and not found


def test_every_package_is_installed():
    root = PACKAGE.parent
    listed = (root / "setup.cfg").read_text(encoding="utf-8")
    for folder in {path.parent.relative_to(root) for path in PACKAGE.rglob("*.py")}:
        assert f"\n    vit_embed.{'.'.join(folder.parts)}\n" in listed
