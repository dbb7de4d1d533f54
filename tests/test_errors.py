"""A user's mistake in training or compacting is one line that names it, exit status 2, and nothing on disk.

test_errors_data.py has those of the other stages and of config files.
"""

import importlib
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (DOMAINS, SETTINGS, TINY, flags, flip, module_of, pretrain_settings, prune_settings, refusal,
                      run_script, tiny_config, write_data_dir, write_tokens)
from safetensors.torch import load_file, save_file
from test_prepare import MISTRAL

from run.settings import UserError, run_stage
from run.weights import new_folder


@pytest.fixture
def place(tmp_path, source, pruned, data_dir, monkeypatch):
    """Good inputs that a case may spoil: copies of the model, the tokens and a checkpoint; and where to write."""
    shutil.copytree(source, tmp_path / "model")
    shutil.copytree(data_dir, tmp_path / "data")
    return SimpleNamespace(root=tmp_path, model=tmp_path / "model", data=tmp_path / "data", out=tmp_path / "runs" / "out",
                           pruned=pruned, env=monkeypatch.setenv)


def arguments(stage: str, place, changes: dict) -> list[str]:
    if stage == "compact":
        given = dict(checkpoint=str(place.pruned), out_dir=str(place.out))
        return [f"--{k}={v}" for k, v in (given | changes).items()]
    make = dict(prune=prune_settings, pretrain=pretrain_settings)[stage]
    given = flags(make(place.data, place.out, place.model))
    return [*given, *(f"--{name}={value}" for name, value in changes.items())]  # the last flag counts


def written(place) -> list[str]:
    """What a stopped run left, apart from what was there."""
    return sorted(str(p.relative_to(place.root)) for p in place.root.rglob("*")
                  if p.relative_to(place.root).parts[0] not in ("model", "data"))


def cut(path: Path, n: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-n])


