"""The demo's text: all there, or none."""

import json

import pytest

from tools import demo


def test_text_that_is_half_there_never_has_its_name(tmp_path, monkeypatch):
    def texts(name, n):
        yield from [f"{name} {i}" for i in range(n)]
        if n == 3:
            raise OSError("the disk is full")

    for name in ("docs", "plays"):
        monkeypatch.setattr(demo, name, lambda name=name: texts(name, 2))
    monkeypatch.setattr(demo, "files", lambda folder, pattern: texts(pattern, 2))
    monkeypatch.setattr(demo, "wiki", lambda: texts("wiki", 3))
    with pytest.raises(OSError, match="full"):
        demo.gather(tmp_path / "out" / "raw")
    assert not (tmp_path / "out" / "raw").exists()
    monkeypatch.setattr(demo, "wiki", lambda: texts("wiki", 1))
    demo.gather(tmp_path / "out" / "raw")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["raw"]
    found = {p.parent.name: [json.loads(line)["text"] for line in p.open()] for p in (tmp_path / "out").glob("raw/*/*")}
    assert found == {"cpp": ["*.h 0", "*.h 1"], "docs": ["docs 0", "docs 1"], "plays": ["plays 0", "plays 1"],
                     "python": ["*.py 0", "*.py 1"], "wiki": ["wiki 0"]}
