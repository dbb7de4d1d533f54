"""Raw text to tokens: one folder a domain in, one memory map a domain and split out, with a JSON index.

    python prepare.py --input_dir=raw --out_dir=data --tokenizer=Llama-2-7b-hf/tokenizer.model
    python prepare.py --input_dir=raw --out_dir=data --train_tokenizer=2048
    python prepare.py --input_dir=raw --out_dir=data --tokenizer=... --shard=3/16     # on node 3 of 16

input_dir/<domain>/ holds, at any depth, .jsonl, .jsonl.gz or .jsonl.zst with a text field, .parquet with a text column, or
.txt, one document a file.  out_dir/<domain>/<split>.bin holds each document as BOS + tokens + EOS, uint16 if the vocabulary
allows, else uint32; <split>.json says so.  A document goes to eval, prune or train by a hash of its content, so splits are
disjoint, stay as they are when files are added, and exact duplicates never straddle them.

Killed at any moment and started again with the same settings, it goes on where it was, to the same bytes; so it does on any
number of cores.  Memory stays at a few batches of a megabyte.
"""

import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from run.settings import FilePath, UserError, check, read_json, require, run_stage
from run.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("eval", "prune", "train")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
BATCH_BYTES = 1_000_000  # of text a task of a worker
SAVE_SECONDS = 10.0  # between two records of progress


@dataclass(frozen=True)
class PrepareSettings:
    input_dir: FilePath  # raw text, one folder a domain
    out_dir: FilePath  # where the tokens go
    tokenizer: FilePath = ""  # .model, tokenizer.json, tekken.json, a folder with one, or a tiktoken name
    train_tokenizer: int = 0  # instead: train a SentencePiece BPE model of so many pieces on the corpus
    train_mb: float = 10.0  # MB of text that it is trained on, of each domain
    text_field: str = "text"  # field of a .jsonl line, column of a .parquet file
    eval_fraction: float = 0.01  # share of documents held out for evaluation
    prune_fraction: float = 0.05  # share of documents for prune.py; the rest is for pretrain.py
    max_bad_lines: int = 100  # malformed lines or files skipped before the run stops
    workers: int = os.cpu_count() or 1  # processes that tokenize
    shard: str = ""  # "i/n": do the i-th of n parts of each domain's files, i from 0

    def __post_init__(self):
        require((self.tokenizer == "") != (self.train_tokenizer == 0), "give either tokenizer or train_tokenizer; they are "
                f"{self.tokenizer!r} and {self.train_tokenizer}")
        require(self.train_tokenizer == 0 or self.train_tokenizer >= 300, f"train_tokenizer = {self.train_tokenizer} "
                "must be at least 300: 256 bytes come first")
        for name in ("eval_fraction", "prune_fraction"):
            require(0 <= getattr(self, name) < 1, f"{name} = {getattr(self, name)} must be from 0 to below 1")
        require(self.eval_fraction + self.prune_fraction < 1, f"eval_fraction + prune_fraction = "
                f"{self.eval_fraction + self.prune_fraction} must stay below 1")
        require(self.workers >= 1, f"workers = {self.workers} must be at least 1")
        require(self.max_bad_lines >= 0, f"max_bad_lines = {self.max_bad_lines} must not be negative")
        require(0 < self.train_mb < 1e6, f"train_mb = {self.train_mb} must be above 0")
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        require(self.shard == "" or (found is not None and int(found[1]) < int(found[2]) <= 99_999),
                f"shard = {self.shard!r} is not i/n with i from 0 to n - 1")
        require(not (self.shard and self.train_tokenizer), "train_tokenizer reads all text, shard a part: train first, on "
                "one machine, then give each shard that tokenizer")

    def suffix(self) -> str:
        """What comes behind the split's name in a file's: nothing, or the shard."""
        return "" if not self.shard else "-{:05d}-of-{:05d}".format(*map(int, self.shard.split("/")))


