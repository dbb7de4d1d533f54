"""A file of its own since prepare.py encodes and tools/sample.py decodes: one place that knows tokenizer formats.

A SentencePiece `.model`; a tiktoken encoding by its name; a `tokenizer.model` in Llama 3's format; Mistral's `tekken.json`;
`tokenizer.json` of Hugging Face's `tokenizers`; or a folder that holds one.  Files are told apart by their content.
"""

import base64
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from run.settings import UserError, check, hub_snapshot, lfs_pointer, read_json

if TYPE_CHECKING:
    import tiktoken

FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.json")  # of a folder, the first that is there counts
# what a tokenizer without any configuration beside it calls its first and its last token
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
MAX_RUN = 25_000  # characters without a break that tiktoken gets at once, as in Llama 3's own tokenizer.py
LINE_CHARACTERS = 25_000  # of a line that a tokenizer is trained on, 4 bytes each at most
SPACE, NO_SPACE, LONG_RUN = (re.compile(p) for p in (r"\s", r"\S", rf"\S{{{MAX_RUN}}}(?=\S)|\s{{{MAX_RUN}}}(?=\s)"))

PROBE = ("def f(x):\n\treturn x[0] ** 2  # 1234567890, 3.14\n\n\n    if a != b:\r\n        pass\n"
         "The quick brown fox's tail. Él comió piñata, naïve Straße; Привет, мир! 漢字かな交じり文 한국어 عربى "
         "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 \u00a0 a   b     c\n")


@dataclass(frozen=True)
class Tokenizer:
    """What `load_tokenizer` returns.  A token that is both BOS and EOS counts as EOS only, so it is never doubled."""

    encode_batch: Callable[[list[str]], list[np.ndarray]]  # integer ids [n] of each text; names of special tokens are text
    decode: Callable[[list[int]], str]  # special and unknown ids are left out
    bos_id: int | None
    eos_id: int | None
    vocab_size: int  # largest id + 1, special tokens included
    files: dict[str, bytes]  # what a folder must hold for load_tokenizer to find the same tokenizer there
    wrapped: object  # of the library that does the work

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without BOS and EOS."""
        return self.encode_batch([text])[0].tolist()

    @property
    def fingerprint(self) -> str:
        """sha256 of what it does to a fixed text: two formats of one tokenizer agree, two tokenizers do not."""
        return hashlib.sha256(json.dumps([self.encode(PROBE), self.bos_id, self.eos_id]).encode()).hexdigest()


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer in a file or folder, or the tiktoken encoding of that name.  Raises UserError, in one line."""
    try:
        tokenizer = load_path(Path(source)) if Path(source).exists() else load_tiktoken_name(str(source))
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in tokenizers' or tiktoken's Rust is no Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer {source} cannot be loaded: {type(error).__name__}: {reason}") from None
    check(not (tokenizer.bos_id is None and tokenizer.eos_id is None), f"tokenizer {source} has neither a BOS nor an EOS "
          f"token, by which documents are told apart; none of {', '.join(BOS_NAMES + EOS_NAMES)} is in it")
    return tokenizer


def holds_tokenizer(folder: Path) -> bool:
    """Whether there is anything of a tokenizer in a folder, be it one that cannot be read here."""
    return any(p.name in FILES or "token" in p.name for p in folder.glob("*"))


def load_path(path: Path) -> Tokenizer:
    if path.is_dir():
        path = hub_snapshot(path)
        found = [path / name for name in FILES if (path / name).is_file()]
        check(bool(found), f"tokenizer folder {path} has none of {', '.join(FILES)}")
        if found[0].name == "tokenizer.json" and len(found) > 1 and not has_tokenizers():
            found.pop(0)
        return load_path(found[0])
    with path.open("rb") as file:
        head = file.read(1024)
    check(lfs_pointer(head) == "", f"tokenizer {path}: {lfs_pointer(head)}")
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        return load_llama3(path)
    if not head.lstrip().startswith(b"{"):
        return load_sentencepiece(path)
    content = read_json(path)
    if "encoding" in content:
        return load_tiktoken_name(content["encoding"])
    if {"config", "vocab"} <= content.keys():
        return load_tekken(path, content)
    check("model" in content, f"tokenizer {path} is JSON, but neither a tokenizer.json nor a tekken.json")
    return load_hugging_face(path)


