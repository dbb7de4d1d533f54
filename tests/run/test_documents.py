"""Nothing is lost on the way in, and nothing foreign gets in: which files are read, what is in them, what is left out."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import shlex
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import ROOT

from prepare import PrepareSettings
from run.documents import LeftOut, Source, find_sources, read_documents, say_passed_over
from run.settings import UserError, parse_args

TEXTS = [f"document {i}, é漢😀, with words" for i in range(3000)]
LINES = [json.dumps({"text": t}).encode() + b"\n" for t in TEXTS]
WHOLE = b"".join(LINES)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"7" * 64 + b"\nsize 123456789\n"


def frames(compress: Callable[[bytes], bytes], n: int = 500) -> list[bytes]:
    """The lines in compressed streams of n each."""
    return [compress(b"".join(LINES[i:i + n])) for i in range(0, len(LINES), n)]


def long_window(data: bytes) -> bytes:
    """As `zstd --long=31` writes it."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def parquet(column: pyarrow.Array, name: str = "text", **options) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"n": range(len(column)), name: column}), file, **options)
    return file.getvalue()


def sources(root: Path | str, **given) -> tuple[list[Source], dict[str, list[str]]]:
    return find_sources(str(root), **(dict(text_field="text", domain_field="", domains=None, skip_bad_files=False) | given))


def found(root: Path | str, **given) -> tuple[dict[str, list[str]], list[LeftOut]]:
    """The texts of each domain, and what was left out."""
    texts, left_out = {}, []
    for source in sources(root, **given)[0]:
        for file in source.files:
            for each in read_documents(file, source):
                if isinstance(each, LeftOut):
                    left_out.append(each)
                else:
                    texts.setdefault(each[0], []).append(each[1])
    return texts, left_out


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def records(*values: object) -> bytes:
    return b"".join(json.dumps(v).encode() + b"\n" for v in values)


# ---- files that are read to their end

READ = {  # name of the file -> its bytes; each holds TEXTS
    "a.jsonl": WHOLE, "a.json": WHOLE, "a.ndjson": WHOLE, "A.JSONL": WHOLE,
    **{f"a.{kind}.gz": gzip.compress(WHOLE) for kind in ("jsonl", "json", "ndjson")}, "a.json.GZ": gzip.compress(WHOLE),
    "members.json.gz": b"".join(frames(gzip.compress)), "padded.jsonl.gz": gzip.compress(WHOLE) + bytes(1000),
    **{f"a.{kind}.bz2": bz2.compress(WHOLE) for kind in ("jsonl", "json")},
    "streams.jsonl.bz2": b"".join(frames(bz2.compress)),
    "a.jsonl.xz": lzma.compress(WHOLE), "streams.json.xz": b"".join(f + bytes(8) for f in frames(lzma.compress)),
    **{f"a.{kind}.zst": zstandard.compress(WHOLE) for kind in ("jsonl", "json", "ndjson")},
    "frames.jsonl.zst": b"".join(frames(zstandard.compress)), "long.jsonl.zst": long_window(WHOLE),
    "skippable.jsonl.zst": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(WHOLE),  # as pzstd writes
    "no_newline_at_the_end.jsonl": WHOLE[:-1],
    "blank_lines.jsonl": b"\n \n".join(LINES) + b"\n\n", "crlf.jsonl": WHOLE.replace(b"\n", b"\r\n"),
    "crlf_and_blank_lines.json.gz": gzip.compress(b"\r\n\t\r\n".join(line[:-1] for line in LINES)),
    "bom.jsonl": b"\xef\xbb\xbf" + WHOLE, "bom.json.gz": gzip.compress(b"\xef\xbb\xbf" + WHOLE),
    "boms_of_joined_files.jsonl": b"".join(b"\xef\xbb\xbf" + line for line in LINES),
    "a.parquet": parquet(pyarrow.array(TEXTS)), "zstd.parquet": parquet(pyarrow.array(TEXTS), compression="zstd"),
    "large.parquet": parquet(pyarrow.array(TEXTS, pyarrow.large_string())),
    "bytes.parquet": parquet(pyarrow.array([t.encode() for t in TEXTS])),
    "fixed.snappy.parquet": parquet(pyarrow.array([t.encode() for t in TEXTS], pyarrow.large_binary()), row_group_size=7),
    "categories.parquet": parquet(pyarrow.array(TEXTS).dictionary_encode()),
    "view.parquet": parquet(pyarrow.array(TEXTS, pyarrow.string_view())),
}