# ---- reading


@dataclass(frozen=True)
class BadLine:
    where: str  # file:line
    why: str


def find_domains(cfg: PrepareSettings) -> dict[str, list[Path]]:
    """The files of each domain, all shards', in an order that does not depend on the file system.  Raises UserError."""
    root = Path(cfg.input_dir)
    check(root.is_dir(), f"input_dir = {root} is no folder")
    domains = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        paths = [p for p in folder.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()]
        check(bool(paths), f"domain {folder.name}: {folder} holds no {', '.join(SUFFIXES)} file; add text or remove it")
        check(re.fullmatch(r"[\w.-]+", folder.name) is not None and folder.name != "tokenizer", f"domain folder "
              f'{folder.name!r}: name it with letters, digits, ".", "_" and "-", and not "tokenizer"')
        domains[folder.name] = sorted(paths, key=lambda p: p.relative_to(root).as_posix())
    check(bool(domains), f"input_dir = {root} holds no folder; make one a domain")
    return domains


def read_documents(path: Path, text_field: str) -> Iterator[str | BadLine]:
    """The documents of one file, and what could not be read as one, in order."""
    try:
        if path.name.endswith(".txt"):
            yield path.read_bytes().decode("utf-8")
        elif path.name.endswith(".parquet"):
            yield from read_parquet(path, text_field)
        else:
            yield from read_lines(path, text_field)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:  # a truncated or damaged file ends here
        yield BadLine(str(path), str(error))


def checked(text: object, where: str, why: str) -> str | BadLine:
    """A document, unless it is no string or holds a lone surrogate (JSON's "\\ud800"), which is no Unicode text."""
    try:
        return text if isinstance(text, str) and text.encode() is not None else BadLine(where, why)
    except UnicodeEncodeError as error:
        return BadLine(where, str(error))


def read_lines(path: Path, text_field: str) -> Iterator[str | BadLine]:
    with ExitStack() as stack:
        file = stack.enter_context(gzip.open(path) if path.name.endswith(".gz") else path.open("rb"))
        if path.name.endswith(".zst"):
            try:
                import zstandard
            except ImportError:
                raise UserError(f"{path} needs the package zstandard; pip install zstandard") from None
            file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
            errors = (zstandard.ZstdError,)
        else:
            errors = ()
        number = 0
        try:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    text = record[text_field] if isinstance(record, dict) else None
                    yield checked(text, f"{path}:{number}", f"no text in field {text_field!r}")
                except KeyError:
                    yield BadLine(f"{path}:{number}", f"no field {text_field!r}")
                except (ValueError, RecursionError) as error:
                    yield BadLine(f"{path}:{number}", str(error))
        except (OSError, EOFError, zlib.error, *errors) as error:
            yield BadLine(f"{path}:{number + 1}", str(error))


def read_parquet(path: Path, text_field: str) -> Iterator[str | BadLine]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow; pip install pyarrow") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000, columns=[text_field]):
            for text in batch.column(0).to_pylist() if batch.num_columns else [None] * batch.num_rows:
                yield checked(text, str(path), f"no text in column {text_field!r}")
    except pyarrow.ArrowException as error:
        yield BadLine(str(path), str(error))


def read_batches(paths: list[Path], cfg: PrepareSettings, bad: list[BadLine]) -> Iterator[list[str]]:
    """Documents that are not empty, in batches of about BATCH_BYTES.  Bad lines go to `bad`; too many raise UserError."""
    batch, size = [], 0
    for document in itertools.chain.from_iterable(read_documents(p, cfg.text_field) for p in paths):
        if isinstance(document, BadLine):
            bad.append(document)
            if len(bad) <= 5:
                tqdm.write(f"skipped {document.where}: {document.why}")
            check(len(bad) <= cfg.max_bad_lines, f"{document.where}: {document.why}; more than max_bad_lines = "
                  f"{cfg.max_bad_lines} lines are malformed")
        elif document:
            batch.append(document)
            size += len(document)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


