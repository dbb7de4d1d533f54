"""Damaged files: every reader returns, or says what is wrong in one UserError; it never breaks, hangs or fills the memory.

A valid file is damaged at random, and the same way again for the same number.  FUZZ_SECONDS is the time for each reader.
"""

import bz2
import copy
import functools
import gzip
import json
import lzma
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from conftest import ROOT, flags, prune_settings, random_model, tiny_config, write_model, write_tokens

import convert
from data import open_split
from model import ModelConfig, Transformer
from prune import PruneSettings
from run import settings, weights
from run.checkpoint import read_state
from run.documents import Source, TextFile, read_documents
from run.settings import UserError, parse_args
from run.weights import load_weights, read_model_config
from tools import gguf_to_hf

SECONDS = float(os.environ.get("FUZZ_SECONDS", 2))
HANG, MEMORY = 20, 1000  # seconds for one input; MB that the process may grow by
SIZES = (0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
ODD = (None, True, -1, 0, 1, 3, *SIZES, 10**400, 0.5, 1e308, 1e-320, -1e308, math.nan, math.inf, "", "x", "a\0b", "a\nb",
       "\ud800", "../x", "x" * 5000, [], {}, [[]], [1], {"a": 1}, "@deep", "@digits")
DEEP = b"[" * 200_000 + b"]" * 200_000
RAW = {'"@deep"': DEEP.decode(), '"@digits"': "1" * 6000}


@dataclass
class Reader:
    """A valid file; what reads it; and, of files with JSON in them, what takes that out and puts it back in."""

    valid: bytes
    read: Callable[[bytes], object]
    unpack: Callable[[bytes], object] | None = None
    pack: Callable[[str], bytes] | None = None
    dumps: Callable[[object], str] = json.dumps


# ---- damage


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or overwrite, once or a few times."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        if rng.random() < 0.5:  # near the front, where headers are
            i = min(i, rng.randrange(400))
        part = data[i:min(j, i + 200)]
        kind = rng.randrange(8)
        if kind == 0:
            data = data[:i]
        elif kind == 1:
            data = data[:i] + part * rng.choice((2, 3, 50)) + data[i + len(part):]
        elif kind == 2:
            data = data[:i] + data[i + len(part):]
        elif kind == 3:
            data = data[:i] + rng.choice((b"\0", b"\xff\xfe", b"\n", b"{", b'"', b"[" * 100_000, b"\0" * 64)) + data[i:]
        elif kind == 4:
            data = data[:i] + struct.pack("<Q", rng.choice(SIZES)) + data[i + 8:]
        elif kind == 5:
            data = data[:i] + struct.pack("<I", rng.choice(SIZES) % 2**32) + data[i + 4:]
        elif kind == 6 and rng.random() < 0.1:
            data = b""
        else:
            data = data[:i] + bytes([b ^ 1 << rng.randrange(8) for b in data[i:i + 1]]) + data[i + 1:]
    return data


def damage_value(rng: random.Random, value: object) -> object:
    """A JSON value with one of its values replaced, removed, added or exchanged, at any depth."""
    value = copy.deepcopy(value)
    places, stack = [], [value]
    while stack:
        node = stack.pop()
        if isinstance(node, (dict, list)):
            keys = list(node if isinstance(node, dict) else range(len(node)))
            places += [(node, key) for key in keys]
            stack += [node[key] for key in keys]
    if not places or rng.random() < 0.02:
        return rng.choice(ODD)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        node, key = rng.choice(places)
        other, other_key = rng.choice(places)
        kind = rng.randrange(6)
        try:
            if kind == 0:
                del node[key]
            elif kind == 1 and isinstance(node, dict):
                node[rng.choice(("x", "", "a\0", "\ud800", "y" * 300))] = node.pop(key)
            elif kind == 2:
                node[key] = copy.deepcopy(other[other_key])
            else:
                node[key] = rng.choice(ODD)
        except (KeyError, IndexError):  # gone by the step before
            continue
    return value


def damaged(rng: random.Random, reader: Reader) -> bytes:
    if reader.unpack is None or rng.random() < 0.4:
        return damage_bytes(rng, reader.valid)
    text = reader.dumps(damage_value(rng, reader.unpack(reader.valid)))
    for name, raw in RAW.items():
        text = text.replace(name, raw)
    return reader.pack(text)


# ---- readers


def file_reader(path: Path, read: Callable[[], object], **parts) -> Reader:
    def write_and_read(data: bytes) -> None:
        path.write_bytes(data)
        read()

    return Reader(path.read_bytes(), write_and_read, **parts)


def json_reader(path: Path, read: Callable[[], object]) -> Reader:
    return file_reader(path, read, unpack=json.loads, pack=str.encode)


def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    cfg = tiny_config(n_layers=1, rope_scaling={"rope_type": "linear", "factor": 2.0})
    write_model(tmp_path / "model", dict(random_model(cfg).named_parameters()), cfg, [])
    return tmp_path / "model"


def config_file(tmp_path: Path) -> Reader:
    given = vars(prune_settings(tmp_path, tmp_path, tmp_path, domain_weights={"a": 0.5, "b": 0.5}, reference_loss="x.json"))
    (tmp_path / "a.py").write_text("".join(f"{k} = {v!r}\n" for k, v in given.items()))

    def unpack(data: bytes) -> dict:
        return given

    def dumps(values) -> str:
        values = values if isinstance(values, dict) else {"seed": values}
        return "".join(f"{k} = {v!r}\n" for k, v in values.items()).replace("'@deep'", "'@'").replace("'@digits'", "9" * 999)

    return file_reader(tmp_path / "a.py", lambda: parse_args(PruneSettings, [str(tmp_path / "a.py")]), unpack=unpack,
                       pack=lambda text: text.encode(errors="replace"), dumps=dumps)


def flag(tmp_path: Path) -> Reader:
    given = flags(prune_settings(tmp_path, tmp_path, tmp_path, domain_weights={"a": 0.5, "b": 0.5}))

    def read(data: bytes) -> None:
        argv = data.decode(errors="surrogateescape").split("\x1f")
        parse_args(PruneSettings, [a for a in argv if a not in ("-h", "--help")])

    return Reader("\x1f".join(given).encode(), read)


def index(tmp_path: Path) -> Reader:
    path = write_tokens(tmp_path, "code", "train", range(40), name="train-00000-of-00001")
    return json_reader(path, lambda: open_split(tmp_path, "code", "train", 8))


def model_config(tmp_path: Path) -> Reader:
    folder = model_folder(tmp_path)

    def read() -> None:
        import torch

        with torch.device("meta"):
            Transformer(read_model_config(folder, ModelConfig))

    return json_reader(folder / "model_config.json", read)


def pack_safetensors(text: str, rest: bytes) -> bytes:
    header = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(header)) + header + rest