@pytest.mark.parametrize("name", READ)
def test_is_read_whole(name, tmp_path):
    write(tmp_path / "d" / name, READ[name])
    texts, left_out = found(tmp_path)
    assert texts == {"d": TEXTS} and left_out == []


@pytest.mark.parametrize("compress, suffix", [(gzip.compress, ".gz"), (bz2.compress, ".bz2"), (lzma.compress, ".xz"),
                                              (zstandard.compress, ".zst"), (long_window, ".zst")])
@pytest.mark.parametrize("kind", ["dense", "repeated", "mixed"])
def test_content_of_many_times_what_is_read_at_once(compress, suffix, kind, tmp_path):
    """However much goes in and comes out at once, all of it comes out, and one byte less is truncated."""
    noise = random.Random(0)
    texts = [noise.randbytes(2000).hex() if kind == "dense" or (kind == "mixed" and i % 3) else f"{i} " + "ab" * 20_000
             for i in range(150)]
    data = compress(records(*({"text": t} for t in texts)))
    write(tmp_path / "d" / f"a.jsonl{suffix}", data)
    assert found(tmp_path) == ({"d": texts}, [])
    write(tmp_path / "d" / f"a.jsonl{suffix}", data[:-1])
    assert "truncated" in found(tmp_path)[1][-1].why


@pytest.mark.parametrize("name, compress", [("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.txt.bz2", bz2.compress),
                                            ("a.TXT.xz", lzma.compress), ("a.txt.zst", zstandard.compress)])
def test_a_text_is_one_document_without_its_byte_order_mark(name, compress, tmp_path):
    text = "line\r\n\r\n\tline é漢😀\n"
    write(tmp_path / "d" / name, compress(b"\xef\xbb\xbf" + text.encode()))
    assert found(tmp_path) == ({"d": [text]}, [])


# ---- files that are not

