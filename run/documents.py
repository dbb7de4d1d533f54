"""Text as people have it: which files below a folder or URL hold documents, and the documents in each, in order.

Read are .jsonl, .ndjson and .json with a record a line, and .txt with a document a file, also as .gz, .bz2, .xz or .zst; and
.parquet.  What is left out on the way is a LeftOut with its reason, never silence: a record that is none; a file, or its
rest, that cannot be read; a document of a domain that was not asked for.  A file of its own since a reader of prepare.py
would have to step over it.
"""

import bz2
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tqdm import tqdm

from run.settings import UserError, check, lfs_pointer

NAMES = re.compile(r"\.(jsonl|ndjson|json|txt)(\.(gz|bz2|xz|zst))?$|\.(parquet)$", re.IGNORECASE)
FORMATS = ".jsonl, .ndjson, .json or .txt (also .gz, .bz2, .xz, .zst) or .parquet"
READ_BYTES = 1 << 18  # of a compressed file at once
PARQUET_ROWS = 100  # at once, whatever their length
MAX_DOMAINS = 200  # that records may name: a field with more names none
DOMAIN_NAME = re.compile(r"[\w-][\w.-]*")


@dataclass(frozen=True)
class TextFile:
    path: str  # as it is shown and opened: a path, or a URL without its protocol if there is an fs
    name: str  # below input_dir
    size: int | None  # bytes; None: a link that leads nowhere, or a file system that does not say
    fs: object = None  # fsspec's, None for a local file
    inode: tuple[int, int] | None = None  # device and inode of a local file


@dataclass(frozen=True)
class LeftOut:
    kind: str  # "malformed lines" (a record that is none), "files" (one or its rest), "documents of other domains"
    where: str  # file:line, or the file
    why: str


@dataclass
class Omitted:
    """What of a source is left out."""

    count: Counter = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)  # each with the reason

    def add(self, found: LeftOut, *, max_bad_lines: int, skip_bad_files: bool) -> None:
        """Raises UserError where the settings allow no more."""
        self.count[found.kind] += 1
        said = f"{found.where}: {found.why}"
        if found.kind == "files":
            self.files.append(said)
            check(skip_bad_files, refusal(found))
        if found.kind == "files" or (found.kind == "malformed lines" and self.count[found.kind] <= 5):
            tqdm.write(f"left out: {said}")
        check(self.count["malformed lines"] <= max_bad_lines, f"{said}; more than max_bad_lines = {max_bad_lines} lines are "
              "malformed")


def refusal(lost: LeftOut) -> str:
    return f"{lost.where} cannot be read to its end: {lost.why}; mend it, or leave that out with --skip_bad_files"


class Unreadable(Exception):
    """A file that is no text, or ends too early: says why."""


@dataclass(frozen=True)
class Source:
    """Files whose documents all belong to one domain, or each to the one that its record names."""

    name: str  # of the domain; "": the record's domain_field names it
    files: tuple[TextFile, ...]  # in an order that does not depend on the file system
    text_field: str | dict[str, str] = "text"  # a dict: by domain, "text" for those that are not in it
    domain_field: str = ""
    domains: dict[str, str] | None = None  # what domain_field holds -> domain; None: its own name
    names: dict[str, str] = field(default_factory=dict)  # what domain_field held so far -> domain

    def document(self, record: object) -> tuple[str, str]:
        """(domain, text) of a record; domain "" if it is of one that was not asked for.  Raises ValueError."""
        if not isinstance(record, dict):
            raise ValueError(f"{json_kind(record)} is no record")
        domain = self.name or self.domain_of(record)
        name = self.text_field if isinstance(self.text_field, str) else self.text_field.get(domain, "text")
        text = reach(record, name)
        if isinstance(text, bytes):
            text = text.decode()
        if not isinstance(text, str):
            raise ValueError(f"field {name!r} holds {json_kind(text)}, no text")
        text.encode()  # a lone surrogate (JSON's "\ud800") is no Unicode text: UnicodeEncodeError, a ValueError
        return domain, text

    def domain_of(self, record: dict) -> str:
        value = reach(record, self.domain_field)
        if not isinstance(value, str):
            raise ValueError(f"field {self.domain_field!r} holds {json_kind(value)}, no name of a domain")
        if self.domains is not None:
            return self.domains.get(value, "")
        if value not in self.names:
            name = re.sub(r"[^\w.-]+", "_", value).strip("_.")
            check_domain_name(name)
            check(len(self.names) < MAX_DOMAINS, f"domain_field = {self.domain_field} names over {MAX_DOMAINS} domains, "
                  f"{', '.join([*self.names][:3])}, ...; choose some with --domains, or another field")
            other = [v for v, n in self.names.items() if n == name]
            check(not other, f"domain_field = {self.domain_field}: {value!r} and {''.join(other)!r} would both be domain "
                  f"{name}; name them with --domains")
            self.names[value] = name
        return self.names[value]