# ---- tokenizing, in worker processes


def split_of(text: bytes, eval_fraction: float, prune_fraction: float) -> int:
    """Index into SPLITS, from a hash of a document's UTF-8 bytes."""
    u = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") / 2**64
    return 0 if u < eval_fraction else 1 if u < eval_fraction + prune_fraction else 2


@dataclass
class Piece:
    """What one batch gives to one split."""

    tokens: bytes = b""  # little-endian, of the index's dtype
    n_documents: int = 0
    n_bytes: int = 0  # of text, UTF-8


def start_worker(source: str, dtype: str, fractions: tuple[float, float]) -> None:
    """Runs once in each worker: what `tokenize` needs, as globals of that process."""
    global worker_tokenizer, worker_dtype, worker_fractions
    worker_tokenizer, worker_dtype, worker_fractions = load_tokenizer(source), np.dtype(dtype), fractions
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A worker waits for work on a pipe that it holds both ends of, so a killed parent would leave it there for good."""
    multiprocessing.parent_process().join()
    os._exit(1)


def tokenize(texts: list[str]) -> list[Piece]:
    """A Piece for each of SPLITS."""
    t, pieces, tokens = worker_tokenizer, [Piece() for _ in SPLITS], [[] for _ in SPLITS]
    bos, eos = ([] if i is None else [np.array([i], worker_dtype)] for i in (t.bos_id, t.eos_id))
    for text, ids in zip(texts, t.encode_batch(texts)):
        raw = text.encode()
        split = split_of(raw, *worker_fractions)
        tokens[split] += [*bos, ids.astype(worker_dtype), *eos]
        pieces[split].n_documents += 1
        pieces[split].n_bytes += len(raw)
    for piece, arrays in zip(pieces, tokens):
        piece.tokens = np.concatenate(arrays).tobytes() if arrays else b""
    return pieces


def in_order(pool: ProcessPoolExecutor, batches: Iterator[list[str]], ahead: int) -> Iterator[list[Piece]]:
    """`tokenize` of each batch, in order, at most `ahead` batches in memory: a pool's own map would read all at once."""
    waiting = deque()
    for batch in batches:
        waiting.append(pool.submit(tokenize, batch))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ---- writing