LOST = {  # name of the file -> its bytes, documents that can be read before the damage, at least and at most, what is said
    "cut.jsonl.gz": (gzip.compress(WHOLE)[:-2000], 1, 2999, "truncated"),
    "cut_in_its_last_bytes.jsonl.gz": (gzip.compress(WHOLE)[:-4], 3000, 3000, "truncated"),
    "cut_in_a_header.json.gz": (gzip.compress(WHOLE) + gzip.compress(WHOLE)[:6], 3000, 3000, "truncated"),
    "cut.jsonl.bz2": (b"".join(frames(bz2.compress))[:-999], 500, 2999, "truncated"),
    "cut.json.xz": (b"".join(frames(lzma.compress))[:-999], 500, 2999, "truncated"),
    "cut.jsonl.zst": (zstandard.compress(WHOLE)[:-999], 0, 2999, "truncated"),
    "cut_inside_a_frame.jsonl.zst": (b"".join(frames(zstandard.compress))[:-999], 500, 2999, "truncated"),
    "cut_in_a_long_window.jsonl.zst": (long_window(WHOLE)[:-999], 0, 2999, "truncated"),
    "cut.jsonl": (WHOLE[:-9], 2999, 2999, "truncated: it ends inside line 3000"),
    "cut_in_a_character.jsonl": (json.dumps({"text": "漢"}, ensure_ascii=False).encode()[:11], 0, 0, "truncated"),
    "cut_before_it_was_compressed.jsonl.gz": (gzip.compress(WHOLE[:-9]), 2999, 2999, "inside line 3000"),
    "cut.parquet": (READ["a.parquet"][:-100], 0, 0, "ArrowInvalid.*magic bytes"),
    "damaged_inside.parquet": (READ["fixed.snappy.parquet"][:40000] + bytes(20000) + READ["fixed.snappy.parquet"][60000:],
                               1, 2999, "Error"),
    "a_second_stream_damaged.jsonl.bz2": (frames(bz2.compress)[0] + b"BZh9" + bytes(2000), 500, 500, "OSError"),
    "a_second_stream_damaged.jsonl.xz": (frames(lzma.compress)[0] + b"x" * 20000, 500, 500, "LZMAError"),
    "something_behind.jsonl.gz": (gzip.compress(WHOLE) + b"\0xyz", 3000, 3000, "error: Error -3"),
    "something_behind.jsonl.zst": (zstandard.compress(WHOLE) + b"xyz!", 3000, 3000, "ZstdError"),
    "damaged.json.gz": (gzip.compress(WHOLE)[:4000] + b"\xff" * 50 + gzip.compress(WHOLE)[4050:], 0, 2999, "Error -3"),
    **{f"no.jsonl{suffix}": (WHOLE, 0, 0, "rror") for suffix in (".gz", ".bz2", ".xz", ".zst")},
    **{f"empty.jsonl{suffix}": (b"", 0, 0, "it is empty") for suffix in (".gz", ".bz2", ".xz", ".zst")},
    "zeros_after_a_crash.jsonl.gz": (bytes(5000), 0, 0, "it is empty"), "empty.parquet": (b"", 0, 0, "ArrowInvalid"),
    "compressed_but_not_by_name.jsonl": (gzip.compress(WHOLE[:2000]), 0, 0, "truncated|not one record"),
    "a_list.json": (json.dumps([{"text": t} for t in TEXTS]).encode(), 0, 0, "it is a JSON list; .*jq -c"),
    "a_list_over_lines.json": (b"[\n" + b",\n".join(line[:-1] for line in LINES[:2]) + b"\n]\n", 0, 0, "a JSON list"),
    "indented.json": (json.dumps({"version": 1, "files": ["a", "b"]}, indent=1).encode() + b"\n", 0, 0, "not one record"),
    "a_page.jsonl": (b"<!DOCTYPE html>\n<p>Not found</p>\n", 0, 0, "not one record of text is in it; the first: no JSON"),
    "of_other_fields.jsonl": (records(*({"content": t, "id": i} for i, t in enumerate(TEXTS[:9]))), 0, 0,
                              "no field 'text' among content, id"),
    "other_columns.parquet": (parquet(pyarrow.array(TEXTS), "content"), 0, 0, "no column 'text' among n, content"),
    "no_text.parquet": (parquet(pyarrow.array([None] * 5, pyarrow.string())), 0, 0, "not one record.*holds null, no text"),
    "latin1.txt": ("é".encode("latin1"), 0, 0, "not UTF-8: .*0xe9 in position 0"),
    "utf16.txt": ("text".encode("utf-16"), 0, 0, "it is UTF-16; .*iconv"),
    "utf16.jsonl.gz": (gzip.compress(WHOLE.decode().encode("utf-16")), 0, 0, "it is UTF-16; .*iconv"),
    **{f"pointer{kind}": (POINTER, 0, 0, "pointer of Git LFS, .*`git lfs pull`")
       for kind in (".txt", ".jsonl", ".json.gz", ".jsonl.zst", ".txt.bz2", ".ndjson.xz", ".parquet")},
}


@pytest.mark.parametrize("name", LOST)
def test_a_file_that_cannot_be_read_to_its_end_is_told_apart_from_a_bad_line(name, tmp_path):
    data, least, most, said = LOST[name]
    path = write(tmp_path / "d" / name, data)
    texts, left_out = found(tmp_path)
    texts = texts.get("d", [])
    assert least <= len(texts) <= most and texts == TEXTS[:len(texts)]
    assert [each.kind for each in left_out].count("files") == 1 and left_out[-1].kind == "files"
    assert re.search(said, left_out[-1].why), left_out[-1].why
    assert left_out[-1].where == str(path) and f"({len(texts):,} documents of it were read)" in left_out[-1].why


# ---- lines that are not

BAD = {  # a line -> why it is left out
    b"{": "no JSON: ", b"[" * 100_000: "no JSON: ", b'{"text": "\xff"}': "no JSON: 'utf-8' codec", b"\0": "no JSON",
    b"plain": "no JSON", b'["text"]': "a list is no record", b'"text"': "a string is no record", b"3": "a number is no",
    b'{"other": 1, "n": 2}': "no field 'text' among other, n", b"{}": "no field 'text' among none",
    b'{"text": 3}': "field 'text' holds a number, no text",
    b'{"text": null}': "holds null", b'{"text": {"a": "b"}}': "holds an object", b'{"text": ["a"]}': "holds a list",
    b'{"text": "a\\ud800"}': "surrogates not allowed",
}