def reach(record: dict, name: str) -> object:
    """record["a"]["b"] for "a.b", or record["a.b"] if there is that.  Raises ValueError."""
    if name in record:
        return record[name]
    value = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            there = ", ".join(map(str, list(record)[:8])) + ", ..." * (len(record) > 8)
            raise ValueError(f"no field {name!r} among {there or 'none'}")
        value = value[part]
    return value


def json_kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", type(None): "null", int: "a number", float: "a number", str: "a string"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def check_domain_name(name: str) -> None:
    check(DOMAIN_NAME.fullmatch(name) is not None and name != "tokenizer", f"domain {name!r}: name it with letters, digits, "
          '".", "_" and "-", not beginning with ".", and not "tokenizer"')


# ---- which files there are


def list_local(folder: str, below: str, seen: set[tuple], passed: dict[str, list[str]]) -> Iterator[TextFile]:
    """The files in a folder, at any depth, through links too.  seen: the folders, by inode, that are not entered again."""
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda e: e.name)
    if not entries:
        passed.setdefault("empty", []).append(below)
    for entry in entries:
        name = below + entry.name + "/" * entry.is_dir()
        if entry.name.startswith("."):
            passed.setdefault("hidden", []).append(name)
        elif entry.is_dir():
            inside = seen if below else set(seen)  # a folder may be linked into two domains, but not twice into one
            if inode_of(entry) in inside:
                passed.setdefault("read already by another way", []).append(name)
            else:
                inside.add(inode_of(entry))
                yield from list_local(entry.path, name, inside, passed)
        elif entry.is_file():
            yield TextFile(entry.path, name, entry.stat().st_size, inode=inode_of(entry))
        elif entry.is_symlink() and not os.path.exists(entry.path):
            yield TextFile(entry.path, name, None)
        else:
            passed.setdefault("neither file nor folder", []).append(name)


def inode_of(entry: os.DirEntry) -> tuple[int, int]:
    return entry.stat().st_dev, entry.stat().st_ino


def list_remote(url: str, passed: dict[str, list[str]]) -> Iterator[TextFile]:
    """The files below a URL that fsspec knows: s3://, hf://, https:// (a page that lists them), ...  Raises UserError."""
    try:
        import fsspec

        fs, root = fsspec.core.url_to_fs(url)
        found = [(f"{folder}/{name}", info) for folder, _, files in fs.walk(root, detail=True, on_error="raise")
                 for name, info in files.items()]
    except Exception as error:  # each file system has its own, ImportError of its package among them
        raise UserError(f"input_dir = {url} cannot be listed: {type(error).__name__}: {error}") from None
    for path, info in found:
        name = path.removeprefix(root.rstrip("/")).lstrip("/")
        if any(part.startswith(".") for part in name.split("/")):
            passed.setdefault("hidden", []).append(name)
        else:
            yield TextFile(info["name"], name, info.get("size"), fs)


