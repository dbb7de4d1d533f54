"""A user's mistake in text, conversion, sampling or a config file is one line that names it, status 2, and no output."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import NEEDED, ROOT, SETTINGS, module_of, refusal, run_script, tiny_config, write_model
from safetensors.torch import load_file, save_file
from test_prepare import MISTRAL, write_jsonl

import convert
import prune
from model import Transformer
from prepare import PrepareSettings, main as run_prepare
from run.settings import FilePath, UserError, parse_args
from tools import gguf_to_hf, reference_loss, sample

LOSSES = {"n_params": [1e8, 1e9, 1e10], "wiki": [3.0, 2.5, 2.2]}


@pytest.fixture(scope="session")
def exported(tmp_path_factory, source) -> Path:
    """A Hugging Face folder in shards."""
    folder = tmp_path_factory.mktemp("exports") / "hf"
    convert.main(convert.ConvertSettings(to_hf=str(source), out_dir=str(folder), shard_gb=3e-5))
    return folder


@pytest.fixture
def place(tmp_path, source, exported, pruned, monkeypatch):
    """Good inputs that a case may spoil, and where to write."""
    given = tmp_path / "given"
    shutil.copytree(source, given / "model")
    shutil.copytree(exported, given / "hf")
    (given / "model" / "assets").mkdir()
    gguf_to_hf.write_tokenizer(given / "model" / "assets", {"<s>": 0, "a": 1}, [], special=["<s>"], add_bos=True,
                            names={"bos_token": "<s>"}, parts={})
    write_jsonl(given / "raw" / "wiki" / "a.jsonl", [f"document {i}" for i in range(50)])
    (given / "losses.json").write_text(json.dumps(LOSSES))
    return SimpleNamespace(root=tmp_path, raw=given / "raw", hf=given / "hf", model=given / "model", given=given,
                           losses=given / "losses.json", out=tmp_path / "out", pruned=pruned)


def arguments(stage: str, p, changes: dict) -> tuple[str, list[str]]:
    """The stage's name, and its flags with the changes; None leaves one out."""
    stage, given = {
        "prepare": ("prepare", dict(input_dir=p.raw, tokenizer=MISTRAL, workers=1)),
        "from_hf": ("convert", dict(from_hf=p.hf)),
        "from_gguf": ("gguf_to_hf", dict(gguf=p.given / "model.gguf")),
        "to_hf": ("convert", dict(to_hf=p.model)),
        "sample": ("sample", dict(model_dir=p.model, device="cpu", out_dir=None)),
        "reference_loss": ("reference_loss", dict(losses=p.losses, n_params=10**9, out=p.out / "r.json", out_dir=None)),
    }[stage]
    given = dict(out_dir=p.out) | given | changes
    return stage, [f"--{name}={value}" for name, value in given.items() if value is not None]