@pytest.mark.parametrize("line", BAD, ids=map(str, range(len(BAD))))
def test_a_bad_line_is_one_line(line, tmp_path):
    path = write(tmp_path / "d" / "a.jsonl", LINES[0] + line + b"\n" + LINES[1])
    texts, (left_out,) = found(tmp_path)
    assert texts == {"d": TEXTS[:2]} and (left_out.kind, left_out.where) == ("malformed lines", f"{path}:2")
    assert re.search(BAD[line], left_out.why), left_out.why


# ---- which files count

NOT_READ = ["a.csv", "a.parquet.gz", "a.jsonl.zip", "a.jsonl.lz4", "README.md", "a.tar.gz", "jsonl", "a.jsonl.part",
            "x.arrow", "_SUCCESS"]


def test_each_file_is_read_or_named_with_the_reason(tmp_path):
    raw = tmp_path / "raw"
    for name in ("d/a.jsonl", "d/deep/er/b.json.gz", *(f"d/{n}" for n in NOT_READ), "stray.jsonl", "notes.md",
                 "d/._a.jsonl", "d/.ipynb_checkpoints/a.jsonl", ".cache/c/a.jsonl", "d/.cache/huggingface/a.jsonl",
                 "d/deep/.hidden.parquet"):
        write(raw / name, gzip.compress(LINES[0]) if name.endswith(".gz") else LINES[0])
    (raw / "d" / "nothing").mkdir()
    os.mkfifo(raw / "d" / "pipe.jsonl")
    groups, passed = sources(raw)
    assert [(s.name, [f.name for f in s.files]) for s in groups] == [("d", ["d/a.jsonl", "d/deep/er/b.json.gz"])]
    assert sorted(passed.pop("of no format that is read")) == sorted([*(f"d/{n}" for n in NOT_READ), "notes.md"])
    assert passed == {
        "hidden": [".cache/", "d/._a.jsonl", "d/.cache/", "d/.ipynb_checkpoints/", "d/deep/.hidden.parquet"],
        "empty": ["d/nothing/"], "neither file nor folder": ["d/pipe.jsonl"], "in no domain's folder": ["stray.jsonl"]}
    said = say_passed_over(passed)
    assert "\n" not in said and said.startswith("passed over: ") and "2 hidden" not in said
    assert "5 hidden (.cache/, d/._a.jsonl, d/.cache/, ...); 1 empty (d/nothing/)" in said
    assert say_passed_over({}) == ""


def test_links_are_followed_and_end(tmp_path):
    raw, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    write(elsewhere / "b.jsonl", LINES[1])
    write(elsewhere / "more" / "c.jsonl", LINES[2])
    write(raw / "d" / "a.jsonl", LINES[0])
    (raw / "d" / "linked").symlink_to(elsewhere)
    (raw / "d" / "loop").symlink_to(raw / "d")
    (raw / "d" / "loop_to_all").symlink_to(raw)
    (elsewhere / "more" / "back").symlink_to(raw / "d" / "other")  # two links that lead to each other
    (raw / "d" / "other").mkdir()
    (raw / "d" / "other" / "forth").symlink_to(elsewhere / "more")
    (raw / "d" / "other" / "again.jsonl").symlink_to(raw / "d" / "a.jsonl")
    (raw / "another").symlink_to(elsewhere)  # in two domains, as someone wants it
    (source, d), passed = sources(raw)
    assert (source.name, [f.name for f in source.files]) == (
        "another", ["another/b.jsonl", "another/more/back/again.jsonl", "another/more/c.jsonl"])
    assert [f.name for f in d.files] == ["d/a.jsonl", "d/linked/b.jsonl", "d/linked/more/c.jsonl"]
    assert set(passed["read already by another way"]) >= {"d/loop/", "d/loop_to_all/", "d/other/"}


def test_a_link_that_leads_nowhere_is_named_at_once(tmp_path):
    write(tmp_path / "d" / "a.jsonl", LINES[0])
    (tmp_path / "d" / "b.jsonl").symlink_to(tmp_path / "gone" / "b.jsonl")
    (tmp_path / "d" / "notes").symlink_to(tmp_path / "gone")  # no text by its name
    with pytest.raises(UserError, match=r"d/b.jsonl is a link to .*gone/b.jsonl, which does not exist; .*--skip_bad_files"):
        sources(tmp_path)
    assert sources(tmp_path, skip_bad_files=True)[1] == {"of no format that is read": ["d/notes"]}
    texts, (lost,) = found(tmp_path, skip_bad_files=True)
    assert texts == {"d": TEXTS[:1]} and lost.kind == "files" and "No such file" in lost.why and "b.jsonl" in lost.where


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everywhere")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    write(tmp_path / "d" / "closed" / "a.jsonl", LINES[0]).parent.chmod(0)
    with pytest.raises(PermissionError, match="closed"):
        sources(tmp_path)


