"""AutoTokenizer reads an export as our own reader does: every class of model with every format of tokenizer."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import LLAMA3, MISTRAL, hugging_face  # noqa: F401  # a fixture
from transformers import AutoTokenizer

from convert import FAMILIES
from run import hf_tokenizer as hf
from run.settings import UserError
from run.tokenizer import LLAMA3_PATTERN, PROBE, Tokenizer, load_tokenizer

CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
          r"|\s+(?!\S)|\s")
IDENTITY = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
SENTENCEPIECE = {  # how prepare.py trains, and how others do
    "as prepared": dict(model_type="bpe", split_digits=True, allow_whitespace_only_pieces=True, **IDENTITY),
    "no prefix": dict(model_type="bpe", add_dummy_prefix=False, user_defined_symbols=["<|user|>", "->"], **IDENTITY),
    "bpe nfkc": dict(model_type="bpe"),
    "unigram": dict(bos_id=-1, add_dummy_prefix=False, **IDENTITY),
    "unigram nfkc": dict(),
    "characters": dict(model_type="char"),
}
FORMATS = [*SENTENCEPIECE, "llama3", "tekken", "json", "json of Qwen", "json of Llama"]


def train(folder: Path, **options) -> Path:
    """A SentencePiece model of Python source."""
    lines = [line for p in sorted(Path(json.__file__).parent.glob("*.py")) for line in p.read_text().split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([*lines, PROBE.replace("\n", " ")]), vocab_size=700,
                                             model_prefix=str(folder / "tokenizer"), minloglevel=2, hard_vocab_limit=False,
                                             **options)
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def sources(tmp_path_factory, hugging_face) -> dict[str, Path]:  # noqa: F811
    """A folder of each format, small: a real file's first ranks are a tokenizer too."""
    root = tmp_path_factory.mktemp("formats")
    found = {name: root / name for name in FORMATS}
    for folder in found.values():
        folder.mkdir()
    for name, options in SENTENCEPIECE.items():
        train(found[name], **options)
    (found["llama3"] / "tokenizer.model").write_bytes(b"\n".join(LLAMA3.read_bytes().splitlines()[:3000]) + b"\n")
    tekken = json.loads((MISTRAL / "tekken_240911.json").read_text())
    tekken["vocab"], tekken["config"]["default_vocab_size"] = tekken["vocab"][:3000], 4000
    (found["tekken"] / "tekken.json").write_text(json.dumps(tekken))
    (found["json"] / "tokenizer.json").write_bytes(hugging_face.read_bytes())
    content = json.loads(hugging_face.read_text())
    pattern, normalizer = hf.QWEN2
    content |= {"normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]}}
    (found["json of Qwen"] / "tokenizer.json").write_text(json.dumps(content))
    (found["json of Qwen"] / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "bos_token": None, "add_prefix_space": False}))
    (found["json of Llama"] / "tokenizer.model").write_bytes((found["as prepared"] / "tokenizer.model").read_bytes())
    hf.export_tokenizer(found["json of Llama"], load_tokenizer(found["json of Llama"]), "llama")
    (found["json of Llama"] / "tokenizer_config.json").write_text(json.dumps(  # that class adds no prefix to " x"
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>",
         "clean_up_tokenization_spaces": True, "fast_tokenizer_files": ["tokenizer.4.0.0.json"]}))
    return found


