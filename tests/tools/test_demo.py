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


def test_text_goes_to_another_folder_and_as_much_as_is_asked(tmp_path, monkeypatch):
    for name in ("docs", "plays", "wiki"):
        monkeypatch.setattr(demo, name, lambda: iter(["ten bytes."] * 9))
    monkeypatch.setattr(demo, "files", lambda folder, pattern: iter(["ten bytes."] * 9))

    def gather(*arguments):
        monkeypatch.setattr("sys.argv", ["demo.py", "gather", *map(str, arguments)])
        demo.main()

    gather(tmp_path / "raw", "3_0")
    assert [len(p.read_text().splitlines()) for p in tmp_path.glob("raw/*/*")] == [4] * 5  # 30 bytes, and one
    for wrong, words in (((tmp_path / "raw", 30), "a folder that is not there yet"), ((tmp_path / "new", "many"), "many"),
                         ((tmp_path / "new",), "unknown arguments")):
        with pytest.raises(SystemExit, match=words):
            gather(*wrong)
    assert not (tmp_path / "new").exists()