def find_sources(input_dir: str, *, text_field: str | dict[str, str], domain_field: str, domains: dict[str, str] | None,
                 skip_bad_files: bool) -> tuple[list[Source], dict[str, list[str]]]:
    """What there is to read, and what is passed over: why -> names below input_dir.  Raises UserError.

    Without domain_field a domain is a folder of input_dir, or what `domains` says: {path or pattern below it: domain}.
    """
    passed: dict[str, list[str]] = {}
    input_dir = input_dir.removeprefix("file://")
    if "://" in input_dir:
        files = list(list_remote(input_dir, passed))
    else:
        check(os.path.isdir(input_dir), f"input_dir = {input_dir} is no folder")
        root = os.stat(input_dir)
        files = list(list_local(input_dir, "", {(root.st_dev, root.st_ino)}, passed))
    groups: dict[str, list[TextFile]] = {}
    if not domain_field:
        names = [*(f.name for f in files), *itertools.chain.from_iterable(passed.values())]
        folders = {n.split("/")[0] for n in names if "/" in n and not n.startswith(".")}
        groups = {name: [] for name in (sorted(folders) if domains is None else dict.fromkeys(domains.values()))}
        check(bool(groups), f"input_dir = {input_dir} holds no folder; make one a domain, or say that it is one itself, as "
              "--domains='{\".\": \"web\"}' does")
    taken: dict[str, set] = {}
    for file in sorted(files, key=lambda f: f.name):
        domain, why = place(file.name, domain_field, domains)
        if not why and file.inode in taken.setdefault(domain, set()):
            why = "read already by another way"
        if why:
            passed.setdefault(why, []).append(file.name)
            continue
        check(file.size is not None or file.fs is not None or skip_bad_files, f"{file.path} is a link to "
              f"{os.path.realpath(file.path)}, which does not exist; mend it, or leave it out with --skip_bad_files")
        taken[domain] |= {file.inode} - {None}
        groups.setdefault(domain, []).append(file)
    check(bool(groups), f"input_dir = {input_dir} holds no {FORMATS} file")
    for name, group in groups.items():
        where = [k for k, v in (domains or {}).items() if v == name] if not domain_field else []
        check(bool(group), f"domain {name}: {' or '.join(where) or name} in {input_dir} holds no {FORMATS} file; add text "
              "or remove it")
    for name in {*groups, *(domains or {}).values()} - {""}:
        check_domain_name(name)
    if isinstance(text_field, dict) and (domains or not domain_field):
        known = sorted((domains or {}).values() if domain_field else groups)
        check(text_field.keys() <= set(known), f"text_field = {text_field} names other domains than {', '.join(known)}")
    return [Source(name, tuple(group), text_field, domain_field, domains if domain_field else None)
            for name, group in groups.items()], passed


def place(name: str, domain_field: str, domains: dict[str, str] | None) -> tuple[str, str]:
    """The domain that a file belongs to ("": its records say), and why it is passed over, if it is."""
    if not NAMES.search(name):
        return "", "of no format that is read"
    if domain_field:
        return "", "without fields" * bool(re.search(r"\.txt(\.\w+)?$", name, re.IGNORECASE))
    if domains is None:
        return name.split("/")[0], "in no domain's folder" * ("/" not in name)
    for key, domain in domains.items():
        key = key.strip("/")
        if key in (".", "") or name == key or name.startswith(key + "/") or fnmatchcase(name, key):
            return domain, ""
    return "", "in none of the domains"