def safetensors(tmp_path: Path) -> Reader:
    path = model_folder(tmp_path) / "model.safetensors"
    model, data = Transformer(tiny_config(n_layers=1)), path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return file_reader(path, lambda: load_weights(model, path), unpack=lambda d: json.loads(data[8:end]),
                       pack=lambda text: pack_safetensors(text, data[end:]))


def state(tmp_path: Path) -> Reader:
    (tmp_path / "state.json").write_text(json.dumps(dict(step=3, domain_weights={"a": 1.0}, cursors={"a": 8},
                                                         reference_loss={"a": 2.0}, evaluated=3, skipped=0)))
    return json_reader(tmp_path / "state.json", lambda: read_state(tmp_path))


def documents(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> Reader:
    lines = [{"text": f"document {i}\n", "n": i} for i in range(20)]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(b"".join(json.dumps(x).encode() + b"\n" for x in lines)))
    file = TextFile(str(path), path.name, 1)
    return file_reader(path, lambda: list(read_documents(file, Source("d", ()))), unpack=lambda d: lines,
                       pack=lambda text: compress(text.encode(errors="surrogatepass")),
                       dumps=lambda xs: "\n".join(map(json.dumps, xs)) if isinstance(xs, list) else json.dumps(xs))


def run_convert(tmp_path: Path, **given) -> None:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    try:
        convert.main(convert.ConvertSettings(out_dir=str(tmp_path / "out"), **given))
    except UserError:
        assert not (tmp_path / "out").exists()
        raise


