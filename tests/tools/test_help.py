"""Every stage and every tool says with --help what it is, and what can be set."""

import ast
import importlib
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                 for folder in (ROOT, ROOT / "tools") for p in folder.glob("*.py") if '"__main__"' in p.read_text())


def test_there_are_all():
    assert {"prune", "convert", "tools.sample", "tools.demo"} <= set(SCRIPTS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, flag, monkeypatch, capsys):
    module = importlib.import_module(name)
    tree = ast.parse((ROOT / (name.replace(".", "/") + ".py")).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    monkeypatch.setattr(sys, "argv", [name, flag])
    try:
        exec(compile(tree, name, "exec"), {**vars(module), "__name__": "__main__"})
    except SystemExit as stop:
        assert stop.code in (None, 0)
    assert capsys.readouterr().out.startswith(module.__doc__.strip())