def drop_tensor(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


def add_tensor(folder: Path, name: str) -> None:
    save_file(load_file(folder / "model.safetensors") | {name: torch.zeros(3)}, folder / "model.safetensors")


def spoil_weights(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full((32,), value)
    save_file(weights, folder / "model.safetensors")


def write_shards(data_dir: Path, changes: dict = {}) -> Path:  # noqa: B006
    """The training tokens of wiki in two shards; the index of the second, which has the changes."""
    for path in (data_dir / "wiki").glob("train*"):
        path.unlink()
    return [write_tokens(data_dir, "wiki", "train", range(99), name=f"train-0000{i}-of-00002", **(changes if i else {}))
            for i in range(2)][1]


def copied(place) -> Path:
    """A checkpoint of prune.py that may be spoiled: in place.root / "data", with what else was there before."""
    folder = Path(shutil.copytree(place.pruned / "step_0000006", place.data / "run" / "step_0000006"))
    (folder / "manifest.json").unlink()  # which knows of any damage; without it the readers must
    return folder


def at_run(place) -> dict:
    return dict(checkpoint=place.data / "run")


def nothing(place) -> None:
    pass


# (stages, what is spoiled, settings, what the line must say)
CASES = {
    "a mistyped flag": ("both compact", nothing, dict(out_dirr="x"), "unknown setting out_dirr .*did you mean out_dir"),
    "no data": ("both", lambda p: shutil.rmtree(p.data), {}, "data_dir = .*/data holds no domain.*prepare.py"),
    "no model": ("both", lambda p: shutil.rmtree(p.model), {}, "model folder .*/model does not exist"),
    "no such model": ("both", nothing, dict(init_from="nowhere"), "model folder nowhere does not exist"),
    "a folder that is no model": ("both", lambda p: (p.model / "model_config.json").unlink(), {}, "convert.py"),
    "a config cut short": ("both", lambda p: cut(p.model / "model_config.json"), {}, "model_config.json"),
    "weights missing": ("both", lambda p: (p.model / "model.safetensors").unlink(), {}, "model.safetensors does not exist"),
    "weights cut short": ("both", lambda p: cut(p.model / "model.safetensors"), {}, "cannot be read as safetensors"),
    "a tensor missing": ("both", lambda p: drop_tensor(p.model, "model.norm.weight"), {}, r"missing.*model\.norm\.weight"),
    "a tensor too many": ("both", lambda p: add_tensor(p.model, "extra"), {}, "unexpected tensors .'extra'."),
    "weights of another shape": (
        "both", lambda p: (p.model / "model_config.json").write_text(tiny_config(intermediate_size=47).to_json()), {},
        r"has shape \(48, 32\), not \(47, 32\)"),
    "a pruning checkpoint as a model": ("both", lambda p: [shutil.rmtree(p.model), shutil.copytree(
        p.pruned / "step_0000006", p.model)], {}, "holds masks.*compact.py"),
    "other tokenizers": ("both", lambda p: write_tokens(p.data, "wiki", "train", range(99), tokenizer="u"), {},
                         "code and wiki were made with different tokenizers"),
    "tokens beyond the model": (
        "both", lambda p: [write_tokens(p.data, d, s, range(99), vocab_size=65) for d in DOMAINS for s in ("train", "eval")],
        {}, r"has token 64 in its train split \(a tokenizer of 65 tokens made it\), but the model knows 64"),
    "sequences too long": ("both", nothing, dict(seq_len=65), "seq_len = 65 .*64"),
    "an unknown domain": ("both", nothing, dict(domain_weights={"code": 0.5, "wik": 0.5}), "no domain 'wik'.*play, wiki"),
    "an unknown split": ("both", nothing, dict(split="prun"), "prun"),
    "a domain without tokens": ("both", lambda p: write_tokens(p.data, "play", "train", []), {}, "domain play has 0 tokens"),
    "tokens cut short": ("both", lambda p: cut(p.data / "wiki" / "train.bin"), {}, "wiki/train.bin has .* bytes"),
    "an index that is none": ("both", lambda p: (p.data / "wiki" / "eval.json").write_text("{}"), {}, "wiki/eval.json"),
    "no evaluation split": ("both", lambda p: (p.data / "wiki" / "eval.json").unlink(), {}, "wiki/eval.json.*prepare.py"),
    "a file in the way": ("both", lambda p: (p.root / "runs").write_text("x"), {}, "cannot write .*runs/out"),
    "weights in no file": ("both", nothing, dict(domain_weights="nowhere.json"), "cannot read nowhere.json"),
    "weights that are no JSON": ("both", nothing, dict(domain_weights=__file__), "test_errors.py is not JSON"),
    "losses of other domains": ("both", nothing, dict(reference_loss={"code": 1.0, "wiki": 2.0}), "play"),
    "shares that do not sum to 1": ("both", nothing, dict(domain_weights={"code": 0.5, "wiki": 0.6}), "sum to 1.1, not 1"),
    "a batch that does not divide": ("both", nothing, dict(micro_batch_size=3), "global_batch_size = 8.*3"),
    "flash attention on a CPU": ("both", nothing, dict(attention="flash_attn"), "flash_attn needs cuda and bfloat16"),
    "a target larger than the source": ("prune", nothing, dict(target_hidden_size=33), "hidden_size = 33 .* 32"),
    "heads that do not divide": (
        "prune", nothing, dict(target_n_heads=3, target_n_kv_heads=2), "n_heads = 3.*n_kv_heads = 2"),
    "heads that do not divide by the group": (
        "prune", nothing, dict(target_n_heads=3, target_n_kv_heads=None), "target_n_heads = 3 .*group of 2"),
    "a mask missing": ("prune", nothing, dict(pruning_modules="('hidden',)"), "pruning_modules lacks"),
    "an unknown mask": ("prune", nothing, dict(pruning_modules="('hiden',)"), "'hiden', which is not one of hidden"),
    "no source": ("prune", nothing, dict(init_from=""), "init_from"),
    "both a model and a shape": ("pretrain", nothing, dict(shape="{'n_layers': 3}"), "either init_from"),
    "a shape with an unknown field": ("pretrain", nothing, dict(init_from="", shape="{'n_layer': 3}"), "shape: .*n_layer"),
    "a shape that does not fit": (
        "pretrain", nothing, dict(init_from="", shape=TINY | dict(n_kv_heads=3)), "n_kv_heads = 3"),
    "a shape without a field": (
        "pretrain", nothing, dict(init_from="", shape={"n_layers": 3}), "shape: no value for vocab_size"),
    "a shape that is no dict": (
        "pretrain", nothing, dict(init_from="", shape="{n_layers: 3}"), "shape = .*write --shape='{"),
    "a shape of a million layers": (
        "pretrain", nothing, dict(init_from="", shape=TINY | dict(n_layers=10**6)), "shape: n_layers = 1000000"),
    "no reference losses": ("pretrain", nothing, dict(update="doremi"), r"tools\.reference_loss computes it"),
    "no reference losses, though they are there": (
        "pretrain", lambda p: (p.model / "reference_loss.json").write_text("{}"), dict(update="doremi"),
        "--reference_loss=.*/model/reference_loss.json"),
    "weights that are no numbers": ("both", lambda p: spoil_weights(p.model, torch.nan), {}, "holds NaN or infinite values"),
    "weights of integers": ("both", lambda p: spoil_weights(p.model, 3), {}, "holds I64 numbers, not F64, F32"),
    "a pruning run as a model": ("both", nothing, lambda p: dict(init_from=p.pruned), "pruned/step_0000006 holds masks"),
    "a Hugging Face folder as a model": (
        "both", lambda p: (p.model / "model_config.json").rename(p.model / "config.json").write_text('{"model_type": 1}'),
        {}, r"convert\.py --from_hf=.*/model"),
    "a file as a model": ("both", nothing, dict(init_from=__file__), "test_errors.py is a file"),
    "a tokenizer other than the data's": ("both", lambda p: [(p.model / "assets").mkdir(), shutil.copy(
        MISTRAL, p.model / "assets" / "tokenizer.model")], {}, "made with another tokenizer .*prepare.py --tokenizer="),
    "a teacher of another tokenizer": ("both", lambda p: [
        shutil.copytree(p.model, p.data.parent / "teacher"), (p.data.parent / "teacher" / "assets").mkdir(),
        shutil.copy(MISTRAL, p.data.parent / "teacher" / "assets" / "tokenizer.model")],
        lambda p: dict(teacher=p.data.parent / "teacher"), "made with another tokenizer .*teacher/assets; run prepare.py"),
    "processes that do not divide the batch": (
        "both", lambda p: p.env("WORLD_SIZE", "3"), {}, "global_batch_size = 8 does not divide by .* = 2 x 3"),
    "shards of two dtypes": (
        "both", lambda p: write_shards(p.data, dict(dtype="uint32")), {}, "00001-of-00002.json: dtype = uint32 differs"),
    "a shard missing": (
        "both", lambda p: write_shards(p.data).unlink(), {}, "shards of train are missing .*train-00001-of-00002.json"),
    "a shard without its tokens": (
        "both", lambda p: write_shards(p.data).with_suffix(".bin").unlink(), {}, "train-00001-of-00002.bin is missing"),
    "a shard with a name of letters": (
        "both", lambda p: write_shards(p.data).rename(p.data / "wiki" / "train-0000a-of-00002.json"), {},
        "train-0000a-of-00002.json is no name of a shard"),
    "a split and shards of it": (
        "both", lambda p: write_tokens(p.data, "wiki", "train", range(99), name="train-00000-of-00001"), {}, "has both"),
    "a domain of one document, held out": ("both", lambda p: [write_tokens(p.data, "note", "train", []), write_tokens(
        p.data, "note", "eval", range(64))], {}, "domain note has 0 tokens in its train split"),
    "a domain shorter than a sequence": (
        "both", lambda p: write_tokens(p.data, "play", "train", range(32)), {}, "domain play has 32 tokens .* 32 [+] 1"),
    "a floor too high for the domains": ("both", nothing, dict(min_weight=0.34), "min_weight = 0.34 times 3 domains"),
    "a floor too high for a file's domains": (
        "both", lambda p: (p.data / "w.json").write_text('{"code": 0.5, "wiki": 0.5}'),
        lambda p: dict(min_weight=0.5, domain_weights=p.data / "w.json"), "min_weight = 0.5 times 2 domains"),
    "losses of a mistyped domain": (
        "both", nothing, dict(reference_loss={"cod": 1.0, "wiki": 2.0, "play": 1.0}),
        "only reference_loss has cod; only domain_weights .*has code; is cod meant to be code"),
    "weights that are a list": (
        "both", lambda p: (p.data / "w.json").write_text("[0.5, 0.5]"), lambda p: dict(domain_weights=p.data / "w.json"),
        "the file must map domains to numbers"),
    "weights that are no dict": ("both", nothing, dict(domain_weights="{code: 1}"), "domain_weights = '{code: 1}' .*write"),
    "an output folder that cannot be": ("both compact", nothing, dict(out_dir="/proc/nowhere/out"), "/proc/nowhere"),
    "a path too long": ("both", nothing, dict(init_from="x" * 300), "model folder x* does not exist"),
    "half of what closes a layer": (
        "prune", nothing, dict(pruning_modules=["hidden", "head_layer", "intermediate", "kv_head", "query_head"]),
        "3 layers, the source 4.*both `head_layer` and `mlp`"),
    "no checkpoint": ("compact", nothing, dict(checkpoint="nowhere"), "checkpoint = nowhere does not exist"),
    "a checkpoint without masks": ("compact", nothing, lambda p: dict(checkpoint=p.model), "is no checkpoint of prune.py"),
    "a checkpoint without a state": (
        "compact", lambda p: (copied(p) / "state.json").unlink(), at_run, "cannot read .*state.json"),
    "a state that is none": (
        "compact", lambda p: (copied(p) / "state.json").write_text("[]"), at_run, "state.json is not a state"),
    "masks of another shape": (
        "compact", lambda p: (copied(p) / "target_config.json").write_text(tiny_config().to_json()), at_run,
        "masks.safetensors: missing tensors|masks.safetensors: .*unexpected tensors"),
    "masks cut short": (
        "compact", lambda p: cut(copied(p) / "masks.safetensors"), at_run, "masks.safetensors cannot be read"),
    "weights of a checkpoint cut short": (
        "compact", lambda p: cut(copied(p) / "model.safetensors"), at_run, "model.safetensors cannot be read"),
    "a damaged checkpoint": (
        "compact", lambda p: shutil.copytree(p.pruned / "step_0000003", p.data / "run" / "step_0000003") and flip(
            p.data / "run" / "step_0000003" / "model.safetensors"), at_run,
        r"step_0000003 is damaged: model\.safetensors differs from its checksum in manifest\.json \(model.*take an earlier"),
    "a folder in the way": ("compact", lambda p: p.out.mkdir(parents=True), {}, "out_dir = .* exists already"),
    "nothing to write": ("compact", nothing, dict(out_dir=""), "out_dir"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_named_in_one_line(case, place, monkeypatch, capsys):
    stages, spoil, changes, said = CASES[case]
    spoil(place)
    changes = changes(place) if callable(changes) else changes
    before = written(place)
    for stage in stages.replace("both", "prune pretrain").split():
        line = refusal(stage, arguments(stage, place, changes), monkeypatch, capsys)
        assert re.search(said, line), line
        left = [name for name in written(place) if name not in before]
        assert left in ([], ["runs"], ["runs", "runs/out", "runs/out/.lock"]), left


@pytest.mark.parametrize("stage", ["prune", "pretrain"])
def test_mistakes_of_resuming(place, monkeypatch, capsys, stage):
    argv = arguments(stage, place, {})
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *argv])
    module = module_of(stage)
    run_stage(module.main, getattr(module, SETTINGS[stage]))
    before = {p: p.read_bytes() for p in place.out.rglob("*") if p.is_file() and p.name != "config.json"}
    capsys.readouterr()
    # masks would be lost: only a run without them can be what another one starts from
    other = "or begin a run in another out_dir" + (", --init_from=.*step_0000006$" if stage == "pretrain" else "$")
    for changes, said in (({}, "holds a run already .step_0000006.*--resume"),
                          (dict(resume=True, max_steps=5), "past max_steps = 5"),
                          (dict(resume=True, seed=5), "begun with seed = 1234, not 5; .* give it as it was, " + other),
                          (dict(resume=True, domain_weights=dict(zip(DOMAINS, (0.5, 0.2, 0.3)))),
                           "begun with domain_weights = .*; .* give it as it was, " + other),
                          (dict(resume=True, domain_weights={"code": 0.5, "wiki": 0.5}),
                           "code, play, wiki, not on code, wiki; give domain_weights .* as they were, " + other)):
        line = refusal(stage, [*argv, *(f"--{k}={v}" for k, v in changes.items())], monkeypatch, capsys)
        assert re.search(said, line), line
    assert all(p.read_bytes() == data for p, data in before.items())


def test_a_metrics_file_of_someone_else_is_left_alone(place, monkeypatch, capsys):
    argv = arguments("pretrain", place, {})
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *argv])
    module = importlib.import_module("pretrain")
    run_stage(module.main, module.PretrainSettings)
    capsys.readouterr()
    (place.out / "metrics.jsonl").write_text("my notes\n")
    line = refusal("pretrain", [*argv, "--resume", "--max_steps=9"], monkeypatch, capsys)
    assert "metrics.jsonl has a line that is not ours" in line
    assert (place.out / "metrics.jsonl").read_text() == "my notes\n"


