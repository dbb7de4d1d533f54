"""Compaction is exact: masked == compacted == exported == imported again, for every shape and every mask."""

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import (SHAPES, TARGET, TINY, pretrain_settings, prune_settings, random_model, random_tokens, run_script,
                      soft_mask, tiny_config, write_model)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import compact as compact_stage
import convert
import pretrain
import prune
from compact import compact
from l0 import DIMS, L0, MASKS, TopK, dims, expected_params, mask_sets
from model import ModelConfig, Transformer
from run.settings import UserError
from run.weights import load_weights, read_model_config
from tools import importance

EXAMPLES = settings(max_examples=220, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


FAMILIES = {name: {k: v for k, v in shape.items() if "heads" not in k and k not in ("tie_embeddings", "head_dim")}
            for name, shape in SHAPES.items()} | {"biased": dict(qkv_bias=True, o_bias=True)}
LONE = {"all at once": FAMILIES.pop("all at once"), "a bias": dict(o_bias=True)}  # no Hugging Face class is such


@st.composite
def cases(draw, families=FAMILIES):
    """(source shape, masks, target shape): masks of a random subset of sets, soft where a unit is kept."""
    family = draw(st.sampled_from(sorted(families)))
    a = {"d": draw(st.integers(6, 24)), "L": draw(st.integers(1, 4)), "K": draw(st.integers(1, 3)),
         "G": 1 if family == "gpt_neox" else draw(st.integers(1, 3)), "f": draw(st.integers(2, 20))}
    a["H"] = a["K"] * a["G"]
    gqa = a["K"] != a["H"]
    sets = draw(st.sets(st.sampled_from([m for m in MASKS if m not in (("head",) if gqa else ("kv_head", "query_head"))])))
    generator, masks, b = torch.Generator().manual_seed(draw(st.integers(0, 2**31))), {}, dict(a)
    for name in sorted(sets):  # a set may keep everything, and then only scales
        axis = MASKS[name][-1]
        kept = draw(st.integers(4 if axis == "d" else 1, a[axis]))
        masks[name] = soft_mask(tuple(a[x] for x in MASKS[name]), kept, generator)
        if name not in ("head_layer", "mlp"):
            b[axis] = kept
    if "layer" not in masks and {"head_layer", "mlp"} <= masks.keys():
        b["L"] = int(((masks["head_layer"] + masks["mlp"]) > 0).sum())  # both blocks closed: the layer goes
    b["H"] = b["K"] * b["G"] if gqa else b["H"]
    if family == "biased":  # transformers' Llama wants a hidden size that divides; the others don't care
        assume(b["d"] % b["H"] == 0)
    fields, h = families[family], 2 * draw(st.integers(1, 4))
    fields = fields | ({"rotary_dims": None if h == 2 else 2} if "rotary_dims" in fields else {})
    if family == "gpt_neox" and b["d"] % (2 * b["H"]) == 0:  # or no class holds it
        h = b["d"] // b["H"]
        fields["rotary_dims"] = None if h == 2 else 2
    cfg = ModelConfig(
        vocab_size=draw(st.integers(3, 40)), hidden_size=a["d"], n_layers=a["L"], n_heads=a["H"], n_kv_heads=a["K"],
        head_dim=h, intermediate_size=a["f"], context_length=32, tie_embeddings=draw(st.booleans()), norm_eps=1e-5,
        rope_theta=draw(st.sampled_from([1e4, 5e5])), rope_scaling=None if family == "phi3" else draw(st.sampled_from(
            [None, None, {"rope_type": "linear", "factor": 2.0}, LLAMA3])), **fields)
    target = dataclasses.replace(cfg, hidden_size=b["d"], n_layers=b["L"], n_heads=b["H"],
                                 n_kv_heads=b["K"] if gqa else b["H"], intermediate_size=b["f"])
    return cfg, masks, target


def close(ours: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    error = float((ours - want).abs().max()) / max(1.0, float(want.abs().max()))
    assert error < tolerance, error


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    return load_weights(Transformer(read_model_config(folder, ModelConfig)), folder)(tokens)


@given(case=cases(), seed=st.integers(0, 2**31))
@EXAMPLES
@torch.no_grad()
def test_masked_compacted_exported_and_imported_logits_agree(case, seed):
    cfg, masks, target = case
    model, tokens = random_model(cfg, seed), random_tokens(cfg, T=12, seed=seed)
    masked = model(tokens, masks=masks)
    weights, shape = compact(dict(model.named_parameters()), cfg, masks)
    assert shape == target
    dense = Transformer(shape)
    dense.load_state_dict(weights)  # strict: every tensor, of the target's shape
    close(dense(tokens), masked)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "compacted").mkdir()
        write_model(folder / "compacted", weights, shape, [])
        assert torch.equal(logits(folder / "compacted", tokens), dense(tokens))
        if cfg.norm == "layer" and (shape.head_dim * shape.n_heads != shape.hidden_size):
            with pytest.raises(UserError, match=r"nearest is GPTNeoXForCausalLM: .*(head_dim|hidden_size)"):
                convert.main(convert.ConvertSettings(to_hf=str(folder / "compacted"), out_dir=str(folder / "hf")))
            return
        convert.main(convert.ConvertSettings(to_hf=str(folder / "compacted"), out_dir=str(folder / "hf")))
        convert.main(convert.ConvertSettings(from_hf=str(folder / "hf"), out_dir=str(folder / "back")))
        assert read_model_config(folder / "back", ModelConfig) == shape
        close(logits(folder / "back", tokens), masked)


@given(case=cases(LONE), seed=st.integers(0, 2**31))
@settings(EXAMPLES, max_examples=60)
@torch.no_grad()
def test_any_mixture_of_fields_is_folded(case, seed):
    """No Hugging Face class has these, so there is no export."""
    cfg, masks, target = case
    model, tokens = random_model(cfg, seed), random_tokens(cfg, T=12, seed=seed)
    weights, shape = compact(dict(model.named_parameters()), cfg, masks)
    dense = Transformer(shape)
    dense.load_state_dict(weights)
    assert shape == target
    close(dense(tokens), model(tokens, masks=masks))


MIXED = {  # what transformers should load as: shape, target after compaction, mask sets if not those of the target
    "llama": (dict(n_kv_heads=4), dict(hidden_size=24, n_layers=3, n_heads=2, n_kv_heads=2, intermediate_size=30)),
    "grouped": (dict(n_heads=6, n_kv_heads=3), dict(hidden_size=20, n_layers=2, n_heads=2, n_kv_heads=1)),
    "tied": (dict(tie_embeddings=True), dict(hidden_size=20, intermediate_size=31)),
    "biased": (dict(qkv_bias=True, o_bias=True, mlp_bias=True), dict(hidden_size=20, n_layers=1, n_heads=2, n_kv_heads=2)),
    "qwen2": (dict(qkv_bias=True, rope_scaling=LLAMA3), dict(n_layers=3, n_heads=2, n_kv_heads=1)),
    "uneven": (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), dict(hidden_size=21, n_heads=2, n_kv_heads=1)),
    "qwen3": (SHAPES["qwen3"], dict(hidden_size=21, n_layers=3, n_heads=2, n_kv_heads=1, intermediate_size=30)),
    "gpt_neox": (SHAPES["gpt_neox"], dict(hidden_size=24, n_layers=3, n_heads=3, n_kv_heads=3, intermediate_size=30)),
    "one by one": (SHAPES["gpt_neox"] | dict(parallel_residual=False), dict(hidden_size=16, n_heads=2, n_kv_heads=2)),
    "phi3": (SHAPES["phi3"], dict(hidden_size=21, n_layers=3, n_heads=2, n_kv_heads=2, intermediate_size=30)),
    "olmo2": (SHAPES["olmo2"], dict(hidden_size=21, n_layers=3, n_heads=2, n_kv_heads=1, intermediate_size=30)),
    "olmo2 of no groups": (SHAPES["olmo2"] | dict(n_kv_heads=4), dict(hidden_size=24, n_heads=3, n_kv_heads=3)),
}
BLOCKS = ("llama", "qwen2", "qwen3", "gpt_neox", "phi3", "olmo2")  # closed one by one too: a layer is half empty