def edit(path: Path, **changes) -> None:
    """Change fields of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_tensor(path: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = {**load_file(path), name: value}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})


def first_shard(p) -> Path:
    return min(p.hf.glob("*.safetensors"))


def write_gguf(p, architecture: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(p.given / "model.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_vocabulary(p) -> None:
    cfg = tiny_config(vocab_size=1)
    shutil.rmtree(p.model)
    p.model.mkdir()
    write_model(p.model, dict(Transformer(cfg).named_parameters()), cfg, [])
    shutil.copytree(p.given / "tokenizer", p.model / "assets")


def prepare_once(p) -> None:
    run_prepare(PrepareSettings(input_dir=str(p.raw), out_dir=str(p.given / "data"), tokenizer=MISTRAL, workers=1))


def nothing(p) -> None:
    pass


# (stage, what is spoiled, settings, what the line must say)
CASES = {
    # ---- prepare
    "no text": ("prepare", nothing, dict(input_dir="nowhere"), "input_dir = nowhere is no folder"),
    "no domain": ("prepare", lambda p: shutil.rmtree(p.raw / "wiki"), {}, "raw holds no folder"),
    "a domain without files": ("prepare", lambda p: (p.raw / "code").mkdir(), {}, "domain code: .* holds no .jsonl"),
    "a domain without a document": (
        "prepare", lambda p: write_jsonl(p.raw / "code" / "a.jsonl", [""]), {}, "domain code holds no document"),
    "a domain called tokenizer": ("prepare", lambda p: write_jsonl(p.raw / "tokenizer" / "a.jsonl", ["x"]), {},
                                  "domain 'tokenizer': name it"),
    "a text field that is none": (
        "prepare", nothing, dict(text_field="content", max_bad_lines=9),
        "no field 'content' among text, meta; more than max_bad_lines = 9"),
    "text that is not UTF-8": (
        "prepare", lambda p: (p.raw / "wiki" / "b.txt").write_bytes(b"\xff"), {}, "b.txt cannot be read .* not UTF-8"),
    "a gzip file cut short": ("prepare", lambda p: (p.raw / "wiki" / "b.jsonl.gz").write_bytes(b"\x1f\x8b\x08"),
                              {}, "b.jsonl.gz cannot be read to its end: it is truncated.*--skip_bad_files"),
    "a parquet file that is none": (
        "prepare", lambda p: (p.raw / "wiki" / "b.parquet").write_bytes(b"PAR1"), {}, "b.parquet cannot be read"),
    "an unknown tokenizer": ("prepare", nothing, dict(tokenizer="nope"), "tokenizer nope is no file or folder"),
    "a tokenizer that is none": ("prepare", nothing, dict(tokenizer=__file__), "test_errors_data.py cannot be loaded"),
    "a folder without tokenizer": ("prepare", nothing, dict(tokenizer="configs"), "tokenizer folder configs has none of"),
    "two tokenizers": ("prepare", nothing, dict(train_tokenizer=500), "give either tokenizer or train_tokenizer"),
    "a tokenizer too large for the text": (
        "prepare", nothing, dict(tokenizer=None, train_tokenizer=50000), r"lower --train_tokenizer to at most \d+$"),
    "a text field that is none, to train a tokenizer on": (
        "prepare", nothing, dict(tokenizer=None, train_tokenizer=300, text_field="x"), "a.jsonl .*not one record of text"),
    "a domain that gives no text to train on": (
        "prepare", lambda p: write_jsonl(p.raw / "code" / "a.jsonl", [""]), dict(tokenizer=None, train_tokenizer=300),
        "domain code gives no text to train a tokenizer on"),
    "a domain all held out from training": (
        "prepare", lambda p: write_jsonl(p.raw / "code" / "a.jsonl", ["x"]),
        dict(tokenizer=None, train_tokenizer=300, eval_fraction=0.9999, prune_fraction=0), "code gives no .*lower --eval"),
    "records of other domains only": (
        "prepare", nothing, dict(domain_field="text", domains={"a": "b"}), "domain b holds no document; add text"),
    "shards that may differ in their domains": (
        "prepare", nothing, dict(domain_field="text", shard="0/2"), "shard and domain_field need domains"),
    "no model to prepare for": ("prepare", nothing, dict(model_dir="configs"), "configs has neither model_config.json nor"),
    "another model's tokenizer": (
        "prepare", nothing, lambda p: dict(model_dir=p.model),
        r"domain wiki has token \d+, but the model in .*/model knows 64 tokens; prepare the text with the model's tok"),
    "another model's tokenizer, in Hugging Face's form": (
        "prepare", nothing, lambda p: dict(model_dir=p.hf), "model in .*/hf knows 64 tokens"),
    "fractions of more than all": ("prepare", nothing, dict(eval_fraction=0.6, prune_fraction=0.5), "stay below 1"),
    "a shard beyond the last": ("prepare", nothing, dict(shard="2/2"), "shard = '2/2' is not i/n"),
    "no process": ("prepare", nothing, dict(workers=0), "workers = 0"),
    "a file as output of prepare": ("prepare", lambda p: p.out.write_text("x"), {}, "/out.*: (Not a directory|File exists)"),
    "a read-only output of prepare": ("prepare", nothing, dict(out_dir="/proc/nowhere/out"), "/proc/nowhere"),
    "other settings than before": (
        "prepare", prepare_once, lambda p: dict(out_dir=p.given / "data", eval_fraction=0.2, tokenizer=MISTRAL),
        r"begun with other .*eval_fraction \(was 0.01, is 0.2\)"),
    "other files than before": (
        "prepare", lambda p: [prepare_once(p), (p.raw / "wiki" / "b.txt").write_text("new")],
        lambda p: dict(out_dir=p.given / "data"), r"file .*b.txt \(was None, is 3\)"),
    # ---- convert
    "no Hugging Face folder": ("from_hf", nothing, dict(from_hf="meta/Llama"), "meta/Llama is not a folder; .*hf download"),
    "no config": ("from_hf", lambda p: (p.hf / "config.json").unlink(), {}, "cannot read .*hf/config.json"),
    "a config that is no JSON": ("from_hf", lambda p: (p.hf / "config.json").write_text("{"), {}, "config.json is not JSON"),
    "a config that is a list": ("from_hf", lambda p: (p.hf / "config.json").write_text("[]"), {}, "not a JSON object"),
    "an unknown architecture": (
        "from_hf", lambda p: edit(p.hf / "config.json", model_type="gpt2"), {}, "model_type = 'gpt2' is not one of llama"),
    "an unknown rotary embedding": (
        "from_hf", lambda p: edit(p.hf / "config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0}), {},
        "rope_type = 'yarn' is not one of"),
    "an unknown activation": (
        "from_hf", lambda p: edit(p.hf / "config.json", hidden_act="swish9"), {}, "activation = 'swish9' is not one of"),
    "a size missing": ("from_hf", lambda p: edit(p.hf / "config.json", hidden_size=None), {}, "no value for hidden_size"),
    "a size of another model": (
        "from_hf", lambda p: edit(p.hf / "config.json", intermediate_size=47), {}, "the config calls for"),
    "layers of another model": (
        "from_hf", lambda p: edit(p.hf / "config.json", num_hidden_layers=5), {}, r"missing tensors \['model.layers.4"),
    "a million layers": (
        "from_hf", lambda p: edit(p.hf / "config.json", num_hidden_layers=10**6), {}, "n_layers = 1000000"),
    "a shard of weights missing": ("from_hf", lambda p: first_shard(p).unlink(), {}, "lacks the shards model-00001-of-"),
    "an index without a map": (
        "from_hf", lambda p: (p.hf / "model.safetensors.index.json").write_text("{}"), {}, "has no weight_map"),
    "pickles": ("from_hf", lambda p: [path.unlink() for path in p.hf.glob("model*")], {}, "has neither model.safetensors"),
    "a shard cut short": (
        "from_hf", lambda p: os.truncate(first_shard(p), 100), {}, "00001-of.* cannot be read as safetensors"),
    "an extra tensor": (
        "from_hf", lambda p: edit_tensor(first_shard(p), "x", torch.ones(1)), {}, r"unexpected tensors \['x'"),
    "a tensor missing": (
        "from_hf", lambda p: edit_tensor(first_shard(p), "model.embed_tokens.weight", None), {}, "missing tensors .*embed"),
    "NaN weights": ("from_hf", lambda p: edit_tensor(
        first_shard(p), "model.embed_tokens.weight", torch.full((64, 32), torch.nan)), {}, "embed_tokens.* holds NaN"),
    "quantised weights": ("from_hf", lambda p: edit_tensor(
        first_shard(p), "model.embed_tokens.weight", torch.ones(64, 32, dtype=torch.int8)), {}, "holds I8 numbers"),
    "tied embeddings that differ": ("from_hf", lambda p: edit(p.hf / "config.json", tie_word_embeddings=True), {},
                                    "lm_head.weight is not the embedding"),
    "two sources": ("from_hf", nothing, dict(to_hf="x"), "must be given, not both"),
    "no source": ("from_hf", nothing, dict(from_hf=None), "one of from_hf and to_hf must be given, not none"),
    "output that is there": ("from_hf", lambda p: p.out.mkdir(), {}, "out exists already"),
    "a file in the way of output": (
        "from_hf", lambda p: (p.given / "f").write_text("x"), lambda p: dict(out_dir=p.given / "f" / "out"), "given/f"),
    "a read-only output of convert": (
        "from_hf", nothing, dict(out_dir="/proc/nowhere/out"), "cannot write /proc/nowhere/out"),
    "a dtype that is none": ("from_hf", nothing, dict(dtype="int8"), 'dtype = .int8. is not "source" or "float32"'),
    "no GGUF file": ("from_gguf", nothing, {}, "model.gguf does not exist"),
    "a GGUF file that is none": (
        "from_gguf", lambda p: (p.given / "model.gguf").write_text("x" * 99), {}, "cannot be read as GGUF"),
    "a GGUF file cut short": (
        "from_gguf", lambda p: [write_gguf(p, "llama"), os.truncate(p.given / "model.gguf", 40)], {}, "it ends too early"),
    "a GGUF file of another model": ("from_gguf", lambda p: write_gguf(p, "mamba"), {}, "architecture = 'mamba'"),
    "a GGUF file without sizes": ("from_gguf", lambda p: write_gguf(p, "llama"), {}, "no value for vocab_size, hidden_size"),
    "a pruning run to convert": ("to_hf", nothing, lambda p: dict(to_hf=p.pruned), "step_0000006 holds masks, .*compact.py"),
    "a context of no length": ("to_hf", nothing, dict(context_length=-1), "context_length = -1 must not be negative"),
    "masks to convert": ("to_hf", nothing, lambda p: dict(to_hf=p.pruned / "step_0000006"), "run compact.py first"),
    "a Hugging Face folder to convert back": (
        "to_hf", nothing, lambda p: dict(to_hf=p.hf), "convert it first: convert.py --from_hf=.*/hf"),
    "numbers beyond float16": (
        "to_hf", lambda p: edit_tensor(p.model / "model.safetensors", "model.norm.weight", torch.full((32,), 1e6)),
        dict(dtype="float16"), "norm.weight holds NaN or infinite values .as torch.float16"),
    "a carried config that is none": (
        "to_hf", lambda p: (p.model / "assets" / "config.json").write_text("3"), {}, "config.json is not a JSON object"),
    # ---- sample
    "no model to sample": ("sample", nothing, dict(model_dir="nowhere"), "model folder nowhere does not exist"),
    "a pruning run to sample": ("sample", nothing, lambda p: dict(model_dir=p.pruned), "step_0000006 holds masks"),
    "bytes as a prompt": ("sample", nothing, dict(prompt="a\udcff"), r"prompt = 'a\\udcff' is no text"),
    "masks to sample": ("sample", nothing, lambda p: dict(model_dir=p.pruned / "step_0000006"), "run compact.py first"),
    "a Hugging Face folder to sample": ("sample", nothing, lambda p: dict(model_dir=p.hf), "convert.py --from_hf="),
    "a model without tokenizer": (
        "sample", lambda p: shutil.rmtree(p.model / "assets"), {}, "tokenizer .*assets is no file or folder"),
    "a token that the model does not know": (
        "sample", lambda p: [shutil.copytree(p.model / "assets", p.given / "tokenizer"), small_vocabulary(p)],
        dict(prompt="a"), "has token 1 for the prompt, but the model has vocab_size = 1"),
    "NaN weights to sample": ("sample", lambda p: edit_tensor(
        p.model / "model.safetensors", "model.norm.weight", torch.full((32,), torch.nan)), {}, "norm.weight holds NaN"),
    "a config of another version": (
        "sample", lambda p: edit(p.model / "model_config.json", n_head=4, n_heads=None), {},
        "no value for n_heads; unknown n_head; did you mean n_heads?"),
    "no samples": ("sample", nothing, dict(n_samples=0), "n_samples = 0 must be above 0"),
    # ---- reference_loss
    "no losses": ("reference_loss", nothing, dict(losses="nowhere.json"), "cannot read nowhere.json"),
    "losses of another length": (
        "reference_loss", lambda p: edit(p.losses, wiki=[3.0, 2.5]), {}, r"wiki = \[3.0, 2.5\] must be 3 numbers"),
    "losses of two sizes": (
        "reference_loss", lambda p: edit(p.losses, n_params=[1, 2], wiki=[3, 2]), {}, "three different sizes"),
    "losses of no domain": ("reference_loss", lambda p: edit(p.losses, wiki=None), {}, "holds no domain"),
    "losses that are words": (
        "reference_loss", lambda p: edit(p.losses, wiki=["a", "b", "c"]), {}, "must be 3 numbers above 0"),
    "losses beyond all numbers": (
        "reference_loss", lambda p: edit(p.losses, wiki=[10**400, 2, 1]), {}, "must be 3 numbers above 0"),
    "a file in the way of the losses": (
        "reference_loss", lambda p: p.out.write_text("x"), {}, "cannot write out = .*/r.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_named_in_one_line(case, place, monkeypatch, capsys):
    stage, spoil, changes, said = CASES[case]
    spoil(place)
    capsys.readouterr()
    before = set(place.root.rglob("*"))
    line = refusal(*arguments(stage, place, changes(place) if callable(changes) else changes), monkeypatch, capsys)
    assert re.search(said, line), line
    left = {path.name for path in place.root.rglob("*") if path not in before and path.is_file()}
    assert all(re.match(r"prepare\.json|tokenizer\.model|progress\.json|\w+\.bin\.partial", name) for name in left), left


# ---- config files and flags


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


# (text of a.py or what makes it, arguments; {} is a.py, what the line must say)
CONFIG_CASES = {
    "no file": (None, "{}", "config file .*a.py does not exist"),
    "a folder": (Path.mkdir, "{}", "a.py does not exist"),
    "no Python file": ("", "notes.txt", "argument 'notes.txt' is neither a config file .* nor a setting, --name=value"),
    "a file that is binary": (binary, "{}", "does not run: (SyntaxError|ValueError)"),
    "bytes that are no text": (lambda p: p.write_bytes(b"seed = '\xff'"), "{}", "does not run: (SyntaxError|Unicode)"),
    "no syntax": ("seed = ", "{}", "a.py does not run: SyntaxError"),
    "an exception": ("seed = 1 / 0", "{}", "a.py does not run: ZeroDivisionError: division by zero"),
    "an exception of two lines": ("raise ValueError('a\\nb')", "{}", "a.py does not run: ValueError: a b$"),
    "an exit": ("import sys; sys.exit(0)", "{}", "a.py does not run: SystemExit"),
    "endless recursion": ("f = lambda: f()\nf()", "{}", "a.py does not run: RecursionError"),
    "a missing module": ("import nowhere", "{}", "ModuleNotFoundError"),
    "an unknown name": ("sede = 3", "{}", "unknown setting sede in .*a.py; did you mean seed"),
    "a word for a number": ("seed = 'x'", "{}", "seed = 'x' in .*a.py is not int"),
    "a number too long": ("learning_rate = 10 ** 400", "{}", "learning_rate = 1000.* is not float"),
    "a value out of range": ("seq_len = 0", "{}", "seq_len = 0 must be above 0"),
    "an unknown flag": ("", "--sede=3", "unknown setting sede in the flag --sede=3; did you mean seed"),
    "a flag with a space": ("", "--seed 3", "flag --seed and '3' are two arguments; write --seed=3"),
    "a flag with a space and a path": ("", "--init_from models/x", "write --init_from=models/x$"),
    "a flag with a space and a file": ("", "--domain_weights {}", "write --domain_weights=.*a.py$"),
    "a switch with a space": ("", "--resume True", "write --resume=True$"),
    "an unknown flag with a space": ("", "--sede 3", "unknown setting sede in the flag --sede"),
    "a flag without value": ("", "--seed", "flag --seed has no value; write --seed=..."),
    "a dict without quotes": ("", "--domain_weights={a:1}", """write --domain_weights='{"a": 1, "b": 2}'$"""),
    "a dict of words": ("", "--reference_loss={'a':'b'}", "reference_loss = .*write --reference_loss='{"),
    "a tuple without brackets": ("", "--pruning_modules=hidden", """write --pruning_modules='."a", "b".'$"""),
    "a number too large": ("", "--learning_rate=1e999", "learning_rate = inf must be finite"),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_mistakes_in_settings_are_named_in_one_line(case, tmp_path, monkeypatch, capsys):
    make, arguments, said = CONFIG_CASES[case]
    path = tmp_path / "a.py"
    if make is not None:
        make(path) if callable(make) else path.write_text(make)
    argv = [a.format(path) if a == "{}" else a for a in arguments.split()]
    line = refusal("prune", [*NEEDED, f"--out_dir={tmp_path / 'out'}", *argv], monkeypatch, capsys)
    assert re.search(said, line), line
    assert not (tmp_path / "out").exists()


# ---- what is not an error, or no longer one


def test_a_failed_start_of_prepare_does_not_stand_in_the_way(place, monkeypatch, capsys):
    for changes in (dict(tokenizer=None, train_tokenizer=50000), dict(text_field="content", max_bad_lines=9)):
        refusal(*arguments("prepare", place, changes), monkeypatch, capsys)
    run_prepare(PrepareSettings(input_dir=str(place.raw), out_dir=str(place.out), tokenizer=MISTRAL, workers=1))
    assert json.loads((place.out / "wiki" / "train.json").read_text())["n_documents"] > 30


def test_reference_losses_are_written_where_no_folder_is_and_a_bad_fit_is_said(place, capsys):
    place.losses.write_text(json.dumps(LOSSES | {"code": [3.0, 2.0, 0.9]}))  # falls faster and faster
    reference_loss.main(reference_loss.ReferenceSettings(losses=str(place.losses), n_params=10**9,
                                                         out=str(place.out / "deep" / "r.json")))
    assert json.loads((place.out / "deep" / "r.json").read_text()).keys() == {"wiki", "code"}
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")] == ["code:"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(place, monkeypatch, capsys):
    place.root.chmod(0o555)
    try:
        for stage in ("prepare", "from_hf", "to_hf", "reference_loss"):
            assert "/out" in refusal(*arguments(stage, place, {}), monkeypatch, capsys)
    finally:
        place.root.chmod(0o755)


@pytest.mark.parametrize("stage", ["prepare", "from_hf", "to_hf", "sample", "reference_loss"])
def test_the_cases_are_good_unspoiled(stage, place):
    stage, argv = arguments(stage, place, {})
    done = run_script(*([f"{stage}.py"] if (ROOT / f"{stage}.py").exists() else ["-m", f"tools.{stage}"]), *argv)
    assert done.returncode == 0, done.stderr


def test_a_process_of_its_own_says_no_more(place):
    done = run_script("convert.py", *arguments("from_hf", place, dict(from_hf="nowhere"))[1])
    assert done.returncode == 2 and done.stderr.startswith("convert.py: ") and done.stderr.count("\n") == 1


# ---- paths

NO_PATHS = {"split", "text_field", "domain_field", "shard", "steps", "against", "prompt",  # text that names no file
            "gpu", "runs"}  # bare arguments: the shell expands them
REQUIRED = {"prune": [*NEEDED, "--out_dir=o", "--relaxation=topk", "--init_scores=s"],
            "pretrain": [*NEEDED, "--out_dir=o", "--update=constant"],
            "convert": ["--out_dir=o"], "prepare": ["--input_dir=i", "--out_dir=o", "--tokenizer=t"],
            "compact": ["--checkpoint=c", "--out_dir=o"], "sample": ["--model_dir=m"],
            "reference_loss": ["--losses=l", "--n_params=9"], "plot": ["r"], "gguf_to_hf": ["--gguf=g", "--out_dir=o"],
            "shapes": ["--source=s", "--target_params=1e9"], "evaluate": ["e", "--out_dir=o"],
            "finetune": ["e", "--data=d", "--out_dir=o"]}


def path_settings(cls: type) -> set[str]:
    return {n for n, kind in get_type_hints(cls, include_extras=True).items() if FilePath in (kind, *get_args(kind))}


@pytest.mark.parametrize("stage", SETTINGS)
def test_a_setting_that_is_text_names_a_file_or_is_listed(stage):
    cls = getattr(module_of(stage), SETTINGS[stage])
    text = {name for name, kind in get_type_hints(cls).items() if str in (kind, *get_args(kind))}
    assert text - path_settings(cls) <= NO_PATHS


@pytest.mark.parametrize("stage", SETTINGS)
def test_the_home_folder_is_meant_by_a_tilde_in_every_path(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cls = getattr(module_of(stage), SETTINGS[stage])
    for name in path_settings(cls):
        given = [*REQUIRED[stage], *(["--from_hf=h"] if stage == "convert" and name == "out_dir" else [])]
        given = given[name in ("export", "runs"):]  # the one that needs no name stands first
        assert getattr(parse_args(cls, [*given, f"--{name}=~/a b"]), name) == f"{tmp_path}/a b"
        assert getattr(parse_args(cls, [*given, f"--{name}=./~/a"]), name) == "./~/a"
        with pytest.raises(UserError, match=f"{name} = ~nobody-here/a: there is no user of that name"):
            parse_args(cls, [*given, f"--{name}=~nobody-here/a"])


def test_a_tilde_in_a_config_file_and_in_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.py").write_text("out_dir = '~/b'\ndomain_weights = {'~a': 1.0}\n")
    settings = parse_args(prune.PruneSettings, [str(tmp_path / "a.py"), *NEEDED])
    assert (settings.out_dir, settings.domain_weights) == (f"{tmp_path}/b", {"~a": 1.0})
    settings = parse_args(sample.SampleSettings, ["--model_dir=~", "--prompt=~/x"])
    assert (settings.model_dir, settings.prompt) == (str(tmp_path), "~/x")