def exported(source: Path, folder: Path, model_type: str) -> Tokenizer:
    """Fill a folder as convert.py does, without a model.  Returns the source's tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = load_tokenizer(source)
    hf.export_tokenizer(folder, tokenizer, model_type)
    return tokenizer


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_auto_tokenizer_agrees(name, model_type, sources, tmp_path):
    tokenizer = exported(sources[name], tmp_path / "export", model_type)
    assert hf.auto_differences(tokenizer, tmp_path / "export") == []
    again = load_tokenizer(tmp_path / "export")
    assert (again.fingerprint, again.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=True)  # the code there is ours
    assert hf.differences(tokenizer, lambda text: theirs.encode(text, add_special_tokens=False, split_special_tokens=True),
                          lambda ids: theirs.decode(ids, skip_special_tokens=True)) == []
    if name in SENTENCEPIECE and tokenizer.bos_id is not None:  # as documents began when it was trained
        assert theirs.encode("x") == [tokenizer.bos_id, *tokenizer.encode("x")]
    code = (tmp_path / "export" / hf.CODE_FILE).is_file()
    assert code == (model_type in hf.BUILT_ANEW and name != "json of Qwen")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_thousand_lines_are_the_same_in_every_family(model_type, sources, tmp_path):
    lines = "\n".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))).split("\n")[:1000]
    assert len(lines) == 1000
    for name in ("as prepared", "json"):
        tokenizer = exported(sources[name], tmp_path / name, model_type)
        theirs = AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=True)  # the code there is ours
        want = [tokenizer.encode(line) for line in lines]
        assert theirs(lines, add_special_tokens=False)["input_ids"] == want
        assert [theirs.decode(ids, skip_special_tokens=True) for ids in want] == [tokenizer.decode(ids) for ids in want]


@pytest.mark.parametrize("model_type, config, message", [
    ("qwen2", hf.AS_IS, r"Qwen2Tokenizer: 'def main(argv):\n    return' gives"),  # that class all the same
    ("llama", {"tokenizer_class": "LlamaTokenizer"}, "LlamaTokenizer: ' x' gives"),
    ("llama", {}, "TokenizersBackend: bos_token is None = None, not 1"),
])
def test_what_is_not_written_so_is_found(model_type, config, message, sources, tmp_path):
    tokenizer = exported(sources["as prepared"], tmp_path / "export", model_type)
    (tmp_path / "export" / "tokenizer_config.json").write_text(json.dumps(config))
    found = hf.auto_differences(tokenizer, tmp_path / "export")
    assert any(line.startswith(message) for line in found) and all("\n" not in line for line in found), found
    (tmp_path / "export" / "tokenizer.json").write_text("{}")
    assert "it cannot be loaded" in hf.auto_differences(tokenizer, tmp_path / "export")[0]


def test_only_what_others_read_is_in_the_export(sources, tmp_path, capsys):
    exported(sources["llama3"], tmp_path / "a", "llama")  # llama.cpp takes every tokenizer.model for SentencePiece's
    assert not (tmp_path / "a" / "tokenizer.model").exists()
    assert capsys.readouterr().out == "tokenizer.json is in the export instead of tokenizer.model\n"
    exported(sources["tekken"], tmp_path / "b", "mistral")  # transformers would take tekken.json, if it can
    assert not (tmp_path / "b" / "tekken.json").exists()
    exported(sources["as prepared"], tmp_path / "c", "qwen2")
    assert (tmp_path / "c" / "tokenizer.model").exists() and hf.CODE_FILE in capsys.readouterr().out


PARTS = ["'s", "'LL", "'\u017f", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u0085", "\u3000", "123", "12345", "<s>"]


@given(st.lists(st.one_of(st.text(max_size=4), st.sampled_from(PARTS)), max_size=10).map("".join))
@settings(max_examples=200, deadline=None)
def test_any_text(converted, text):
    for name, (want, got) in converted.items():
        assert got(text) == want(text), name


@pytest.fixture(scope="session")
def converted(sources) -> dict:
    """Encoders of both sides, of the formats that tokenizers can follow everywhere."""
    found = {}
    for name in ("as prepared", "unigram"):
        sp = load_tokenizer(sources[name]).wrapped
        found[name] = sp.encode, hf.from_sentencepiece(sp)
    ranks = load_tokenizer(sources["llama3"]).wrapped._mergeable_ranks
    for name, pattern in (("llama3", LLAMA3_PATTERN), ("cl100k", CL100K)):
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<s>": 4000})
        found[name] = encoding.encode_ordinary, hf.from_tiktoken(encoding)

    def encoder(model, special):
        model.add_special_tokens(special)
        model.encode_special_tokens = True
        return lambda text: model.encode(text).ids

    return {name: (want, encoder(*got)) for name, (want, got) in found.items()}


@pytest.mark.parametrize("options, message", [
    (dict(model_type="word"), "whole words"),
    (dict(treat_whitespace_as_suffix=True), "would differ from the model's own tokenizer"),
])
def test_what_cannot_be_written_is_refused(options, message, tmp_path):
    (tmp_path / "source").mkdir()
    train(tmp_path / "source", **options)
    with pytest.raises(UserError, match=message):
        exported(tmp_path / "source", tmp_path / "export", "llama")
    assert {p.name for p in (tmp_path / "export").iterdir()} == {"config.json", "tokenizer.model", "tokenizer.vocab"}


def test_without_the_package_tokenizers(sources, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        exported(sources["as prepared"], tmp_path / "export", "llama")


def test_code_of_a_tokenizer(tmp_path):
    classes = ["tok_x.Slow", "tok_y.Fast"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": classes}}))
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "model_x.M", "AutoTokenizer": "a--b.C"}}))
    (tmp_path / "tok_x.py").write_text("import json\nfrom .parts import f\nfrom . import more\nfrom .missing import g\n")
    for name in ("tok_y", "parts", "more", "model_x"):
        (tmp_path / f"{name}.py").write_text("from .tok_x import f\n")
    assert hf.code_files(tmp_path) == ["tok_x.py", "tok_y.py", "parts.py", "more.py"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": ["tok_y.Slow", None]}))  # as it once was
    assert hf.code_files(tmp_path)[0] == "tok_y.py"


def test_mistral_common_is_whole():
    """transformers takes it into use as soon as it is installed, for every model of Mistral's classes."""
    assert importlib.util.find_spec("mistral_common") is not None
    import mistral_common.tokens.tokenizers.tekken  # noqa: F401