@pytest.mark.parametrize("name, blocks", [*((name, False) for name in MIXED), *((name, True) for name in BLOCKS)])
@torch.no_grad()
def test_transformers_gives_the_masked_logits(name, blocks, tmp_path):
    from transformers import AutoModelForCausalLM

    changes, smaller = MIXED[name]
    cfg = tiny_config(**changes)
    target, generator = dataclasses.replace(cfg, **smaller), torch.Generator().manual_seed(0)
    masks = {m: soft_mask(shape, kept, generator) for m, (shape, kept) in mask_sets(cfg, target).items()}
    if blocks:  # layer 1 loses both, layer 2 attention, layer 3 the MLP
        masks.pop("layer", None)
        masks |= {"head_layer": torch.tensor([1.0, 0, 0, 0.7]), "mlp": torch.tensor([0.6, 0, 1.0, 0])}
        target = dataclasses.replace(target, n_layers=3)
    model, tokens = random_model(cfg), random_tokens(cfg, T=20)
    weights, shape = compact(dict(model.named_parameters()), cfg, masks)
    assert shape == target
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", weights, shape, [])
    convert.main(convert.ConvertSettings(to_hf=str(tmp_path / "ours"), out_dir=str(tmp_path / "hf")))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    close(theirs(tokens).logits, model(tokens, masks=masks), 1e-4)
    convert.main(convert.ConvertSettings(from_hf=str(tmp_path / "hf"), out_dir=str(tmp_path / "again")))
    assert read_model_config(tmp_path / "again", ModelConfig) == shape
    first, last = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "again"))
    assert first.keys() == last.keys() and all(torch.equal(first[n], last[n]) for n in first)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_a_unit_of_every_set_matters_until_it_is_cut(name, family):
    """A set that did nothing, or that compaction overlooked, would fail here: a line in the table is not enough."""
    cfg = tiny_config(**SHAPES[family] | dict(n_heads=4, n_kv_heads=2 if name in ("kv_head", "query_head") else 4))
    model, tokens = random_model(cfg), random_tokens(cfg)
    masks = {name: torch.ones([dims(cfg)[x] for x in MASKS[name]])}
    masks[name][..., 1] = 0  # of each row
    if name in ("head_layer", "mlp"):  # one alone empties a block, which stays; both take the layer away
        masks = {"head_layer": masks[name], "mlp": masks[name]}
    masked = model(tokens, masks=masks)
    assert (masked - model(tokens)).abs().max() > 1e-2
    weights, shape = compact(dict(model.named_parameters()), cfg, masks)
    axis = MASKS[name][-1]
    assert dims(shape)[axis] == dims(cfg)[axis] - 1 and shape.n_params() < cfg.n_params()
    dense = Transformer(shape)
    dense.load_state_dict(weights)
    close(dense(tokens), masked)


