"""The house: what lies where, which way imports run, and how long a file may be."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

STAGES = {"prepare", "convert", "prune", "compact", "pretrain"}
METHOD = {"model", "l0", "data"}
MAY_IMPORT = {  # room -> the rooms that it may import, itself included
    "run": {"run"},
    "method": {"method", "run"},
    "stages": {"method", "run"},  # no stage imports another
    "tools": {"tools", "stages", "method", "run"},
    "experiments": {"experiments", "tools", "stages", "method", "run"},
}
FILES = sorted(p for p in ROOT.glob("**/*.py")
               if p.relative_to(ROOT).parts[0] in {*MAY_IMPORT, p.name} and p.name != "__init__.py")


def room_of(module: str) -> str | None:
    """The room of a module of ours, None for any other."""
    top = module.split(".")[0]
    return "stages" if top in STAGES else "method" if top in METHOD else top if top in MAY_IMPORT else None


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
    return found


def test_the_top_level_is_the_method_and_its_stages():
    assert {p.stem for p in ROOT.glob("*.py")} == STAGES | METHOD
    assert not STAGES & sys.stdlib_module_names and not METHOD & sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path):
    room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    wrong = {module for module in imports(path) if (there := room_of(module)) and there not in MAY_IMPORT[room]}
    assert not wrong, f"{path.relative_to(ROOT)} of {room} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_lengths(path):
    text = path.read_text(encoding="utf-8")
    most = 250 if room_of(path.relative_to(ROOT).parts[0]) in ("tools", "experiments") else 450
    assert len(text.splitlines()) <= most, f"{path.relative_to(ROOT)} has {len(text.splitlines())} lines, more than {most}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{path.relative_to(ROOT)}: {node.name} has more than 80 lines"


def test_the_top_level_is_short():
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in ROOT.glob("*.py")) <= 2700