def say_passed_over(passed: dict[str, list[str]]) -> str:
    """One line, "" if there is nothing to say."""
    parts = [f"{len(names)} {why} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for why, names in passed.items()]
    return "passed over: " + "; ".join(parts) if parts else ""


# ---- what is in a file


class Gzip:
    """zlib's decompressor with the interface of the other three."""

    def __init__(self):
        self.zlib = zlib.decompressobj(wbits=31)

    def __getattr__(self, name: str):
        return getattr(self.zlib, name)  # eof, unused_data

    @property
    def needs_input(self) -> bool:
        return not self.zlib.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self.zlib.decompress(self.zlib.unconsumed_tail + data, max_length)


def zstd_stream(path: str) -> Callable[[], object]:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError(f"{path} needs the package backports.zstd; pip install backports.zstd") from None
    options = {zstd.DecompressionParameter.window_log_max: 31}  # as `zstd --long=31` writes it
    return lambda: zstd.ZstdDecompressor(options=options)


class Decompressed(io.RawIOBase):
    """The content of a compressed file, of all its streams (frames) one after another, a little at a time.

    The file classes of gzip, bz2, lzma and zstandard differ in what they take for an end, and bz2 and lzma pass silently
    over what follows a damaged stream.  Here an end inside a stream is Unreadable, and so is what is none behind one.
    """

    def __init__(self, file: io.BufferedReader, new_stream: Callable[[], object]):
        self.file, self.new_stream, self.stream, self.rest = file, new_stream, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            if self.stream is None or self.stream.eof:
                self.rest = self.rest if self.stream is None else self.stream.unused_data
                while not (rest := self.rest.lstrip(b"\0")):  # NULs may pad it
                    self.rest = self.file.read(READ_BYTES)
                    if not self.rest:
                        if self.stream is None:
                            raise Unreadable("it is empty")
                        return 0
                self.rest, self.stream = rest, self.new_stream()
            chunk, hungry = b"", self.stream.needs_input
            if hungry:
                chunk, self.rest = self.rest or self.file.read(READ_BYTES), b""
            data = self.stream.decompress(chunk, len(buffer))
            if data:
                buffer[:len(data)] = data
                return len(data)
            if hungry and not chunk and not self.stream.eof:
                raise Unreadable("it is truncated: it ends inside a compressed stream")


def open_bytes(file: TextFile, stack: ExitStack) -> io.BufferedReader:
    """The file as it is.  Raises Unreadable if it is only a pointer to one."""
    raw = open(file.path, "rb", buffering=0) if file.fs is None else file.fs.open(file.path, "rb")
    stream = io.BufferedReader(stack.enter_context(raw), READ_BYTES)
    if pointer := lfs_pointer(stream.peek(64)):
        raise Unreadable(pointer)
    return stream


def open_text(file: TextFile, stack: ExitStack) -> io.BufferedReader:
    """The text of a file, decompressed, a byte order mark of UTF-8 left out.  Raises Unreadable."""
    stream, suffix = open_bytes(file, stack), os.path.splitext(file.name)[1].lower()
    streams = {".gz": lambda: Gzip, ".bz2": lambda: bz2.BZ2Decompressor, ".xz": lambda: lzma.LZMADecompressor,
               ".zst": lambda: zstd_stream(file.path)}
    if suffix in streams:
        stream = io.BufferedReader(Decompressed(stream, streams[suffix]()), READ_BYTES)
    head = stream.peek(3)[:3]
    if head[:1] == b"[" and suffix != ".txt" and not file.name.lower().endswith(f".txt{suffix}"):
        raise Unreadable("it is a JSON list; write a record a line, as `jq -c '.[]'` does")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Unreadable("it is UTF-16; make it UTF-8, as `iconv -f UTF-16 -t UTF-8` does")
    if head == b"\xef\xbb\xbf":
        stream.read(3)
    return stream


def read_lines(file: TextFile, source: Source) -> Iterator[tuple[str, str] | LeftOut]:
    with ExitStack() as stack:
        for number, line in enumerate(open_text(file, stack), 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    raise Unreadable(f"it is truncated: it ends inside line {number} ({error})") from None
                yield LeftOut("malformed lines", f"{file.path}:{number}", f"no JSON: {error}")
            else:
                yield take(record, source, f"{file.path}:{number}")


def read_parquet(file: TextFile, source: Source) -> Iterator[tuple[str, str] | LeftOut]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file.path} needs the package pyarrow; pip install pyarrow") from None
    with ExitStack() as stack:
        raw = open_bytes(file, stack)
        parquet = pyarrow.parquet.ParquetFile(file.path if file.fs is None else rewound(raw.detach()))
        there, wanted = parquet.schema_arrow.names, source.text_field
        wanted = [wanted] if isinstance(wanted, str) else list(dict.fromkeys([*wanted.values(), "text"]))
        found = [n for n in wanted if n in there or n.split(".")[0] in there]
        if not found:
            raise Unreadable(f"no column {' or '.join(map(repr, wanted))} among {', '.join(there)}")
        row = 0
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=[*found, *filter(None, [source.domain_field])]):
            for record in batch.to_pylist():
                row += 1
                yield take(record, source, f"{file.path}: row {row}")


def read_whole(file: TextFile, source: Source) -> Iterator[tuple[str, str] | LeftOut]:
    with ExitStack() as stack:
        try:
            yield source.name, open_text(file, stack).read().decode()
        except UnicodeDecodeError as error:
            raise Unreadable(f"it is not UTF-8: {error}") from None


def rewound(file):
    file.seek(0)
    return file


def take(record: object, source: Source, where: str) -> tuple[str, str] | LeftOut:
    """The (domain, text) of a record, or why it is left out."""
    try:
        domain, text = source.document(record)
    except ValueError as error:
        return LeftOut("malformed lines", where, str(error))
    return (domain, text) if domain else LeftOut("documents of other domains", where, "not asked for")


def read_documents(file: TextFile, source: Source) -> Iterator[tuple[str, str] | LeftOut]:
    """(domain, text) of each document of a file, and what could not be read as one, in order."""
    read = next(f for kind, f in (("txt", read_whole), ("parquet", read_parquet), ("", read_lines))
                if kind in NAMES.search(file.name)[0].lower())
    documents = others = 0
    lines: list[LeftOut] = []
    try:
        for found in read(file, source):
            if isinstance(found, tuple):
                documents += 1
            elif found.kind == "malformed lines":
                lines = lines or [found]
            else:
                others += 1
            yield found
        if lines and not documents and not others:
            raise Unreadable(f"not one record of text is in it; the first: {lines[0].why}")
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of a disk, a network, a decompressor or pyarrow, each with classes of its own
        why = str(error) if isinstance(error, Unreadable) else f"{type(error).__name__}: {error}"
        yield LeftOut("files", file.path, f"{why} ({documents:,} documents of it were read)")