@torch.no_grad()
def test_gains_above_one_are_folded_and_change_no_count():
    cfg = tiny_config()
    target = tiny_config(hidden_size=20, n_layers=3, n_heads=2, n_kv_heads=1, intermediate_size=30)
    masks = TopK(mask_sets(cfg, target))
    for p in masks.parameters():
        p.normal_(0, 0.5)
    z, model, tokens = masks.deterministic(), random_model(cfg), random_tokens(cfg)
    assert max(mask.max() for mask in z.values()) > 1
    weights, shape = compact(dict(model.named_parameters()), cfg, z)
    assert shape == target
    dense = Transformer(shape)
    dense.load_state_dict(weights)
    close(dense(tokens), model(tokens, masks=z))
    values, p_open = masks.metrics(1)
    assert float(expected_params(cfg, p_open)[1]) == target.n_params()
    assert values["sparsity/hidden"] == values["target_sparsity/hidden"] == 1 - 20 / 32


def test_a_set_that_nothing_reads_is_refused(source, data_dir, tmp_path, monkeypatch):
    """Also one of a new axis: a line for the axis, one for the set, a field for the target."""
    monkeypatch.setitem(DIMS, "V", ("vocab_size", lambda cfg: cfg.vocab_size))
    monkeypatch.setitem(MASKS, "token", ("L", "V"))
    cfg = tiny_config()
    target = dataclasses.replace(cfg, vocab_size=60)
    assert mask_sets(cfg, target) == {"token": ((4, 64), 60)}
    with pytest.raises(ValueError, match="no factor on any weight for the mask set token"):
        random_model(cfg)(random_tokens(cfg), masks={"token": torch.ones(4, 64)})
    monkeypatch.setattr(prune, "target_config", lambda settings, shape: target)
    with pytest.raises(UserError, match="no factor on any weight for the mask set token"):
        prune.main(prune_settings(data_dir, tmp_path / "run", source))


def ones(cfg: ModelConfig) -> dict[str, torch.Tensor]:
    return {"layer": torch.ones(4), "intermediate": torch.ones(4, 48), "kv_head": torch.ones(4, 2),
            "query_head": torch.ones(4, 2, 2)}


@pytest.mark.parametrize("closed", [
    dict(intermediate=[(1, 3)]),  # one layer's MLP is smaller
    dict(kv_head=[(0, 1)]),  # one layer has fewer KV heads
    dict(query_head=[(2, 0, 1)]),  # a group is smaller than its neighbour
    dict(query_head=[(i, 0, 1) for i in range(4)]),  # in every layer
    dict(layer=[0, 1, 2, 3]),  # nothing is left
])
def test_masks_without_a_uniform_shape_are_refused(closed):
    cfg = tiny_config()
    masks = ones(cfg)
    for name, units in closed.items():
        for unit in units:
            masks[name][unit] = 0
    with pytest.raises(ValueError, match="shape"):
        compact(dict(random_model(cfg).named_parameters()), cfg, masks)


