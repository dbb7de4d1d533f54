"""A tokenizer as Hugging Face folders have it: what makes transformers' AutoTokenizer do what run/tokenizer.py does.

A file of its own since others read an export.  Every format that tokenizer.py reads is written as tokenizer.json, and
tokenizer_config.json names the class that takes that file as it is: those of the architectures build the tokenizer anew
by rules of their own.  `differences` holds a second reader against ours over fixed texts.
"""

import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from run.settings import UserError, check, read_json
from run.tokenizer import PROBE, Tokenizer, has_tokenizers, load_tokenizer

if TYPE_CHECKING:
    import sentencepiece
    import tiktoken
    from tokenizers import Tokenizer as HuggingFaceTokenizer

# This class takes tokenizer.json as it is, in transformers 4 and 5.  clean_up would drop spaces from decoded text.
AS_IS = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
# model_type -> what transformers 5 puts around a vocabulary and its merges whatever tokenizer_config.json says (its
# models/auto/tokenization_auto.py, MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS), unless that names code: then the class
# is right, whether the user trusts the code or not.  Checked with transformers 4.57.3, 5.0.0 and 5.24.0.
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
         {"type": "NFC"})
BUILT_ANEW = {"qwen2": QWEN2}
CODE_FILE = "tokenization_as_is.py"
CODE = '''"""Takes tokenizer.json as it is, where transformers would build the tokenizer of this type of model anew."""

from transformers import PreTrainedTokenizerFast


class TokenizerAsIs(PreTrainedTokenizerFast):
    pass
'''

TEXTS = (
    PROBE, "", " ", "  ", "x", " x", "  x", "x ", "x  ", "\n", "\n\n\n", "\t\tx", "a  b   c    d", " \n \t \r\n x\n",
    "def main(argv):\n    return", "if (a[i] != 0x1F) {\n\tb->c += 'd';\n}\n", '<p class="q">&amp;</p>', "x=1;y_z-2.5e-3",
    "HTTPServer's getURL() isn't; I'LL we've", "0 12 345 6789 1234567890 3.14159 1,000,000 2024-01-31",
    "x\u00b2 \u00bd \u2167 \u0661\u0662\u0663", "na\u00efve Stra\u00dfe \u00c9l \u0153uvre \u00c5ngstr\u00f6m",
    "e\u0301 or \u00e9; \ufb01 \uff21 \uff76\uff9e", "\u041f\u0440\u0438\u0432\u0435\u0442, \u03ba\u03cc\u03c3\u03bc\u03b5!",
    "\u6f22\u5b57\u304b\u306a\u4ea4\u3058\u308a\u6587\u3002", "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05c1\u05dc\u05d5\u05dd", "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17",
    "\U0001f600 \U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f", "\u00a0x\u2003y\u3000z\u200bq\ufeff",
    "\x07\x1b[0m", "\u2581x \u2581\u2581 \u0120 \u010a", "a" * 40 + "=" * 70 + " " * 33 + "x",
    "<s> </s> <unk> <pad> <|endoftext|> <|begin_of_text|> [INST] <0x0A>",
)


# ---- agreement


def differences(tokenizer: Tokenizer, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]) -> list[str]:
    """What another reader does otherwise than `tokenizer`, in a line for each of TEXTS that it shows in.

    Tokens of which `tokenizer` makes no text that would give them again, such as an unknown one, are not decoded.
    """
    found = []
    for text in TEXTS:
        want, got = tokenizer.encode(text), list(encode(text))
        if want != got:
            i = next((i for i, (a, b) in enumerate(zip(want, got)) if a != b), min(len(want), len(got)))
            found.append(f"{text[:40]!r} gives {got[i:i + 5]}, not {want[i:i + 5]}, from token {i} on")
        elif tokenizer.encode(tokenizer.decode(want)) == want and (back := decode(want)) != tokenizer.decode(want):
            found.append(f"the tokens of {text[:40]!r} give back {back[:60]!r}")
    return found