@pytest.mark.parametrize("stage, changes, said", [
    ("prune", dict(target_n_layers=5), "target n_layers = 5"), ("pretrain", dict(domain_weights={"cod": 1.0}), "'cod'"),
    ("compact", dict(checkpoint="nowhere"), "nowhere"),
])
def test_a_process_of_its_own_says_no_more(place, stage, changes, said):
    done = run_script(f"{stage}.py", *arguments(stage, place, changes))
    assert done.returncode == 2
    assert done.stderr.startswith(f"{stage}.py: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert not place.out.exists()


@pytest.mark.parametrize("stage, changes, said", [
    ("prune", dict(target_n_layers=5), "target n_layers = 5"),  # found in main, with a process group
    ("pretrain", dict(seq_len="long"), "seq_len = 'long' is not int"),  # found before
])
def test_under_torchrun_rank_0_speaks(place, stage, changes, said):
    done = run_script(f"{stage}.py", *arguments(stage, place, changes), processes=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"{stage}.py: ")]
    assert done.returncode != 0 and len(lines) == 1 and said in lines[0], done.stderr
    assert "rank" not in lines[0] and not place.out.exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "folder"
    with pytest.raises(ZeroDivisionError), new_folder(out) as temporary:
        (temporary / "half").write_text("x")
        assert not out.exists()
        1 / 0  # noqa: B018
    assert not list((tmp_path / "deep").iterdir())
    (tmp_path / "deep" / "folder.tmp").mkdir()  # of a process that was killed
    (tmp_path / "deep" / "folder.tmp" / "old").write_text("x")
    with new_folder(out) as temporary:
        (temporary / "whole").write_text("x")
    with pytest.raises(UserError, match="exists already"), new_folder(out):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "folder", "whole"]


def test_an_error_of_ours_is_not_dressed_up(place, monkeypatch):
    """What is not the user's mistake keeps its traceback."""
    module = importlib.import_module("pretrain")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments("pretrain", place, {})])
    monkeypatch.setattr(module, "wrap", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_stage(module.main, module.PretrainSettings)


def test_data_dir_of_the_cases_is_good(place, monkeypatch):
    """The table above fails for its reasons only: unspoiled, both stages run."""
    write_data_dir(place.root / "more", dict(code=3000))
    for stage in ("prune", "pretrain"):
        module = module_of(stage)
        argv = arguments(stage, place, dict(data_dir=str(place.root / "more"), out_dir=str(place.out / stage), max_steps=2))
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *argv])
        run_stage(module.main, getattr(module, SETTINGS[stage]))
        assert (place.out / stage / "step_0000002").is_dir()