def test_shapes_within_closed_layers_do_not_matter():
    cfg = tiny_config()
    masks = ones(cfg)
    masks["layer"][2] = masks["intermediate"][2, :7] = masks["query_head"][2, 0, 1] = 0
    assert compact(dict(random_model(cfg).named_parameters()), cfg, masks)[1] == dataclasses.replace(cfg, n_layers=3)


def test_the_source_is_left_as_it_was():
    cfg = tiny_config()
    model = random_model(cfg)
    before = {name: p.clone() for name, p in model.named_parameters()}
    compact(dict(model.named_parameters()), cfg, {name: 0.5 * z for name, z in ones(cfg).items()})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- the stage


def test_stage_writes_exactly_the_target(pruned, tmp_path):
    out_dir = tmp_path / "deep" / "compacted"
    done = run_script("compact.py", f"--checkpoint={pruned}", f"--out_dir={out_dir}")
    assert done.returncode == 0, done.stderr
    shape = read_model_config(out_dir, ModelConfig)
    assert shape == dataclasses.replace(tiny_config(), **{k.removeprefix("target_"): v for k, v in TARGET.items()})
    difference, largest = map(float, re.search(r"by at most (\S+) \(largest logit (\S+)\)", done.stdout).groups())
    assert difference < 1e-5 * max(1, largest)
    assert all(f"{name}: " in done.stdout for name in ("hidden", "layer", "intermediate", "kv_head", "query_head"))
    checkpoint = pruned / "step_0000006"
    masks = load_weights(L0(mask_sets(tiny_config(), shape)), checkpoint / "masks.safetensors").deterministic()
    tokens = random_tokens(shape)
    with torch.no_grad():
        masked = load_weights(Transformer(tiny_config()), checkpoint)(tokens, masks=masks)
    close(logits(out_dir, tokens), masked)
    assert {p.name for p in out_dir.iterdir()} == {"model.safetensors", "model_config.json", "assets", "domain_weights.json",
                                                   "reference_loss.json"}
    state = json.loads((checkpoint / "state.json").read_text())
    for name in ("domain_weights", "reference_loss"):  # as pretrain.py takes them
        assert json.loads((out_dir / f"{name}.json").read_text()) == state[name] != {}
    assert [p.name for p in out_dir.parent.iterdir()] == ["compacted"] and "note:" not in done.stdout


def test_a_run_that_did_not_end_is_told(pruned, tmp_path, capsys):
    shutil.copytree(pruned, tmp_path / "run")
    begun = tmp_path / "run" / "config.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"max_steps": 9}))
    compact_stage.main(compact_stage.CompactSettings(checkpoint=str(tmp_path / "run"), out_dir=str(tmp_path / "compacted")))
    assert "note: this is step 6 of the 9 that the run was begun for\n" in capsys.readouterr().out
    for i, text in enumerate(('{"max_steps": "x"}', "null", "{")):  # of no weight for a cut
        begun.write_text(text)
        compact_stage.main(compact_stage.CompactSettings(checkpoint=str(tmp_path / "run"), out_dir=str(tmp_path / f"{i}")))
        assert "note:" not in capsys.readouterr().out


def test_stage_removes_the_layers_that_lose_both_blocks(data_dir, source, tmp_path):
    """head_layer and mlp each close two of four; how many layers lose both is not set beforehand."""
    cfg = prune_settings(data_dir, tmp_path / "run", source, **dict.fromkeys(TARGET) | dict(target_n_layers=2), max_steps=2,
                         pruning_modules=("head_layer", "mlp"))
    prune.main(cfg)
    checkpoint = tmp_path / "run" / "step_0000002"
    state = load_file(checkpoint / "masks.safetensors")
    state["log_alpha.head_layer"], state["log_alpha.mlp"] = torch.tensor([4.0, 4, 0, 0]), torch.tensor([4.0, 0, 0, 4])
    save_file(state, checkpoint / "masks.safetensors")
    (checkpoint / "manifest.json").unlink()
    compact_stage.main(compact_stage.CompactSettings(checkpoint=str(checkpoint), out_dir=str(tmp_path / "out")))
    assert read_model_config(tmp_path / "out", ModelConfig) == tiny_config(n_layers=3)  # layer 2 went
    l0 = load_weights(L0(dict.fromkeys(("head_layer", "mlp"), ((4,), 2))), checkpoint / "masks.safetensors")
    with torch.no_grad():
        masked = load_weights(Transformer(tiny_config()), checkpoint)(random_tokens(tiny_config()), masks=l0.deterministic())
    close(logits(tmp_path / "out", random_tokens(tiny_config())), masked)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "phi3", "olmo2"])