def write_json(path: Path, value: dict) -> None:
    """Atomically: a reader sees the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def prepare_domain(domain: str, paths: list[Path], cfg: PrepareSettings, t: Tokenizer, pool: ProcessPoolExecutor,
                   bar: tqdm) -> list[dict]:
    """Write one domain's splits, or find them done; returns their indexes.  Raises UserError.

    A record of progress says how many batches are on the disk, and how long each file was then: what a killed run wrote
    after it is cut off, and as many batches are read again but not tokenized again.
    """
    folder, suffix = Path(cfg.out_dir) / domain, cfg.suffix()
    bins, finals = ([folder / f"{split}{suffix}.{kind}" for split in SPLITS] for kind in ("bin", "json"))
    record = folder / f"progress{suffix}.json"
    if all(path.exists() for path in finals):
        record.unlink(missing_ok=True)
        return [read_json(path) for path in finals]
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if t.vocab_size <= 1 << 16 else "uint32"
    progress = read_json(record) if record.exists() else {"batches": 0, "splits": [[0, 0, 0] for _ in SPLITS]}
    bad: list[BadLine] = []
    with ExitStack() as stack:
        files = [stack.enter_context(open_partial(path, size)) for path, (size, _, _) in zip(bins, progress["splits"])]
        batches = itertools.islice(read_batches(paths, cfg, bad), progress["batches"], None)
        saved = time.monotonic()
        for pieces in in_order(pool, batches, 2 * cfg.workers + 2):
            for file, counts, piece in zip(files, progress["splits"], pieces):
                file.write(piece.tokens)
                counts[0] += len(piece.tokens)
                counts[1] += piece.n_documents
                counts[2] += piece.n_bytes
            progress["batches"] += 1
            bar.update(sum(piece.n_bytes for piece in pieces))
            if time.monotonic() - saved > SAVE_SECONDS:
                save_progress(files, record, progress)
                saved = time.monotonic()
        save_progress(files, record, progress)
    if bad:
        tqdm.write(f"{domain}: {len(bad)} malformed lines skipped")
    check(progress["batches"] > 0 or cfg.shard != "", f"domain {domain} holds no document; add text or remove its folder")
    indexes = []
    for split, path, (size, n_documents, n_bytes) in zip(SPLITS, bins, progress["splits"]):
        os.replace(partial_of(path), path)
        indexes.append({
            "format": 1, "domain": domain, "split": split, "dtype": dtype, "n_tokens": size // np.dtype(dtype).itemsize,
            "n_documents": n_documents, "n_bytes": n_bytes, "vocab_size": t.vocab_size, "bos_id": t.bos_id,
            "eos_id": t.eos_id, "tokenizer": t.fingerprint, "sha256": sha256(path)})
    for path, index in zip(finals, indexes):
        write_json(path, index)
    record.unlink()
    return indexes


def partial_of(path: Path) -> Path:
    return path.with_suffix(".bin.partial")


def open_partial(path: Path, size: int) -> io.BufferedRandom:
    """The file that a .bin grows in, cut to `size` bytes and open at its end.  Raises UserError if it is shorter."""
    partial = partial_of(path)
    if path.exists() and not partial.exists():
        os.replace(path, partial)  # killed after this rename, before the index was written
    partial.touch()
    there = partial.stat().st_size
    check(there >= size, f"{partial} has {there} bytes, but {size} were recorded; remove {path.parent} to start it anew")
    file = partial.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def save_progress(files: list[io.BufferedRandom], record: Path, progress: dict) -> None:
    """Bytes first, then the record that counts them."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    write_json(record, progress)


# ---- the tokenizer, and the whole


def training_text(domains: dict[str, list[Path]], cfg: PrepareSettings) -> Iterator[str]:
    """Lines to train a tokenizer on: train_mb of each domain, as much from each of its files, none held out."""
    for paths in domains.values():
        for path in paths:
            left = max(1000, int(cfg.train_mb * 1e6 / len(paths)))
            for document in read_documents(path, cfg.text_field):
                if isinstance(document, str) and left > 0:
                    raw = document.encode()
                    if split_of(raw, cfg.eval_fraction, cfg.prune_fraction) != 0:
                        left -= len(raw)
                        yield from document.splitlines()
                if left <= 0:
                    break


