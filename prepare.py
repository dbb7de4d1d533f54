"""Raw text to tokens: one folder a domain in, one memory map a domain and split out, with a JSON index.

    python prepare.py --input_dir=raw --out_dir=data --tokenizer=Llama-2-7b-hf/tokenizer.model
    python prepare.py --input_dir=raw --out_dir=data --train_tokenizer=2048
    python prepare.py --input_dir=raw --out_dir=data --tokenizer=... --shard=3/16     # on node 3 of 16

input_dir/<domain>/ holds text, at any depth, in the formats of run/documents.py; or each record names its own domain
(--domain_field).  docs/data.md has the flags for the known corpora.  out_dir/<domain>/<split>.bin holds each document as
BOS + tokens + EOS, uint16 if the vocabulary allows, else uint32; <split>.json says so.  A document goes to eval, prune or
train by a hash of its content, so splits are disjoint, stay as they are when files are added, and exact duplicates never
straddle them.

Killed at any moment and started again with the same settings, it goes on where it was, to the same bytes; so it does on any
number of cores.  Memory stays at a few batches of a megabyte.  A domain can be added to out_dir later.  Nothing is left out
without a word: the last lines say what was, and a file that cannot be read to its end stops the run.
"""

import hashlib
import io
import itertools
import multiprocessing
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from run.documents import LeftOut, Omitted, Source, find_sources, read_documents, refusal, say_passed_over
from run.settings import FilePath, UserError, check, read_json, require, run_stage
from run.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from run.work import check_new, check_same_work, model_vocabulary, write_json

SPLITS = ("eval", "prune", "train")
BATCH_BYTES = 1_000_000  # of text a task of a worker
SAVE_SECONDS = 10.0  # between two records of progress


@dataclass(frozen=True)
class PrepareSettings:
    input_dir: FilePath  # raw text, one folder a domain; also a URL that fsspec knows, as s3:// or hf://datasets/
    out_dir: FilePath  # where the tokens go
    tokenizer: FilePath = ""  # .model, tokenizer.json, tekken.json, a folder with one, or a tiktoken name
    train_tokenizer: int = 0  # instead: train a SentencePiece BPE model of so many pieces on the corpus
    train_mb: float = 10.0  # MB of text that it is trained on, of each domain
    text_field: str | dict[str, str] = "text"  # field of a record or column, "a.b" for b in a; a dict: by domain
    domain_field: str = ""  # field of a record that names its domain, instead of its folder
    domains: dict[str, str] | None = None  # {folder, path pattern or value of domain_field: name}; None: all by their own
    model_dir: FilePath = ""  # model folder, ours or Hugging Face's, that the token ids must suit; "": not checked here
    eval_fraction: float = 0.01  # share of documents held out for evaluation
    prune_fraction: float = 0.05  # share of documents for prune.py; the rest is for pretrain.py
    max_bad_lines: int = 100  # malformed records of a domain left out before the run stops
    skip_bad_files: bool = False  # leave out files, or the rest of files, that cannot be read, instead of stopping
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
        require(not (self.shard and self.domain_field) or self.domains is not None, "shard and domain_field need domains: "
                "each shard must write the same ones, whatever is in its files")
        require(not (self.shard and self.train_tokenizer), "train_tokenizer reads all text, shard a part: train first, on "
                "one machine, then give each shard that tokenizer")

    def suffix(self) -> str:
        """What comes behind the split's name in a file's: nothing, or the shard."""
        return "" if not self.shard else "-{:05d}-of-{:05d}".format(*map(int, self.shard.split("/")))


# ---- reading


def read_batches(source: Source, cfg: PrepareSettings, omitted: Omitted) -> Iterator[dict[str, list[str]]]:
    """Documents that are not empty, by domain, in batches of about BATCH_BYTES.  Raises UserError."""
    batch, size = {}, 0
    for found in itertools.chain.from_iterable(read_documents(file, source) for file in source.files):
        if isinstance(found, LeftOut):
            omitted.add(found, max_bad_lines=cfg.max_bad_lines, skip_bad_files=cfg.skip_bad_files)
            continue
        domain, text = found
        if not text:
            omitted.count["empty documents"] += 1
            continue
        batch.setdefault(domain, []).append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = {}, 0
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
    max_token: int = -1  # the largest id