def test_a_family_from_nothing_to_transformers(family, data_dir, tmp_path, capsys):
    """Fresh weights of a shape, a score for its units, masks, the cut and its check, and an export that is compared."""
    shape = TINY | SHAPES[family]
    pretrain.main(pretrain_settings(data_dir, tmp_path / "fresh", "", init_from="", shape=shape, max_steps=2))
    source = tmp_path / "fresh" / "step_0000002"
    shutil.rmtree(source / "assets")  # its tokenizer is none
    (source / "manifest.json").unlink()
    target = TARGET | dict(target_hidden_size=16, target_n_heads=2, target_n_kv_heads=2)  # 8 a head, as GPT-NeoX needs
    cfg = prune_settings(data_dir, tmp_path / "run", source, max_steps=2, **target)
    prune.main(cfg)
    compact_stage.main(compact_stage.CompactSettings(checkpoint=str(tmp_path / "run"), out_dir=str(tmp_path / "cut")))
    shutil.rmtree(tmp_path / "cut" / "assets")
    convert.main(convert.ConvertSettings(to_hf=str(tmp_path / "cut"), out_dir=str(tmp_path / "hf"), verify=True))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == family
    assert "verify: largest difference" in capsys.readouterr().out
    scores = importance.magnitude_scores(load_weights(Transformer(ModelConfig(**shape)), source), mask_sets(
        *prune.shapes(cfg)[:2]))
    assert all(s.isfinite().all() for s in scores.values())


def damaged(pruned: Path, tmp_path: Path, how: str) -> Path:
    folder = tmp_path / "step_0000006"
    shutil.copytree(pruned / "step_0000006", folder)
    if how == "masks cut short":
        data = (folder / "masks.safetensors").read_bytes()
        (folder / "masks.safetensors").write_bytes(data[:-4])
    elif how == "weights of another shape":
        (folder / "model_config.json").write_text(tiny_config(intermediate_size=47).to_json())
    elif how == "a target of its own":
        (folder / "target_config.json").write_text(tiny_config(hidden_size=33).to_json())
    else:
        (folder / how).unlink()
    return folder


@pytest.mark.parametrize("how", ["masks.safetensors", "model.safetensors", "model_config.json", "target_config.json",
                                 "state.json", "masks cut short", "weights of another shape", "a target of its own"])
def test_stage_refuses_what_is_no_checkpoint_and_leaves_nothing(pruned, tmp_path, how):
    folder, out_dir = damaged(pruned, tmp_path, how), tmp_path / "out" / "compacted"
    with pytest.raises(UserError):
        compact_stage.main(compact_stage.CompactSettings(checkpoint=str(folder), out_dir=str(out_dir)))
    assert not list(tmp_path.rglob("compacted*"))


def test_stage_refuses_other_folders_and_an_existing_out_dir(pruned, source, tmp_path):
    for checkpoint in (source, tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"masks\.safetensors|nowhere does not exist"):
            compact_stage.main(compact_stage.CompactSettings(checkpoint=str(checkpoint), out_dir=str(tmp_path / "out")))
    with pytest.raises(UserError, match="exists already"):
        compact_stage.main(compact_stage.CompactSettings(checkpoint=str(pruned), out_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_model_with_masks_is_not_exported(pruned, tmp_path):
    with pytest.raises(UserError, match="compact"):
        convert.main(convert.ConvertSettings(to_hf=str(pruned / "step_0000006"), out_dir=str(tmp_path / "hf")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_nothing_is_written_when_a_weight_is_not_finite(pruned, tmp_path, name):
    """Neither in what is kept nor in what is cut away."""
    for at in (5, (slice(None), 7), (slice(None), 11)):  # a row, two columns
        folder = tmp_path / "step_0000006"
        shutil.copytree(pruned / "step_0000006", folder)
        weights = load_file(folder / "model.safetensors")
        weights[name][at] = float("inf")
        save_file(weights, folder / "model.safetensors")
        with pytest.raises(UserError, match=r"infinite|not finite"):
            compact_stage.main(compact_stage.CompactSettings(checkpoint=str(folder), out_dir=str(tmp_path / "out")))
        assert not list(tmp_path.glob("out*"))
        shutil.rmtree(folder)