def load_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece  # here, as tiktoken below: training needs neither

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    size, bos, eos = model.vocab_size(), model.bos_id(), model.eos_id()  # -1: none
    return Tokenizer(lambda texts: [np.array(ids, np.int64) for ids in model.encode(texts, num_threads=1)],
                     lambda ids: model.decode([int(i) for i in ids if i < size and i != model.unk_id()]),
                     None if bos < 0 else bos, None if eos < 0 else eos, size, {"tokenizer.model": path.read_bytes()}, model)


def load_tiktoken_name(name: str) -> Tokenizer:
    import tiktoken

    known = tiktoken.list_encoding_names()
    check(name in known, f"tokenizer {name} is no file or folder, and no encoding of tiktoken: {', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors
        raise UserError(f"tokenizer {name} has to be downloaded by tiktoken, which failed ({type(error).__name__}); "
                        "connect, or set TIKTOKEN_CACHE_DIR to a folder that has it, or give a tokenizer's file") from None
    return wrap_tiktoken(encoding, {"tiktoken.json": json.dumps({"encoding": name}).encode()})


def load_llama3(path: Path) -> Tokenizer:
    """Lines of a token in base64 and its rank; 256 special tokens follow them.  Pattern and specials are Llama 3's."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    check(len(ranks) <= 128_000, f"tokenizer {path} has {len(ranks)} ranks, Llama 3's has 128000: another split pattern "
          "belongs to it, which the file does not say; give the model's tokenizer.json")
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
    import tiktoken

    encoding = tiktoken.Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={name: len(ranks) + i for i, name in enumerate(special)})
    return wrap_tiktoken(encoding, {"tokenizer.model": path.read_bytes()})


def load_tekken(path: Path, content: dict) -> Tokenizer:
    """Special tokens come first, then the ranks; of these only as many as the default size has room for."""
    config = content["config"]
    first = config["default_num_special_tokens"]
    ranks = {base64.b64decode(v["token_bytes"]): first + v["rank"] for v in content["vocab"]
             if first + v["rank"] < config["default_vocab_size"]}
    special = {v["token_str"]: v["rank"] for v in content.get("special_tokens") or ()} or {"<s>": 1, "</s>": 2}
    import tiktoken

    encoding = tiktoken.Encoding(path.name, pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens=special)
    return wrap_tiktoken(encoding, {"tekken.json": path.read_bytes()})


def wrap_tiktoken(encoding: "tiktoken.Encoding", files: dict[str, bytes]) -> Tokenizer:
    special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    ordinary = set(encoding._mergeable_ranks.values())  # an id can also be unused, and decoding that raises
    bos, eos = choose_special(special.get, BOS_NAMES), choose_special(special.get, EOS_NAMES)

    def encode(text: str) -> np.ndarray:
        ids = [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in split_long_runs(text)]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    return Tokenizer(lambda texts: [encode(text) for text in texts],
                     lambda ids: encoding.decode([int(i) for i in ids if int(i) in ordinary]),
                     bos, eos, encoding.n_vocab, files, encoding)


def split_long_runs(text: str) -> list[str]:
    """Cut a text in runs of more than MAX_RUN characters that are all space or all not; nearly always [text]."""
    half = MAX_RUN // 2  # such a run covers one of these windows whole, and a window with both kinds is left at once
    windows = range(0, len(text) - half + 1, half)
    if all(SPACE.search(text, i, i + half) and NO_SPACE.search(text, i, i + half) for i in windows):
        return [text]
    cuts = [0, *(found.end() for found in LONG_RUN.finditer(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


def has_tokenizers() -> bool:
    try:
        import tokenizers  # noqa: F401  # a dependency of transformers, not of ours
    except ImportError:
        return False
    return True


def load_hugging_face(path: Path) -> Tokenizer:
    check(has_tokenizers(), f"tokenizer {path} needs the package tokenizers: pip install tokenizers")
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    model = HuggingFaceTokenizer.from_file(str(path))
    model.no_padding()
    model.no_truncation()
    model.encode_special_tokens = True  # that is: `<s>` in a text is three characters
    bos, eos = (hugging_face_special(path.parent, kind, model.token_to_id) for kind in ("bos", "eos"))
    bos = None if bos == eos else bos
    beside = [path.parent / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    files = {p.name: p.read_bytes() for p in [path, *beside] if p.is_file()}
    files["tokenizer.json"] = files.pop(path.name)  # whatever its name was
    if "special_tokens_map.json" not in files:  # the ids may come from a model's config.json, which is not copied
        names = {"bos_token": bos, "eos_token": eos}
        named = {kind: model.id_to_token(i) for kind, i in names.items() if i is not None}
        files["special_tokens_map.json"] = json.dumps(named).encode()

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, np.int64) for e in model.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(encode_batch, lambda ids: model.decode([int(i) for i in ids], skip_special_tokens=True), bos, eos,
                     max(model.get_vocab(with_added_tokens=True).values()) + 1, files, model)


def hugging_face_special(folder: Path, kind: str, token_to_id: Callable[[str], int | None]) -> int | None:
    """Id of the "bos" or "eos" token: as the files beside tokenizer.json say (null: there is none), else by its name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        if f"{kind}_token" in content:
            token = content[f"{kind}_token"]
            token = token["content"] if isinstance(token, dict) else token
            found = None if token is None else token_to_id(token)
            check(token is None or found is not None,
                  f"{folder / name} says that {kind}_token is {token!r}, which tokenizer.json lacks")
            return found
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if f"{kind}_token_id" in config:
        ids = config[f"{kind}_token_id"]
        return ids[0] if isinstance(ids, list) else ids
    return choose_special(token_to_id, BOS_NAMES if kind == "bos" else EOS_NAMES)


def choose_special(token_to_id: Callable[[str], int | None], names: tuple[str, ...]) -> int | None:
    """Id of the first name that there is."""
    return next((i for name in names if (i := token_to_id(name)) is not None), None)


def train_sentencepiece(lines: Iterable[str], size: int) -> bytes:
    """A BPE model as Llama's: byte fallback, single digits, spaces kept.  Raises UserError, and what `lines` raises.

    SentencePiece leaves out without a word a line of more than max_sentence_length bytes, or with the character that it
    writes for the unknown: the first are cut, the second go without it.
    """
    model, stopped = io.BytesIO(), []

    def pieces() -> Iterator[str]:
        try:
            for line in lines:
                line = line.replace("\u2585", " ")
                while len(line) > LINE_CHARACTERS:
                    at = line.rfind(" ", 1, LINE_CHARACTERS) + 1 or LINE_CHARACTERS
                    yield line[:at]
                    line = line[at:]
                yield line
        except UserError as error:
            stopped.append(error)
            raise

    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=pieces(), model_writer=model, vocab_size=size, model_type="bpe", byte_fallback=True,
            split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, max_sentence_length=4 * LINE_CHARACTERS, minloglevel=2)
    except RuntimeError as error:
        if stopped:
            raise stopped[0] from None
        found = re.search(r"<= (\d+)", str(error))
        why = f"lower --train_tokenizer to at most {found[1]}" if found else " ".join(str(error).split())[-200:]
        raise UserError(f"a tokenizer of {size} pieces cannot be trained on this text; {why}") from None
    return model.getvalue()