def train_sentencepiece(lines: Iterator[str], size: int) -> bytes:
    """A BPE model as Llama's: byte fallback, single digits, spaces kept.  Raises UserError."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=lines, model_writer=model, vocab_size=size, model_type="bpe", byte_fallback=True,
            split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, max_sentence_length=100_000, minloglevel=2)
    except RuntimeError as error:
        found = re.search(r"<= (\d+)", str(error))
        why = f"lower --train_tokenizer to at most {found[1]}" if found else " ".join(str(error).split())[-200:]
        raise UserError(f"a tokenizer of {size} pieces cannot be trained on this text; {why}") from None
    return model.getvalue()


def keep_tokenizer(given: Tokenizer | None, cfg: PrepareSettings, domains: dict[str, list[Path]]) -> Tokenizer:
    """The tokenizer given, or else trained (unless that was done); out_dir/tokenizer holds a copy of it."""
    folder = Path(cfg.out_dir) / "tokenizer"
    if given is None:
        if (folder / "tokenizer.model").exists():
            return load_tokenizer(folder)
        print(f"training a tokenizer of {cfg.train_tokenizer} pieces")
    files = given.files if given else {
        "tokenizer.model": train_sentencepiece(training_text(domains, cfg), cfg.train_tokenizer)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.{os.getpid()}.tmp").write_bytes(content)  # shards write the same at the same time
        os.replace(folder / f"{name}.{os.getpid()}.tmp", folder / name)
    return given or load_tokenizer(folder)


def check_same_work(given: Tokenizer | None, cfg: PrepareSettings, domains: dict[str, list[Path]]) -> None:
    """out_dir is new, or begun with the same settings, tokenizer and input, or without a token yet.  Raises UserError."""
    out_dir = Path(cfg.out_dir)
    record = out_dir / f"prepare{cfg.suffix()}.json"
    fixed = ("input_dir", "tokenizer", "train_tokenizer", "train_mb", "text_field", "eval_fraction", "prune_fraction")
    work = {name: getattr(cfg, name) for name in fixed} | {"fingerprint": given.fingerprint if given else ""}
    work |= {f"file {p}": p.stat().st_size for paths in domains.values() for p in paths}  # bytes
    if record.exists():
        old = read_json(record)
        check(isinstance(old, dict), f"{record} is not a JSON object; remove {out_dir} to start anew")
        odd = [f"{n} (was {old.get(n)!r}, is {work.get(n)!r})" for n in {**work, **old} if work.get(n) != old.get(n)]
        tokens = any(path.stat().st_size for path in out_dir.glob("*/*.bin*"))
        fresh = not tokens and list(out_dir.glob("prepare*.json")) == [record]
        check(not odd or fresh, f"out_dir = {out_dir} was begun with other settings or files: {', '.join(odd[:3])}"
              + ", ..." * (len(odd) > 3) + "; choose another, or remove it")
        if odd and not Path(cfg.tokenizer).resolve().is_relative_to((out_dir / "tokenizer").resolve()):
            shutil.rmtree(out_dir / "tokenizer", ignore_errors=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, work)


def print_table(indexes: dict[str, list[dict]]) -> None:
    print(f"{'domain':<16}{'documents':>12}{'tokens':>16}" + "".join(f"{s + ' tokens':>16}" for s in SPLITS)
          + f"{'bytes/token':>13}")
    for domain, splits in indexes.items():
        tokens, n_bytes = sum(i["n_tokens"] for i in splits), sum(i["n_bytes"] for i in splits)
        print(f"{domain:<16}{sum(i['n_documents'] for i in splits):>12,}{tokens:>16,}"
              + "".join(f"{i['n_tokens']:>16,}" for i in splits) + f"{n_bytes / max(1, tokens):>13.2f}")


def main(cfg: PrepareSettings) -> None:
    domains = find_domains(cfg)
    try:
        given = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else None  # a mistyped name ends here; loaded only once
        check_same_work(given, cfg, domains)
        tokenizer = keep_tokenizer(given, cfg, domains)
        if cfg.shard:
            i, n = map(int, cfg.shard.split("/"))
            domains = {d: paths[i::n] for d, paths in domains.items()}
        sizes = [(p.suffix, p.stat().st_size) for paths in domains.values() for p in paths]
        total = sum(size for _, size in sizes) if {s for s, _ in sizes} <= {".jsonl", ".txt"} else None
        arguments = (str(Path(cfg.out_dir) / "tokenizer"), "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
                     (cfg.eval_fraction, cfg.prune_fraction))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is all there is
        with (ProcessPoolExecutor(cfg.workers, multiprocessing.get_context("spawn"), start_worker, arguments) as pool,
              tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar):
            indexes = {}
            for domain, paths in domains.items():
                bar.set_description(domain)
                indexes[domain] = prepare_domain(domain, paths, cfg, tokenizer, pool, bar)
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory; start again with fewer --workers, it goes on "
                        "where it was") from None
    except OSError as error:
        raise UserError(f"{error.filename or cfg.out_dir}: {error.strerror or error}") from None
    print_table(indexes)


if __name__ == "__main__":
    run_stage(main, PrepareSettings)
