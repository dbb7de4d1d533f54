"""Conversion is exact in both directions, transformers agrees on the logits, and what cannot be converted is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import pretrain_settings, prune_settings, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig,
                          LlamaForCausalLM, MistralConfig, MistralForCausalLM, Olmo2Config, Olmo2ForCausalLM, Phi3Config,
                          Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

import convert
import pretrain
import prune
from model import ModelConfig, Transformer
from run import hf_tokenizer
from run.settings import UserError
from run.tokenizer import load_tokenizer
from run.weights import load_weights, read_model_config

ROOT = Path(convert.__file__).parent
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
SMALL = dict(vocab_size=131, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
             intermediate_size=80, max_position_embeddings=64)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "grouped": (LlamaForCausalLM, LlamaConfig, dict(num_key_value_heads=2, rms_norm_eps=1e-5)),
    "tied": (LlamaForCausalLM, LlamaConfig, dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "biased": (LlamaForCausalLM, LlamaConfig, dict(attention_bias=True)),
    "linear": (LlamaForCausalLM, LlamaConfig, dict(rope_parameters={"rope_type": "linear", "factor": 4.0,
                                                                   "rope_theta": 5e4})),
    "llama3": (LlamaForCausalLM, LlamaConfig, dict(rope_parameters={**LLAMA3, "rope_theta": 5e5})),
    "wide_heads": (LlamaForCausalLM, LlamaConfig, dict(head_dim=20)),
    "mistral": (MistralForCausalLM, MistralConfig, dict(num_key_value_heads=2, sliding_window=32)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "mlp_bias": (LlamaForCausalLM, LlamaConfig, dict(mlp_bias=True, hidden_act="gelu_pytorch_tanh")),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(num_key_value_heads=2, head_dim=20, tie_word_embeddings=True)),
    "qwen3 biased": (Qwen3ForCausalLM, Qwen3Config, dict(head_dim=8, attention_bias=True)),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, dict(rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 2e4})),
    "gpt_neox one by one": (GPTNeoXForCausalLM, GPTNeoXConfig, dict(
        use_parallel_residual=False, tie_word_embeddings=True, attention_bias=False, hidden_act="gelu_new",
        rope_parameters={"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0})),
    "phi3": (Phi3ForCausalLM, Phi3Config, dict(num_key_value_heads=2, pad_token_id=None)),
    "phi4": (Phi3ForCausalLM, Phi3Config, dict(pad_token_id=None, tie_word_embeddings=True, rope_parameters={
        "partial_rotary_factor": 0.84})),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, dict()),
    "olmo2 grouped": (Olmo2ForCausalLM, Olmo2Config, dict(num_key_value_heads=2, attention_bias=True, hidden_act="gelu")),
}


def their_model(family: str) -> torch.nn.Module:
    """A random model of transformers with every parameter away from its initial 0 or 1."""
    model_class, config_class, changes = FAMILIES[family]
    model = model_class(config_class(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape).normal_(0, 0.15, generator=generator))
    return model.eval()


def tokens(n: int = 24) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (2, n), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def our_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return load_weights(Transformer(read_model_config(folder, ModelConfig)), folder)(ids)


@torch.no_grad()
def their_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


def run(**settings) -> None:
    convert.main(convert.ConvertSettings(**{k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}))


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_to_ours_and_back(family, tmp_path):
    model = their_model(family)
    model.save_pretrained(tmp_path / "hf")
    run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours")
    run(to_hf=tmp_path / "ours", out_dir=tmp_path / "back")
    with torch.no_grad():
        want = model(tokens()).logits
    torch.testing.assert_close(our_logits(tmp_path / "ours", tokens()), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(their_logits(tmp_path / "back", tokens()), want)
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("hf", "ours", "back")]
    assert same_tensors(tensors[0], tensors[2])
    kind = convert.FAMILIES[model.config.model_type]
    assert kind.modules or same_tensors(tensors[0], tensors[1])  # what has our names is the same to the bit
    assert sum(t.numel() for t in tensors[0].values()) == read_model_config(tmp_path / "ours", ModelConfig).n_params()
    assert (tmp_path / "back" / "generation_config.json").read_text() == (
        tmp_path / "hf" / "generation_config.json").read_text()
    first, last = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    assert first["architectures"] == last["architectures"] and first["model_type"] == last["model_type"]


@pytest.mark.parametrize("family, changes", [
    ("linear", dict(rope_theta=5e4, rope_scaling={"type": "linear", "factor": 4.0})),
    ("llama3", dict(rope_theta=5e5, rope_scaling=LLAMA3)),
    ("llama", dict(rope_scaling=None, num_key_value_heads=None)),  # of transformers 4.30
    ("gpt_neox", dict(rotary_pct=0.5, rotary_emb_base=20000)),  # as Pythia's
    ("phi4", dict(partial_rotary_factor=0.84, rope_scaling=None, rope_theta=10000.0)),
])
def test_configs_of_transformers_4(family, changes, tmp_path):
    model = their_model(family)
    model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["rope_parameters"]
    config.pop("head_dim", None)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changes))
    run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(our_logits(tmp_path / "ours", tokens()), model(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes, architecture", [
    (dict(), "LlamaForCausalLM"),
    (dict(head_dim=6, rope_theta=2e4, context_length=99, tie_embeddings=True), "LlamaForCausalLM"),
    (dict(n_heads=6, n_kv_heads=3, hidden_size=40), "MistralForCausalLM"),  # transformers 5 refuses it as a Llama
    (dict(n_heads=6, n_kv_heads=3, hidden_size=40, qkv_bias=True), "Qwen2ForCausalLM"),
    (dict(qkv_bias=True, o_bias=True, rope_scaling=LLAMA3), "LlamaForCausalLM"),
])
def test_ours_to_hugging_face_and_back(changes, architecture, tmp_path):
    cfg = ModelConfig(**(dict(vocab_size=131, hidden_size=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16,
                              intermediate_size=56, context_length=64) | changes))
    model, generator = Transformer(cfg), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.1, 0.3, generator=generator)
        want = model(tokens())
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", dict(model.named_parameters()), cfg, [])
    run(to_hf=tmp_path / "ours", out_dir=tmp_path / "hf")
    run(from_hf=tmp_path / "hf", out_dir=tmp_path / "again")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [architecture]
    torch.testing.assert_close(their_logits(tmp_path / "hf", tokens()), want, rtol=1e-4, atol=1e-4)
    assert read_model_config(tmp_path / "again", ModelConfig) == cfg
    assert same_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again")))


def test_a_changed_shape_replaces_the_carried_one(tmp_path):
    their_model("qwen2").save_pretrained(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", bos_token_id=7, layer_types=["full_attention"] * 3, pretraining_tp=2)
    run(from_hf=tmp_path / "hf", out_dir=tmp_path / "source")
    cfg = ModelConfig(vocab_size=131, hidden_size=24, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=12,
                      intermediate_size=40, context_length=48, norm_eps=1e-6, tie_embeddings=True, qkv_bias=True)
    model = Transformer(cfg)
    (tmp_path / "small").mkdir()
    write_model(tmp_path / "small", dict(model.named_parameters()), cfg, [tmp_path / "source" / "assets"])
    run(to_hf=tmp_path / "small", out_dir=tmp_path / "export", verify=True)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "export").config
    assert (config.num_hidden_layers, config.head_dim, len(config.layer_types), config.bos_token_id) == (2, 12, 2, 7)
    assert config.max_position_embeddings == 48 and config.sliding_window is None


def test_shards_dtypes_and_left_out_buffers(tmp_path, capsys):
    model = their_model("grouped").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2
    save_file(load_file(shards[0]) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, shards[0])
    run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours", verify=True)
    assert "left out 1 buffers (inv_freq" in capsys.readouterr().out
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert same_tensors(ours, model.state_dict())
    run(to_hf=tmp_path / "ours", out_dir=tmp_path / "back", shard_gb=3e-5, verify=True)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in (tmp_path / "back").glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    assert same_tensors(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").state_dict())
    run(to_hf=tmp_path / "ours", out_dir=tmp_path / "half", dtype="float16", verify=True)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[name], ours[name].half()) for name in ours)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_buffers_of_pythia_are_left_out_and_a_wrong_fused_one_is_refused(tmp_path, capsys):
    their_model("gpt_neox").save_pretrained(tmp_path / "hf")
    put(tmp_path / "hf", "gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 8, 8, dtype=torch.bool))
    put(tmp_path / "hf", "gpt_neox.layers.0.attention.masked_bias", torch.tensor(-1e9))
    run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours", verify=True)
    assert "left out 2 buffers" in capsys.readouterr().out
    put(tmp_path / "hf", "gpt_neox.layers.1.attention.query_key_value.weight", torch.ones(140, 48))
    with pytest.raises(UserError, match=r"layers.1.attention.query_key_value.weight has shape \(140, 48\), .* for 144 rows"):
        run(from_hf=tmp_path / "hf", out_dir=tmp_path / "again")
    put(tmp_path / "ours", "model.layers.1.self_attn.k_proj.weight", torch.ones(47, 48))
    with pytest.raises(UserError, match=r"query_key_value.weight has the shapes \[\(48, 48\), \(47, 48\), .* for "):
        run(to_hf=tmp_path / "ours", out_dir=tmp_path / "again")


@pytest.mark.parametrize("changes, message", [
    (dict(head_dim=10, norm="layer", gated_mlp=False, mlp_bias=True), "nearest is GPTNeoXForCausalLM: head_dim = 8, not 10"),
    (dict(qk_norm="all", norm_after=True, mlp_bias=True), "nearest is Olmo2ForCausalLM: mlp_bias = False, not True"),
    (dict(o_bias=True), "nearest is LlamaForCausalLM: qkv_bias = True, not False"),
])
def test_what_no_class_holds_is_refused(changes, message, tmp_path):
    cfg = ModelConfig(**(dict(vocab_size=131, hidden_size=32, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=8,
                              intermediate_size=56) | changes))
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", dict(Transformer(cfg).named_parameters()), cfg, [])
    with pytest.raises(UserError, match=message) as error:
        run(to_hf=tmp_path / "ours", out_dir=tmp_path / "hf")
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_mistral_context_ends_at_its_window(tmp_path):
    their_model("mistral").save_pretrained(tmp_path / "hf")
    run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours")
    assert read_model_config(tmp_path / "ours", ModelConfig).context_length == 32
    ids = tokens(32)
    torch.testing.assert_close(our_logits(tmp_path / "ours", ids), their_logits(tmp_path / "hf", ids), rtol=1e-4, atol=1e-4)


def rename(folder: Path, old: str, new: str | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(old)
    save_file(tensors | ({new: tensor} if new else {}), folder / "model.safetensors")


def put(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(folder / "model.safetensors") | {name: tensor}, folder / "model.safetensors")


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
REFUSED = {  # what was done to the source folder -> what the message says
    "no config": (lambda f: (f / "config.json").unlink(), "cannot read"),
    "not json": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "model_type": (lambda f: edit_json(f / "config.json", model_type="gpt2"), "model_type = 'gpt2' is not one of.*README"),
    "gemma": (lambda f: edit_json(f / "config.json", model_type="gemma2"), "olmo2 .four norms .*'Model families'"),
    "hidden_act": (lambda f: edit_json(f / "config.json", hidden_act="mish"), "activation = 'mish' is not one of silu"),
    "mlp_bias": (lambda f: edit_json(f / "config.json", model_type="mistral", mlp_bias=True), "mlp_bias = True is not supp"),
    "longrope": (lambda f: edit_json(f / "config.json", model_type="phi3", rope_scaling={"type": "longrope"}),
                 "'longrope' .frequencies that change with the length of a text. is not supported, only 'default'"),
    "rope": (lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0}), "yarn"),
    "partial": (lambda f: edit_json(f / "config.json", partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    "fp8": (lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "fp8"}), "quantization_config"),
    "no value": (lambda f: edit_json(f / "config.json", hidden_size=None), "no value for hidden_size"),
    "bad value": (lambda f: edit_json(f / "config.json", num_hidden_layers="three"), "n_layers = 'three'"),
    "heads": (lambda f: edit_json(f / "config.json", num_key_value_heads=3), "n_heads = 4 does not divide"),
    "only bin": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickles"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"nothing"), "cannot be read as safetensors"),
    "missing": (lambda f: rename(f, NORM, None), r"missing tensors \['model.norm.weight'\] \(1\), unexpected tensors \[\]"),
    "unexpected": (lambda f: put(f, "model.extra", torch.ones(2)), r"unexpected tensors \['model.extra'\]"),
    "renamed": (lambda f: rename(f, NORM, "norm.weight"), r"\['model.norm.weight'\].*\['norm.weight'\]"),
    "shape": (lambda f: put(f, NORM, torch.ones(47)), r"model.norm.weight has shape \(47,\), but .* \(48,\)"),
    "nan": (lambda f: put(f, NORM, torch.full((48,), torch.nan)), "NaN"),
    "integers": (lambda f: put(f, NORM, torch.ones(48, dtype=torch.int8)), "holds I8 numbers"),
    "tied": (lambda f: put(f, "lm_head.weight", torch.ones(131, 48)), "lm_head.weight is not the embedding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    their_model("tied").save_pretrained(tmp_path / "hf")
    damage, message = REFUSED[case]
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=message) as error:
        run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_lm_head_in_a_tied_file_is_left_out_if_equal(tmp_path):
    their_model("tied").save_pretrained(tmp_path / "hf")
    put(tmp_path / "hf", "lm_head.weight", load_file(tmp_path / "hf" / "model.safetensors")[EMBEDDING])
    run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours", verify=True)


def test_a_tied_file_may_hold_the_head_only(tmp_path):
    their_model("tied").save_pretrained(tmp_path / "hf")
    rename(tmp_path / "hf", EMBEDDING, "lm_head.weight")
    run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours", verify=True)  # transformers reads it so too
    head = load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(load_file(tmp_path / "ours" / "model.safetensors")[EMBEDDING], head)


def test_a_hub_caches_folder(tmp_path, capsys):
    root = tmp_path / "models--x--y"
    their_model("llama").save_pretrained(root / "snapshots" / "0123abc")
    run(from_hf=root, out_dir=tmp_path / "ours", verify=True)
    assert "models--x--y is a Hub cache's folder: taking its snapshot 0123abc" in capsys.readouterr().out
    (root / "snapshots" / "4567def").mkdir()
    with pytest.raises(UserError, match=r"2 snapshots; give one of .*0123abc, .*4567def"):
        run(from_hf=root, out_dir=tmp_path / "again")


def test_a_run_is_exported_with_the_context_that_it_trained(tmp_path, data_dir, source, capsys):
    """source: of 64 tokens; the run trains sequences of 32."""
    pretrain.main(pretrain_settings(data_dir, tmp_path / "run", source))
    run(to_hf=tmp_path / "run", out_dir=tmp_path / "a", verify=True)
    out = capsys.readouterr().out
    assert "taking its newest checkpoint, step_0000006" in out and "max_position_embeddings is 32, the seq_len of" in out
    run(to_hf=tmp_path / "run" / "step_0000003", out_dir=tmp_path / "b", context_length=48)
    run(to_hf=source, out_dir=tmp_path / "c")
    lengths = [json.loads((tmp_path / n / "config.json").read_text())["max_position_embeddings"] for n in "abc"]
    assert lengths == [32, 48, 64]
    newest = load_file(tmp_path / "run" / "step_0000006" / "model.safetensors")
    assert same_tensors(load_file(tmp_path / "a" / "model.safetensors"), newest)
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run" / "step_0000006" / "assets")  # its tokenizer is none
    (tmp_path / "run" / "step_0000006" / "manifest.json").unlink()
    pretrain.main(pretrain_settings(data_dir, tmp_path / "next", tmp_path / "run", max_steps=2))
    assert "/run is a run's folder: taking its newest checkpoint, step_0000006" in capsys.readouterr().out
    assert json.loads((tmp_path / "next" / "config.json").read_text())["init_from"].endswith("/run/step_0000006")
    prune.main(prune_settings(data_dir, tmp_path / "pruned", tmp_path / "run", max_steps=2))
    assert "taking its newest checkpoint, step_0000006" in capsys.readouterr().out


def test_refused_shard_masks_and_overwriting(tmp_path):
    their_model("llama").save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    last = sorted((tmp_path / "hf").glob("*.safetensors"))[-1]
    last.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"lacks the shards {last.name}"):
        run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours")
    (tmp_path / "elsewhere").rename(last)
    run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours")
    with pytest.raises(UserError, match="exists already"):
        run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours")
    (tmp_path / "ours" / "masks.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"run compact\.py"):
        run(to_hf=tmp_path / "ours", out_dir=tmp_path / "export")
    (tmp_path / "ours" / "masks.safetensors").unlink()
    with pytest.raises(UserError, match="NaN or infinite values"):  # 1e5 is beyond float16
        put(tmp_path / "ours", NORM, torch.full((48,), 1e5))
        run(to_hf=tmp_path / "ours", out_dir=tmp_path / "export", dtype="float16")
    assert not (tmp_path / "export").exists() and not (tmp_path / "export.tmp").exists()


@pytest.mark.parametrize("flags, message", [
    (["--from_hf=nowhere"], "convert.py: from_hf = nowhere is not a folder"),
    (["--from_hf=a.gguf"], "convert.py: from_hf = a.gguf is a GGUF file; make a Hugging Face folder of it first"),
    (["--to_hf=nowhere"], "convert.py: model folder nowhere does not exist"),
    ([], "convert.py: one of from_hf and to_hf must be given, not none"),
])
def test_command_line(flags, message, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "convert.py", *flags, f"--out_dir={tmp_path / 'x'}"], text=True,
                          capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith(message)


def test_verify_catches_a_wrong_conversion(tmp_path, monkeypatch):
    their_model("grouped").save_pretrained(tmp_path / "hf")
    right = convert.config_from_hf

    def wrong(hf: dict, source: Path) -> ModelConfig:
        hf["rope_parameters"]["rope_theta"] = 9000.0
        return right(hf, source)

    monkeypatch.setattr(convert, "config_from_hf", wrong)
    with pytest.raises(SystemExit) as error:
        run(from_hf=tmp_path / "hf", out_dir=tmp_path / "ours", verify=True)
    assert error.value.code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizer_is_the_same_in_transformers(prefix, tmp_path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    assets = tmp_path / "ours" / "assets"
    assets.mkdir(parents=True)
    text = "\n".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    (tmp_path / "text").write_text(text)
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(assets / "tokenizer"), vocab_size=600, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, add_dummy_prefix=prefix, minloglevel=2)
    cfg = ModelConfig(vocab_size=600, hidden_size=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8,
                      intermediate_size=24)
    write_model(tmp_path / "ours", dict(Transformer(cfg).named_parameters()), cfg, [])
    run(to_hf=tmp_path / "ours", out_dir=tmp_path / "export")
    sp = SentencePieceProcessor(model_file=str(assets / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    for sample in [*text.split("\n\n"), "", " ", "  1234 x  y", "\t\u00e9\ufb01\u2603\n\n", "a\n    b"]:
        ids = tokenizer.encode(sample, add_special_tokens=False)
        assert ids == sp.encode(sample)
        assert tokenizer.decode(ids) == sample
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id == sp.bos_id()
    assert load_tokenizer(assets).fingerprint == load_tokenizer(tmp_path / "export").fingerprint
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (sp.bos_id(), sp.eos_id())


def tokenizer_of_ours(folder: Path) -> Path:
    """A SentencePiece tokenizer, as prepare.py trains them."""
    from sentencepiece import SentencePieceTrainer

    text = "\n".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    SentencePieceTrainer.train(sentence_iterator=iter(text.split("\n")), model_prefix=str(folder / "tokenizer"),
                               vocab_size=400, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                               remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)
    return folder


def test_verify_holds_the_tokenizers_against_each_other(tmp_path, monkeypatch, capsys):
    """transformers takes Qwen2Tokenizer for this class of model, whatever tokenizer_config.json says."""
    cfg = ModelConfig(vocab_size=400, hidden_size=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, intermediate_size=24,
                      qkv_bias=True)
    (tmp_path / "ours" / "assets").mkdir(parents=True)
    write_model(tmp_path / "ours", dict(Transformer(cfg).named_parameters()), cfg, [])
    run(to_hf=tmp_path / "ours", out_dir=tmp_path / "bare", verify=True)
    assert capsys.readouterr().out.count("no tokenizer") == 2
    tokenizer_of_ours(tmp_path / "ours" / "assets")
    run(to_hf=tmp_path / "ours", out_dir=tmp_path / "export", verify=True)
    assert "verify: AutoTokenizer does the same on " in capsys.readouterr().out
    code = "def main(argv):\n    return"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.decode(tokenizer.encode(code), skip_special_tokens=True) == code
    run(from_hf=tmp_path / "export", out_dir=tmp_path / "again", verify=True)
    out = capsys.readouterr().out
    assert "carried along, and never run here: tokenization_as_is.py" in out and "AutoTokenizer does the same" in out
    run(to_hf=tmp_path / "again", out_dir=tmp_path / "second", verify=True)
    edit_json(tmp_path / "export" / "tokenizer_config.json", auto_map={})
    run(from_hf=tmp_path / "export", out_dir=tmp_path / "third", verify=True)  # of the source it is only said
    assert ": Qwen2Tokenizer: " in capsys.readouterr().err
    monkeypatch.setattr(hf_tokenizer, "as_built", lambda content, model_type: True)
    with pytest.raises(SystemExit) as error:
        run(to_hf=tmp_path / "ours", out_dir=tmp_path / "wrong", verify=True)
    assert error.value.code == 1 and not (tmp_path / "wrong").exists()
    assert "Qwen2Tokenizer: 'def f(x)" in capsys.readouterr().err


CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
           "gpt_neox": GPTNeoXConfig, "phi3": Phi3Config, "olmo2": Olmo2Config}
SIZES = {"num_key_value_heads": [1, 2, 8, None], "head_dim": [8, None], "rms_norm_eps": [1e-5, 1e-6],
         "layer_norm_eps": [1e-5, 1e-6], "hidden_act": ["silu", "gelu", "gelu_new", "mish"], "mlp_bias": [True, False],
         "tie_word_embeddings": [True, False], "sliding_window": [16, None], "use_sliding_window": [True, False],
         "attention_bias": [True, False], "use_parallel_residual": [True, False], "rope_theta": [5e5, 1e4],
         "rotary_emb_base": [3e4], "rotary_pct": [0.5, 1.0, 0.25], "partial_rotary_factor": [0.5, 1.0],
         "max_window_layers": [0],
         "rope_parameters": [{"rope_type": "default", "rope_theta": 7e4}, {"rope_type": "linear", "factor": 2.0}, None,
                             {"rope_type": "default", "partial_rotary_factor": 0.75}],
         "rope_scaling": [{"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 3.0}, None,
                          {**LLAMA3, "rope_theta": 3e4}]}


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.fixed_dictionaries({}, optional={name: st.sampled_from(choices) for name, choices in SIZES.items()}))
def test_a_config_means_what_transformers_reads_in_it(family, values):
    """With names that are there, null, or left to the family's default; two sources of one fact included."""
    written = {"model_type": family, "vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 2,
               "num_attention_heads": 16, "intermediate_size": 48, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
               "layer_norm_eps": 1e-6} | values
    try:
        ours = convert.config_from_hf(written, Path("config.json"))
    except UserError as error:
        assert "\n" not in str(error)
        return
    try:
        theirs = CONFIGS[family].from_dict(json.loads(json.dumps(written)))
    except StrictDataclassFieldValidationError:  # a null that it does not take, where ours goes by the heads
        assert None in (values.get("head_dim", 0), values.get("num_key_value_heads", 0))
        return
    rope, neox, width = theirs.rope_parameters, family == "gpt_neox", theirs.hidden_size // theirs.num_attention_heads
    assert ours.n_heads == theirs.num_attention_heads and ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.n_kv_heads == (ours.n_heads if neox else theirs.num_key_value_heads)
    assert ours.norm_eps == (theirs.layer_norm_eps if neox else theirs.rms_norm_eps)
    assert ours.head_dim == (width if neox else getattr(theirs, "head_dim", None) or width)
    assert ours.rope_theta == rope["rope_theta"]
    assert (ours.rotary_dims or ours.head_dim) == int(ours.head_dim * (rope.get("partial_rotary_factor") or 1))
    assert (ours.rope_scaling or {"rope_type": "default"}) == {k: v for k, v in rope.items() if k in convert.ROPE_KEYS}
    window = theirs.sliding_window if convert.FAMILIES[family].window is not None else None
    assert ours.context_length == min(64, window or 64)
    assert ours.activation == theirs.hidden_act
    biased = bool(theirs.attention_bias) if family in ("llama", "qwen3", "gpt_neox", "olmo2") else False
    assert (ours.o_bias, ours.qkv_bias) == (biased, biased or family == "qwen2")
    assert ours.mlp_bias == (neox or (family == "llama" and theirs.mlp_bias))
    assert ours.parallel_residual == (neox and theirs.use_parallel_residual)
    try:
        back = convert.config_to_hf(ours, written, torch.float32)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert convert.config_from_hf(back, Path("config.json")) == ours
    assert back["model_type"] == family or (family, back["model_type"]) == ("llama", "mistral")


def test_the_readme_has_a_row_and_a_test_for_every_family():
    rows = (ROOT / "README.md").read_text().split("## Model families")[1].split("\n## ")[0].splitlines()
    named = {name for row in rows if row.startswith("| ") for name in re.findall(r"`([^`]+)`", row.rsplit("|", 2)[1])}
    refused = {name.removeprefix("test_refused[").rstrip("]") for name in named if name.startswith("test_refused[")}
    works = {name for name in named if not name.startswith("test_")}
    assert works <= FAMILIES.keys() and refused <= REFUSED.keys() and {"gemma", "longrope"} <= refused
    assert {FAMILIES[name][1].model_type for name in works} == set(convert.FAMILIES)