def auto_differences(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """What transformers' AutoTokenizer does otherwise on a folder, which it must be able to read without its code."""
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a package or a file that it needs makes it raise
        return [f"it cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]

    def encode(text: str) -> list[int]:
        return theirs.encode(text, add_special_tokens=False, split_special_tokens=True)  # names of specials are text

    found = differences(tokenizer, encode, lambda ids: theirs.decode(ids, skip_special_tokens=True))
    for kind, ours in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        name, number = getattr(theirs, f"{kind}_token"), getattr(theirs, f"{kind}_token_id")
        if ours not in (None, number):
            found.append(f"{kind}_token is {name!r} = {number}, not {ours}")
        elif ours is not None and theirs.encode(name, add_special_tokens=False) != [ours]:
            found.append(f"the text {name!r} is not token {ours}")
    return [f"{type(theirs).__name__}: {line}" for line in found]


def verify_tokenizer(ours: Path, theirs: Path, *, is_export: bool) -> None:
    """Hold AutoTokenizer on the folder `theirs` against our reader of `ours`.  Exits with status 1 if an export differs.

    Of a source it is only said: text is tokenized by the tokenizer's own file, whatever transformers makes of it.
    """
    try:
        found = auto_differences(load_tokenizer(ours), theirs)
    except UserError as error:
        return print(f"verify: no tokenizer was compared: {error}")
    if not found:
        return print(f"verify: AutoTokenizer does the same on {len(TEXTS)} texts")
    more = f"; {len(found)} differences in all" * (len(found) > 3)
    print(f"verify: AutoTokenizer differs from run/tokenizer.py on {theirs}: {'; '.join(found[:3])}{more}", file=sys.stderr)
    if is_export:
        print("convert.py: an export's tokenizer must be the model's own; nothing written", file=sys.stderr)
        sys.exit(1)
    print("note: text is tokenized here as the tokenizer's own file says, and an export will do so too", file=sys.stderr)


# ---- writing it


def export_tokenizer(folder: Path, tokenizer: Tokenizer, model_type: str) -> None:
    """Let a folder, into which the tokenizer's own files were copied, be read by AutoTokenizer as `tokenizer` reads them.

    model_type: of the folder's config.json.  Raises UserError if that cannot be; the copied files are then as they were.
    """
    path, built = folder / "tokenizer_config.json", not (folder / "tokenizer.json").is_file()
    carried = read_json(path) if path.is_file() else {}
    check(isinstance(carried, dict), f"{path.name} is not a JSON object; mend or remove it")
    if built:
        check(has_tokenizers(), "no tokenizer.json can be written without the package tokenizers: pip install tokenizers")
        write_json_tokenizer(folder, tokenizer, add_bos=carried.get("add_bos_token", True))
    content = read_json(folder / "tokenizer.json")
    token = dict(entries(content))
    config = carried | AS_IS
    config.pop("fast_tokenizer_files", None)  # other versions of tokenizer.json, which are not carried along
    for kind, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if i is not None and (built or config.get(f"{kind}_token") is None):
            config[f"{kind}_token"] = token[i]
    if not as_built(content, model_type):
        config["auto_map"] = {"AutoTokenizer": [None, f"{CODE_FILE.removesuffix('.py')}.TokenizerAsIs"]}
        (folder / CODE_FILE).write_text(CODE)
        print(f"{CODE_FILE} is in the export: without it AutoTokenizer would build the tokenizer by rules of {model_type}'s")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    # others would take these first, or not at all; a tokenizer.model of SentencePiece's stays, which llama.cpp reads
    stale = [name for name in ("tekken.json", "tiktoken.json", "tokenizer.model") if (folder / name).is_file()
             and (name != "tokenizer.model" or made_by(tokenizer) == "tiktoken")]
    for name in stale:
        (folder / name).unlink()
    if stale:
        print(f"tokenizer.json is in the export instead of {' and '.join(stale)}")


def write_json_tokenizer(folder: Path, tokenizer: Tokenizer, *, add_bos: bool) -> None:
    """tokenizer.json of a SentencePiece or tiktoken tokenizer.  Raises UserError if it would not do the same."""
    from tokenizers import processors

    build = from_sentencepiece if made_by(tokenizer) == "sentencepiece" else from_tiktoken
    model, special = build(tokenizer.wrapped)
    model.add_special_tokens(special)
    model.encode_special_tokens = True  # here, as in tokenizer.py, their names are text; the file does not hold this
    wrong = differences(tokenizer, lambda text: model.encode(text).ids, model.decode)
    name = next((name for name in special if model.token_to_id(name) == tokenizer.bos_id), None)
    if add_bos and name is not None:
        model.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, tokenizer.bos_id)])
    check(not wrong, f"no tokenizer.json is written, since it would differ from the model's own tokenizer: {wrong[:1]}")
    model.save(str(folder / "tokenizer.json"))


def entries(content: dict) -> list[tuple[int, str]]:
    """(id, name) of every token of a tokenizer.json."""
    vocab = content["model"]["vocab"]
    names = [(i, name) for name, i in vocab.items()] if isinstance(vocab, dict) else [(i, p[0]) for i, p in enumerate(vocab)]
    return names + [(token["id"], token["content"]) for token in content.get("added_tokens") or ()]


