"""docs/method.md names functions that exist, and is as short as it says it is."""

import importlib
import re
from pathlib import Path

import pytest

TEXT = Path("docs/method.md").read_text(encoding="utf-8")
ROOMS = r"(?:run|tools)\.\w+|model|l0|data|prune|pretrain|compact|convert|prepare"
NAMES = sorted(set(re.findall(rf"`((?:{ROOMS})\.(?!py\b)[\w.]+)`", TEXT)))


@pytest.mark.parametrize("name", NAMES)
def test_the_name_exists(name):
    module = re.match(ROOMS, name)[0]
    found = importlib.import_module(module)
    for part in name.removeprefix(module + ".").split("."):
        found = getattr(found, part)


def test_every_formula_has_its_function():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and line != "| | formula | where |"]
    assert len(rows) > 20 and all(re.search(rf"`(?:{ROOMS})\.", row.rsplit("|", 2)[1]) for row in rows)
    assert len(NAMES) > 30


def test_four_pages_at_most():
    assert len(TEXT.split()) <= 4 * 500