# ---- domains


def test_a_domain_is_what_its_record_says(tmp_path):
    names = ["RedPajamaC4", "RedPajamaArXiv", "Pile-CC", "Wikipedia (en)", "PubMed Abstracts"]
    write(tmp_path / "train" / "chunk1" / "a.jsonl",
          records(*({"text": t, "meta": {"set": names[i % 5]}} for i, t in enumerate(TEXTS[:50])), {"text": "x"},
                  {"text": "x", "meta": "y"}, {"text": "x", "meta": {"set": 3}}))
    write(tmp_path / "b.txt", "a text has no field")
    texts, left_out = found(tmp_path, domain_field="meta.set")
    clean = ["RedPajamaC4", "RedPajamaArXiv", "Pile-CC", "Wikipedia_en", "PubMed_Abstracts"]
    assert texts == {name: TEXTS[:50][i::5] for i, name in enumerate(clean)}
    assert [each.why for each in left_out] == [
        "no field 'meta.set' among text", "no field 'meta.set' among text, meta",
        "field 'meta.set' holds a number, no name of a domain"]
    assert sources(tmp_path, domain_field="meta.set")[1] == {"without fields": ["b.txt"]}
    texts, left_out = found(tmp_path, domain_field="meta.set", domains={"RedPajamaC4": "c4", "Pile-CC": "c4", "none": "n"})
    assert texts == {"c4": [t for i, t in enumerate(TEXTS[:50]) if i % 5 in (0, 2)]}
    assert [each.kind for each in left_out].count("documents of other domains") == 30


def test_a_field_that_names_no_domains_is_refused(tmp_path):
    for values, said in ((["tokenizer"], "domain 'tokenizer'"), ([".."], "domain ''"), (["漢/.."], None),
                         (["a b", "a/b"], "'a/b' and 'a b' would both be domain a_b; name them with --domains"),
                         ([f"http://{i}" for i in range(201)], "names over 200 domains, http://0, http://1, http://2, ")):
        write(tmp_path / "a.jsonl", records(*({"text": "x", "url": v} for v in values)))
        if said is None:
            assert found(tmp_path, domain_field="url") == ({"漢": ["x"]}, [])
            continue
        with pytest.raises(UserError, match=said):
            found(tmp_path, domain_field="url")


FIELDS = {  # what text_field is, for a record that holds the text "t"
    "text": {"text": "t"}, "raw_content": {"raw_content": "t", "text": "no"},
    "a.b": {"a": {"b": "t", "text": "no"}, "b": "no"}, "a.b.c": {"a": {"b": {"c": "t"}}},
    "with.dot": {"with.dot": "t", "with": {"dot": "no"}}, "é": {"é": "t"},
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_found_by_its_name_or_its_path(name, tmp_path):
    write(tmp_path / "d" / "a.jsonl", records(FIELDS[name]))
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([FIELDS[name]] * 3), file)
    write(tmp_path / "p" / "a.parquet", file.getvalue())
    assert found(tmp_path, text_field=name) == ({"d": ["t"], "p": ["t"] * 3}, [])
    with pytest.raises(UserError, match=r"text_field = .* names other domains than d, p"):
        found(tmp_path, text_field={"d": name, "q": name})
    write(tmp_path / "p" / "a.parquet", parquet(pyarrow.array(["u"])))
    assert found(tmp_path, text_field={"d": name}) == ({"d": ["t"], "p": ["u"]}, [])