def as_built(content: dict, model_type: str) -> bool:
    """Whether AutoTokenizer does what a tokenizer.json says, for this type of model, without code that it trusts."""
    if model_type not in BUILT_ANEW:
        return True
    pattern, normalizer = BUILT_ANEW[model_type]
    splits = (content.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    return content.get("normalizer") == normalizer and splits[0].get("pattern") == {"Regex": pattern}


def made_by(tokenizer: Tokenizer) -> str:
    """The package that a tokenizer is of: none is imported for the question."""
    return type(tokenizer.wrapped).__module__.split(".")[0]


def from_tiktoken(encoding: "tiktoken.Encoding") -> tuple["HuggingFaceTokenizer", list[str]]:
    """The same byte-level BPE, and the names of its special tokens.

    tiktoken joins the two neighbours whose bytes together have the lowest rank, so each way to cut a token in two others
    is a merge; and a piece that is a token is taken as it is.  `$` ends the text there, and a line in tokenizers' regular
    expressions, which take a + behind braces for a repetition.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes: themselves, or from 256 on
    hidden = (b for b in range(256) if b not in shown)
    letters = dict(zip(shown, map(chr, shown))) | {b: chr(256 + i) for i, b in enumerate(hidden)}

    ranked = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    ranks, merges = {"".join(map(letters.__getitem__, token)): i for token, i in ranked}, []
    for token in ranks:
        cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
        merges += sorted(((a, b) for a, b in cuts if a in ranks and b in ranks), key=lambda ab: (ranks[ab[0]], ranks[ab[1]]))
    special = dict(sorted(encoding._special_tokens.items(), key=lambda item: item[1]))
    model = Tokenizer(models.BPE(ranks | special, merges, ignore_merges=True))
    pattern = re.sub(r"(\{[\d,]+\})\+", r"\1", encoding._pat_str).replace("$", r"\z")
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    return model, list(special)


def message(data: bytes) -> dict[int, list]:
    """A protobuf message: number of a field -> its values, an integer, or the bytes of anything else."""
    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    found, at = {}, 0
    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value = varint()
        else:
            size = varint() if kind == 2 else 8 if kind == 1 else 4
            value, at = data[at:at + size], at + size
        found.setdefault(number, []).append(value)
    return found


NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces (sentencepiece_model.proto)


def from_sentencepiece(sp: "sentencepiece.SentencePieceProcessor") -> tuple["HuggingFaceTokenizer", list[str]]:
    """The same unigram, BPE or character model and normalisation, and the names of its special tokens.

    Fields by their number in sentencepiece_model.proto, with the defaults that it gives them.  Raises UserError.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = message(sp.serialized_model_proto())
    trainer, spec = message(proto[2][-1]), message(proto[3][-1])
    fields = [message(piece) for piece in proto[1]]
    pieces = [(f[1][0].decode(), struct.unpack("<f", f.get(2, [bytes(4)])[0])[0], f.get(3, [NORMAL])[0]) for f in fields]
    user_defined = [text for text, _, kind in pieces if kind == USER_DEFINED]
    kind, byte_fallback = trainer.get(3, [1])[-1], bool(trainer.get(35, [0])[-1])
    if kind == 1:
        # text never holds the other pieces, which tokenizers would find in it: make them too dear
        dear = min(score for _, score, kind in pieces if kind == NORMAL) - 1000
        vocab = [(text, score if kind in (NORMAL, USER_DEFINED) else dear) for text, score, kind in pieces]
        model = models.Unigram(vocab, unk_id=sp.unk_id(), byte_fallback=byte_fallback)
    else:
        check(kind in (2, 4), "a SentencePiece model of whole words cannot be written as tokenizer.json")
        scores = {text: score for text, score, kind in pieces if kind == NORMAL}  # in the order of the ids
        merges = [(text[:k], text[k:]) for text in sorted(scores, key=scores.__getitem__, reverse=True)
                  for k in range(1, len(text)) if kind == 2 and text[:k] in scores and text[k:] in scores]
        model = models.BPE({text: i for i, (text, *_) in enumerate(pieces)}, merges, fuse_unk=True,
                           unk_token=sp.id_to_piece(sp.unk_id()), byte_fallback=byte_fallback,
                           ignore_merges=bool(user_defined))
    charsmap, prefix, trim = spec.get(2, [b""])[-1], spec.get(3, [1])[-1], spec.get(4, [1])[-1]
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if trim:  # spaces only: SentencePiece leaves other white space alone
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("\u2581")] * bool(prefix) + [normalizers.Replace(" ", "\u2581")]
    words = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    words += [decoders.Strip(" ", 1, 0)] * bool(prefix or trim)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(steps), decoders.Sequence(words)
    if user_defined:  # never merged with what stands beside them
        pattern = "|".join(re.escape(text) for text in sorted(user_defined, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return tokenizer, [text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)]


# ---- code that a tokenizer of its own brings along


def code_files(folder: Path) -> list[str]:
    """The Python files that a folder's tokenizer needs: those that "auto_map" names, and what these import beside them."""
    found = []
    for name in ("tokenizer_config.json", "config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        classes = content.get("auto_map") if isinstance(content, dict) else None
        classes = classes.get("AutoTokenizer") if isinstance(classes, dict) else classes
        classes = classes if isinstance(classes, list) else [classes]
        found += [c.split(".")[0] + ".py" for c in classes if isinstance(c, str) and "--" not in c]  # --: of another model
    for name in found:  # grows as it goes
        text = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""
        imported = re.findall(r"^\s*from\s+\.(\w+)\s+import|^\s*from\s+\.\s+import\s+(\w+)", text, flags=re.M)
        found += [f for a, b in imported if (f := (a or b) + ".py") not in found]
    return [name for name in dict.fromkeys(found) if (folder / name).is_file()]