def start_worker(source: str, dtype: str, fractions: tuple[float, float]) -> None:
    """Runs once in each worker: what `tokenize` needs, as globals of that process."""
    global worker_tokenizer, worker_dtype, worker_fractions
    worker_tokenizer, worker_dtype, worker_fractions = load_tokenizer(source), np.dtype(dtype), fractions
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A worker waits for work on a pipe that it holds both ends of, so a killed parent would leave it there for good."""
    multiprocessing.parent_process().join()
    os._exit(1)


def tokenize(batch: dict[str, list[str]]) -> dict[str, list[Piece]]:
    """A Piece for each of SPLITS, by domain."""
    t, found = worker_tokenizer, {}
    bos, eos = ([] if i is None else [np.array([i], worker_dtype)] for i in (t.bos_id, t.eos_id))
    for domain, texts in batch.items():
        found[domain], tokens = [Piece() for _ in SPLITS], [[] for _ in SPLITS]
        for text, ids in zip(texts, t.encode_batch(texts)):
            raw = text.encode()
            split = split_of(raw, *worker_fractions)
            tokens[split] += [*bos, ids.astype(worker_dtype), *eos]
            found[domain][split].n_documents += 1
            found[domain][split].n_bytes += len(raw)
        for piece, arrays in zip(found[domain], tokens):
            if arrays:
                joined = np.concatenate(arrays)
                piece.tokens, piece.max_token = joined.tobytes(), int(joined.max())
    return found


def in_order(pool: ProcessPoolExecutor, batches: Iterator[dict[str, list[str]]], ahead: int
             ) -> Iterator[dict[str, list[Piece]]]:
    """`tokenize` of each batch, in order, at most `ahead` batches in memory: a pool's own map would read all at once."""
    waiting = deque()
    for batch in batches:
        waiting.append(pool.submit(tokenize, batch))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ---- writing


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class Output:
    """Where the tokens of a domain go: the three files, and what is in them so far."""

    folder: Path
    suffix: str
    counts: list[list[int]]  # of each of SPLITS: bytes in the file, documents, bytes of text, largest token id
    files: list[io.BufferedRandom] = field(default_factory=list)

    def path(self, split: str, kind: str) -> Path:
        return self.folder / f"{split}{self.suffix}.{kind}"

    def open(self, stack: ExitStack) -> "Output":
        """Cut the files to what was counted.  Raises UserError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for split, (size, *_) in zip(SPLITS, self.counts):
            self.path(split, "json").unlink(missing_ok=True)
            self.files.append(stack.enter_context(open_partial(self.path(split, "bin"), size)))
        return self

    def add(self, pieces: list[Piece]) -> None:
        for file, counts, piece in zip(self.files, self.counts, pieces):
            file.write(piece.tokens)
            counts[:] = [counts[0] + len(piece.tokens), counts[1] + piece.n_documents, counts[2] + piece.n_bytes,
                         max(counts[3], piece.max_token)]

    def finish(self, t: Tokenizer) -> list[dict]:
        """The files get their names, then an index each.  Returns the indexes."""
        indexes, dtype = [], dtype_of(t)
        for split, file, (size, n_documents, n_bytes, max_token) in zip(SPLITS, self.files, self.counts):
            file.close()
            os.replace(partial_of(self.path(split, "bin")), self.path(split, "bin"))
            indexes.append({
                "format": 1, "domain": self.folder.name, "split": split, "dtype": dtype,
                "n_tokens": size // np.dtype(dtype).itemsize, "n_documents": n_documents, "n_bytes": n_bytes,
                "max_token": max_token, "vocab_size": t.vocab_size, "bos_id": t.bos_id, "eos_id": t.eos_id,
                "tokenizer": t.fingerprint, "sha256": sha256(self.path(split, "bin"))})
        for split, index in zip(SPLITS, indexes):
            write_json(self.path(split, "json"), index)
        return indexes


def dtype_of(t: Tokenizer) -> str:
    return "uint16" if t.vocab_size <= 1 << 16 else "uint32"


def prepare_source(source: Source, cfg: PrepareSettings, work: dict, t: Tokenizer, pool: ProcessPoolExecutor, bar: tqdm
                   ) -> dict[str, list[dict]]:
    """Write the splits of a source's domains, or find them done; returns their indexes.  Raises UserError.

    A record of progress says how many batches are on the disk, and how long each file was then: what a killed run wrote
    after it is cut off, and as many batches are read again but not tokenized again.  work: of `check_same_work`.
    """
    out_dir, suffix, mine = Path(cfg.out_dir), cfg.suffix(), work["sources"][source.name]
    record = out_dir / source.name / f"progress{suffix}.json"
    done = {d: [out_dir / d / f"{split}{suffix}.json" for split in SPLITS] for d in mine.get("done", ())}
    if done and all(path.exists() for paths in done.values() for path in paths):
        record.unlink(missing_ok=True)
        return {domain: [read_json(path) for path in paths] for domain, paths in done.items()}
    known = [source.name] if source.name else (source.domains or {}).values()
    progress = read_json(record) if record.exists() else {"batches": 0, "domains": {d: new_counts() for d in known}}
    most, omitted, saved = model_vocabulary(cfg.model_dir), Omitted(), time.monotonic()
    with ExitStack() as stack:
        outputs = {d: Output(out_dir / d, suffix, counts).open(stack) for d, counts in progress["domains"].items()}
        batches = itertools.islice(read_batches(source, cfg, omitted), progress["batches"], None)
        for found in in_order(pool, batches, 2 * cfg.workers + 2):
            for domain, pieces in found.items():
                if domain not in outputs:
                    check_new(domain, work, out_dir)
                    progress["domains"][domain] = new_counts()
                    outputs[domain] = Output(out_dir / domain, suffix, progress["domains"][domain]).open(stack)
                outputs[domain].add(pieces)
                largest = max(piece.max_token for piece in pieces)
                check(largest < most, f"domain {domain} has token {largest}, but the model in {cfg.model_dir} knows "
                      f"{most:.0f} tokens; prepare the text with the model's tokenizer")
            progress["batches"] += 1
            bar.update(sum(piece.n_bytes for pieces in found.values() for piece in pieces))
            if time.monotonic() - saved > SAVE_SECONDS:
                save_progress(outputs, record, progress)
                saved = time.monotonic()
        save_progress(outputs, record, progress)
        empty = [domain for domain, output in outputs.items() if not any(n for _, n, *_ in output.counts)]
        check(cfg.shard != "" or (bool(outputs) and not empty), f"domain {', '.join(empty) or 'none'} holds no document; "
              "add text, or remove its folder or name")
        indexes = {domain: output.finish(t) for domain, output in outputs.items()}
    mine |= {"done": list(outputs), "left_out": omitted.count, "files_left_out": omitted.files}
    write_json(out_dir / f"prepare{suffix}.json", work)
    record.unlink()
    return indexes


def new_counts() -> list[list[int]]:
    return [[0, 0, 0, -1] for _ in SPLITS]


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


def save_progress(outputs: dict[str, Output], record: Path, progress: dict) -> None:
    """Bytes first, then the record that counts them."""
    for output in outputs.values():
        for file in output.files:
            file.flush()
            os.fsync(file.fileno())
    write_json(record, progress)


# ---- the tokenizer, and the whole


def training_text(sources: list[Source], cfg: PrepareSettings) -> Iterator[str]:
    """Lines to train a tokenizer on: train_mb of each domain, as much from each of its files, none held out.

    Raises UserError if a domain gives none.
    """
    for source in sources:
        share = max(1000, int(cfg.train_mb * 1e6 / len(source.files)))  # bytes
        given = Counter(dict.fromkeys([source.name] if source.name else (source.domains or {}).values(), 0))
        for file in source.files:
            left = Counter()  # bytes that this file may still give
            for found in read_documents(file, source):
                if isinstance(found, LeftOut):
                    check(found.kind != "files" or cfg.skip_bad_files, refusal(found))
                    continue
                domain, text = found
                raw = text.encode()
                left.setdefault(domain, share)
                if left[domain] > 0 and split_of(raw, cfg.eval_fraction, cfg.prune_fraction) != 0:
                    left[domain] -= len(raw)
                    given[domain] += len(raw)
                    yield from text.splitlines()
                # in the first of files with several domains we look for all that there are
                if all(left.setdefault(d, share) <= 0 for d in given) and (source.name or file is not source.files[0]):
                    break
        for domain, size in given.items():
            check(size > 0, f"domain {domain} gives no text to train a tokenizer on: all its documents are empty, or held "
                  "out for evaluation; add text, lower --eval_fraction, or give --tokenizer")


def keep_tokenizer(given: Tokenizer | None, cfg: PrepareSettings, sources: list[Source]) -> Tokenizer:
    """The tokenizer given, or else trained (unless that was done); out_dir/tokenizer holds a copy of it."""
    folder = Path(cfg.out_dir) / "tokenizer"
    if given is None:
        if (folder / "tokenizer.model").exists():
            return load_tokenizer(folder)
        print(f"training a tokenizer of {cfg.train_tokenizer} pieces")
    files = given.files if given else {
        "tokenizer.model": train_sentencepiece(training_text(sources, cfg), cfg.train_tokenizer)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.{os.getpid()}.tmp").write_bytes(content)  # shards write the same at the same time
        os.replace(folder / f"{name}.{os.getpid()}.tmp", folder / name)
    return given or load_tokenizer(folder)


def print_table(indexes: dict[str, list[dict]], cfg: PrepareSettings, work: dict) -> None:
    """Documents and tokens of each domain, then what was left out, and shares of tokens far from those asked for."""
    print(f"{'domain':<16}{'documents':>12}{'tokens':>16}" + "".join(f"{s + ' tokens':>16}" for s in SPLITS)
          + f"{'bytes/token':>13}")
    for domain, splits in indexes.items():
        tokens, n_bytes = sum(i["n_tokens"] for i in splits), sum(i["n_bytes"] for i in splits)
        print(f"{domain:<16}{sum(i['n_documents'] for i in splits):>12,}{tokens:>16,}"
              + "".join(f"{i['n_tokens']:>16,}" for i in splits) + f"{n_bytes / max(1, tokens):>13.2f}")
    for name, source in work["sources"].items():
        if left_out := [f"{n:,} {kind}" for kind, n in source.get("left_out", {}).items()]:
            print(f"left out{' of ' * bool(name)}{name}: {'; '.join([', '.join(left_out), *source['files_left_out']])}")
    for domain, splits in indexes.items():
        tokens = max(1, sum(i["n_tokens"] for i in splits))
        for index, asked in zip(splits, (cfg.eval_fraction, cfg.prune_fraction)):
            share = index["n_tokens"] / tokens
            if not asked / 2 <= share <= asked * 2:
                print(f"note: {domain} has {share:.1%} of its tokens in {index['split']}, not the {asked:.1%} asked for: no "
                      f"document is divided, and {index['n_documents']} of {sum(i['n_documents'] for i in splits)} fell "
                      f"there; add text, cut long documents, or change --{index['split']}_fraction")


def main(cfg: PrepareSettings) -> None:
    sources, passed = find_sources(cfg.input_dir, text_field=cfg.text_field, domain_field=cfg.domain_field,
                                   domains=cfg.domains, skip_bad_files=cfg.skip_bad_files)
    if passed:
        print(say_passed_over(passed))
    try:
        given = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else None  # a mistyped name ends here; loaded only once
        work = check_same_work(given, cfg, sources)
        tokenizer = keep_tokenizer(given, cfg, sources)
        if cfg.shard:
            i, n = map(int, cfg.shard.split("/"))
            sources = [replace(source, files=source.files[i::n]) for source in sources]
        files = [file for source in sources for file in source.files]
        plain = all(file.size is not None and file.name.endswith((".jsonl", ".txt")) for file in files)
        arguments = (str(Path(cfg.out_dir) / "tokenizer"), dtype_of(tokenizer), (cfg.eval_fraction, cfg.prune_fraction))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is all there is
        with (ProcessPoolExecutor(cfg.workers, multiprocessing.get_context("spawn"), start_worker, arguments) as pool,
              tqdm(total=sum(f.size for f in files) if plain else None, unit="B", unit_scale=True, disable=None) as bar):
            indexes = {}
            for source in sources:
                bar.set_description(source.name or cfg.domain_field)
                indexes |= prepare_source(source, cfg, work, tokenizer, pool, bar)
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory; start again with fewer --workers, it goes on "
                        "where it was") from None
    except OSError as error:
        raise UserError(f"{error.filename or cfg.out_dir}: {error.strerror or error}") from None
    print_table(indexes, cfg, work)


if __name__ == "__main__":
    run_stage(main, PrepareSettings)