def run_gguf(tmp_path: Path) -> None:
    """The file becomes a Hugging Face folder, and that one of ours."""
    for folder in ("unpacked", "out"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    try:
        gguf_to_hf.main(gguf_to_hf.GgufSettings(gguf=str(tmp_path / "a.gguf"), out_dir=str(tmp_path / "unpacked")))
    except UserError:
        assert not (tmp_path / "unpacked").exists()
        raise
    run_convert(tmp_path, from_hf=str(tmp_path / "unpacked"))


def hugging_face(tmp_path: Path, name: str) -> Reader:
    """A folder as transformers writes it, in two shards."""
    source = tmp_path / "hf"
    convert.main(convert.ConvertSettings(to_hf=str(model_folder(tmp_path)), out_dir=str(source), shard_gb=3e-5))
    return json_reader(source / name, lambda: run_convert(tmp_path, from_hf=str(source)))


def to_hugging_face(tmp_path: Path) -> Reader:
    folder = model_folder(tmp_path)
    run_convert(tmp_path, to_hf=str(folder))
    (folder / "assets").mkdir()
    shutil.copy(tmp_path / "out" / "config.json", folder / "assets")
    return json_reader(folder / "assets" / "config.json", lambda: run_convert(tmp_path, to_hf=str(folder)))


def gguf_file(tmp_path: Path) -> Reader:
    import gguf
    from conftest import write_gguf
    from test_convert import FAMILIES, SMALL

    model_class, config_class, changes = FAMILIES["grouped"]
    model = model_class(config_class(**{**SMALL, **changes, "num_hidden_layers": 1, "vocab_size": 260, "hidden_size": 16}))
    add, tokens = gguf.GGUFWriter.write_header_to_file, [*map(str, range(258)), "ab", "<s>"]

    def add_tokenizer(self, *args) -> None:
        self.add_tokenizer_model("gpt2")
        self.add_tokenizer_pre("smollm")
        self.add_token_list(["a", "b", *tokens[2:]])
        self.add_token_types([1] * 259 + [3])
        self.add_token_merges(["a b"])
        self.add_bos_token_id(259)
        self.add_add_bos_token(True)
        add(self, *args)

    gguf.GGUFWriter.write_header_to_file = add_tokenizer
    try:
        write_gguf(tmp_path / "a.gguf", model)
    finally:
        gguf.GGUFWriter.write_header_to_file = add
    return file_reader(tmp_path / "a.gguf", lambda: run_gguf(tmp_path))


READERS = {
    "config file": config_file, "flags": flag, "index": index, "model config": model_config, "safetensors": safetensors,
    "state": state, "jsonl": lambda p: documents(p, "", bytes), "jsonl.gz": lambda p: documents(p, ".gz", gzip.compress),
    "jsonl.zst": lambda p: documents(p, ".zst", zstandard.compress),
    "jsonl.xz": lambda p: documents(p, ".xz", lzma.compress), "jsonl.bz2": lambda p: documents(p, ".bz2", bz2.compress),
    "Hugging Face config": lambda p: hugging_face(p, "config.json"),
    "Hugging Face index": lambda p: hugging_face(p, "model.safetensors.index.json"),
    "carried config": to_hugging_face, "GGUF": gguf_file,
}


def patched(data: bytes, after: bytes, skip: int, number: bytes) -> bytes:
    """With another number so many bytes behind a text."""
    at = data.index(after) + len(after) + skip
    return data[:at] + number + data[at + len(number):]


# What broke a reader once.  Of files with JSON, a dict is merged into it; a function changes the bytes.
BROKE = {
    "config file": [{"learning_rate": 10**400}],
    "flags": [lambda data: b"x" * 300, lambda data: b"x" * 300 + b".py"],
    "index": [lambda data: DEEP],
    "model config": [lambda data: DEEP, {"n_layers": 2**31 - 1}, {"hidden_size": 2**62}, {"vocab_size": 2**64},
                     {"intermediate_size": 2**62}, {"norm_eps": 10**400}, {"rope_scaling": {"rope_type": []}}],
    "state": [lambda data: DEEP],
    "Hugging Face config": [lambda data: DEEP, {"num_hidden_layers": 2**31 - 1}, {"model_type": []}, {"hidden_size": 2**62}],
    "Hugging Face index": [lambda data: DEEP, {"weight_map": {"a": None, "b": "c"}}],
    "carried config": [lambda data: DEEP, lambda data: b"3"],
    "GGUF": [lambda data: patched(data, b"tokenizer.ggml.token_type", 4, struct.pack("<IQ", 0, 2**62)),  # no end
             lambda data: patched(data, b"tokenizer.ggml.bos_token_id", 4, struct.pack("<I", 9999)),
             lambda data: patched(data, b"llama.attention.head_count_kv", 4, struct.pack("<I", 0)),
             lambda data: data.replace(b"blk.0.ffn_up.weight", b"blk.ffn_0_up_weight")],
}


@pytest.mark.parametrize("name, n", [(name, n) for name in BROKE for n in range(len(BROKE[name]))])
def test_what_broke_a_reader_once(name, n, tmp_path, quick):
    reader, damage = READERS[name](tmp_path), BROKE[name][n]
    data = damage(reader.valid) if callable(damage) else reader.pack(reader.dumps(reader.unpack(reader.valid) | damage))
    assert data != reader.valid and not try_one(reader, data)
    with pytest.raises((UserError, ValueError)):
        reader.read(data)


# ---- the property


class Hangs(BaseException):
    pass


def ring(*_) -> None:
    raise Hangs


@pytest.fixture
def quick(monkeypatch):
    """No syncing to disk, no reading of comments, and an alarm for what hangs."""
    monkeypatch.setattr(weights, "fsync", lambda path: None)
    monkeypatch.setattr(settings, "setting_docs", functools.cache(settings.setting_docs))
    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def peak_memory() -> float:
    """MB; the kernel counts kB on Linux and bytes on a Mac."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def try_one(reader: Reader, data: bytes) -> str:
    """What broke, and where; "" if nothing did."""
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        reader.read(data)
    except (UserError, ValueError) as error:
        assert str(error)
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in at if Path(f.filename).parent == ROOT]
        return f"{type(error).__name__} at {ours[-1:]}, {Path(at[-1].filename).name}:{at[-1].lineno}: {str(error)[:100]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read(name, tmp_path, quick):
    reader = READERS[name](tmp_path)
    reader.read(reader.valid)
    memory, end, broken, n = peak_memory(), time.monotonic() + SECONDS, {}, 0
    while time.monotonic() < end:
        if what := try_one(reader, damaged(random.Random(f"{name} {n}"), reader)):
            broken.setdefault(what.split(": ")[0], f"input {n}: {what}")
        n += 1
    grown = peak_memory() - memory
    print(f"{name}: {n} inputs, {len(broken)} kinds of failure, {grown:.0f} MB more memory")
    assert not broken, "\n".join(broken.values())
    assert grown < MEMORY