def test_a_field_of_each_domain_in_one_file(tmp_path):
    rows = [{"set": "a", "content": "t", "text": None}, {"set": "b", "content": None, "text": "u"}]
    write(tmp_path / "a.jsonl", records(*rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert found(tmp_path, text_field={"a": "content"}, domain_field="set") == ({"a": ["t"] * 2, "b": ["u"] * 2}, [])


def test_folders_and_patterns_become_domains(tmp_path):
    for i, name in enumerate(("sample/10BT/a.jsonl", "sample/100BT/b.jsonl", "documents/2023-06/0001/en_head.json",
                              "documents/2023-06/0001/de_head.json", "c.jsonl")):
        write(tmp_path / name, LINES[i])
    for domains, expected in (
            ({"sample/10BT": "edu"}, {"edu": TEXTS[:1]}),
            ({"sample": "edu", "c.jsonl": "c"}, {"edu": TEXTS[1::-1], "c": TEXTS[4:5]}),
            ({"sample/10BT/": "x", "c.jsonl": "x"}, {"x": [TEXTS[4], TEXTS[0]]}),
            ({"documents/*/en_*.json": "cc"}, {"cc": TEXTS[2:3]}),
            ({".": "web"}, {"web": [TEXTS[i] for i in (4, 3, 2, 1, 0)]}),
            ({"documents/*/de_*": "de", "documents": "cc"}, {"de": TEXTS[3:4], "cc": TEXTS[2:3]})):
        assert found(tmp_path, domains=domains) == (expected, [])
    assert "c.jsonl" in sources(tmp_path, domains={"sample": "a"})[1]["in none of the domains"]
    for domains, said in (({"sampel": "edu"}, "domain edu: sampel in .* holds no .jsonl"),
                          ({".": "../x"}, "domain '../x': name it"), ({".": "tokenizer"}, "'tokenizer'")):
        with pytest.raises(UserError, match=said):
            sources(tmp_path, domains=domains)


# ---- file systems that fsspec knows


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        return


@pytest.fixture
def served(tmp_path):
    """A folder, and the URL of a local web server that lists it."""
    (tmp_path / "www").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "www", f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


REMOTE = {"d/a.jsonl": LINES[0], "d/deep/b.json.gz": gzip.compress(LINES[1]), "d/c.jsonl.zst": zstandard.compress(LINES[2]),
          "e/d.txt.xz": lzma.compress(TEXTS[3].encode()), "e/f.jsonl.bz2": bz2.compress(LINES[4]), "e/notes.md": b"x"}


def test_text_in_a_memory_file_system(memory):
    for name, data in {**REMOTE, "e/g.parquet": parquet(pyarrow.array(TEXTS[5:7])), "d/.cache/a.jsonl": LINES[0]}.items():
        memory.pipe(f"/raw/{name}", data)
    assert found("memory://raw") == ({"d": [TEXTS[0], TEXTS[2], TEXTS[1]], "e": TEXTS[3:7]}, [])
    assert sources("memory://raw/")[1] == {"hidden": ["d/.cache/a.jsonl"], "of no format that is read": ["e/notes.md"]}
    assert found("memory://raw", domains={"d/deep": "x"}) == ({"x": TEXTS[1:2]}, [])
    memory.pipe("/raw/d/deep/b.json.gz", gzip.compress(WHOLE)[:-999])
    memory.pipe("/raw/d/a.jsonl", POINTER)
    lost = found("memory://raw")[1]
    assert [("truncated" in each.why, "git lfs pull" in each.why) for each in lost] == [(False, True), (True, False)]


def test_text_on_a_web_server_that_lists_it(served):
    folder, url = served
    for name, data in REMOTE.items():
        write(folder / name, data)
    texts, left_out = found(url)
    assert (texts, left_out) == ({"d": [TEXTS[0], TEXTS[2], TEXTS[1]], "e": TEXTS[3:5]}, [])
    write(folder / "d" / "deep" / "b.json.gz", gzip.compress(WHOLE)[:-999])
    assert ["truncated" in each.why for each in found(url)[1]] == [True]


def test_urls_that_cannot_be_listed(served):
    for url, said in (("nothing://x", "input_dir = nothing://x cannot be listed: ValueError: Protocol not known"),
                      ("s3://bucket/x", "cannot be listed: ImportError: Install s3fs"), ("memory://nowhere", "FileNotFound"),
                      (f"{served[1]}/nowhere", "nowhere cannot be listed: FileNotFoundError"),
                      ("http://127.0.0.1:1/x", "cannot be listed")):
        with pytest.raises(UserError, match=said):
            sources(url)


# ---- the corpora, by the flags of docs/data.md

DOCS = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = [shlex.split(c) for c in re.findall(r"^python prepare.py (.*)", DOCS, re.M)]
SLIM = ("RedPajamaCommonCrawl", "RedPajamaGithub", "RedPajamaBook", "RedPajamaWikipedia", "RedPajamaStackExchange",
        "RedPajamaArXiv", "RedPajamaC4")
SEVEN = ["cc", "github", "book", "wiki", "stackexchange", "arxiv", "c4-rp"]
CORPORA = {  # input_dir -> files below it and their records, and the domains that come out, with the number of documents
    "redpajama-v1": (
        {"arxiv/arxiv_0.jsonl": [{}], "c4/c4-train.00000-of-01024.jsonl": [{}],
         "common_crawl/2019-30/en_head_0000.jsonl.zst": [{}], "github/filtered_0.sampled.jsonl": [{}],
         "stackexchange/stackexchange.jsonl": [{}], "wikipedia/wiki.jsonl": [{}]},
        {name: 1 for name in SEVEN if name != "book"}),
    "redpajama-v2": (
        {f"documents/2023-06/{i:04d}/{kind}.json.gz": [{"raw_content": "t", "text": None}] for i in range(3)
         for kind in ("en_head", "de_head")} | {"quality_signals/2023-06/0000/en_head.signals.json.gz": [{"id": 1}]},
        {"cc": 3}),
    "SlimPajama-627B/train": (
        {f"chunk{i}/example_train_0.jsonl.zst": [{"meta": {"redpajama_set_name": name}} for name in SLIM] for i in (1, 2)},
        dict.fromkeys(SEVEN, 2)),
    "dolma-v1_7": ({"books/books-0000.json.gz": [{"source": "gutenberg"}] * 2, "wiki/wiki-0000.json.gz": [{"source": "w"}]},
                   {"books": 2, "wiki": 1}),
    "dolma-sample": ({"v1_6-sample/00.json.gz": [{"source": "gutenberg"}, {"source": "wiki"}]}, {"gutenberg": 1, "wiki": 1}),
    "proof-pile-2": (
        {f"{d}/{split}/00.jsonl.zst": [{"meta": {}}] for d in ("arxiv", "open-web-math", "algebraic-stack")
         for split in ("train", "validation", "test")} | {"proof-pile-2.py": [{}]},
        {"arxiv": 1, "open-web-math": 1, "algebraic-stack": 1}),
    "hf://datasets/HuggingFaceFW/fineweb-edu": (
        {"sample/10BT/000_00000.parquet": [{"id": "a"}], "sample/100BT/000_00000.parquet": [{"id": "b"}],
         "data/CC-MAIN-2024-51/train-00000-of-00014.parquet": [{"id": "c"}], "README.md": [{}]}, {"fineweb-edu": 1}),
    "pile/train": ({f"{i:02d}.jsonl.zst": [{"meta": {"pile_set_name": n}} for n in ("Pile-CC", "Wikipedia (en)", "ArXiv")]
                    for i in range(2)}, {"Pile-CC": 2, "Wikipedia_en": 2, "ArXiv": 2}),
}


def packed(name: str, rows: list[dict]) -> bytes:
    rows = [{"text": f"{name} {i}", **row} for i, row in enumerate(rows)]
    if name.endswith(".parquet"):
        return parquet(pyarrow.array([row["text"] for row in rows]))
    return {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)(records(*rows))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0].removeprefix("--input_dir="))
def test_the_corpora_are_read_by_the_flags_of_the_docs(command, tmp_path, memory):
    cfg = parse_args(PrepareSettings, command)
    files, expected = CORPORA[cfg.input_dir]
    where = f"{tmp_path}/{cfg.input_dir}"
    if "://" in cfg.input_dir:
        where = "memory://hub"
        for name, rows in files.items():
            memory.pipe(f"/hub/{name}", packed(name, rows))
    else:
        for name, rows in files.items():
            write(Path(where) / name, packed(name, rows))
    texts, left_out = found(where, text_field=cfg.text_field, domain_field=cfg.domain_field, domains=cfg.domains)
    assert ({domain: len(t) for domain, t in texts.items()}, left_out) == (expected, [])


def test_every_corpus_has_its_flags():
    assert {command[0].removeprefix("--input_dir=") for command in COMMANDS} == CORPORA.keys()
