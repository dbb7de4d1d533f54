"""Convert a Hugging Face folder to a model folder of ours, and a model folder to a Hugging Face folder.

    python convert.py --from_hf=Llama-2-7b-hf --out_dir=models/llama2_7b
    python convert.py --to_hf=out/1.3b/step_0048000 --out_dir=export/sheared_1.3b --dtype=bfloat16

Exact unless --dtype says otherwise, with one tensor in memory at a time and every tensor of the source accounted for.
--verify compares the logits of both sides, and what both make of some texts, before the new folder gets its name.  Hugging
Face's names of things are known in this file only.  Of a GGUF file, tools/gguf_to_hf.py makes a Hugging Face folder first.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from model import ModelConfig, Transformer, parameter_shapes
from run.hf_tokenizer import code_files, export_tokenizer, verify_tokenizer
from run.settings import FilePath, UserError, check, hub_snapshot, read_json, require, run_stage
from run.tokenizer import holds_tokenizer, load_tokenizer
from run.weights import (DTYPE_CODES, check_names, is_finite, load_weights, new_folder, newest_in, no_safetensors,
                         one_thread, read_model_config, read_tensor, verified, write_tensors)

# What a Hugging Face folder holds beside its weights: carried along in assets/ and back.
CARRIED = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
           "tekken.json", "tiktoken.txt", "vocab.*", "merges.txt", "chat_template*", "LICENSE*", "NOTICE*")
ROPE_KEYS = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
TOLERANCE = 1e-4  # --verify: largest difference of a logit, as a share of the largest logit

Loaders = dict[str, Callable[[], Tensor]]  # name -> what reads the tensor


@dataclass(frozen=True)
class Family:
    """What tells one model_type from another: all that is known of it here."""

    architecture: str  # transformers' class
    defaults: dict  # what its config class takes for a name that config.json does not have (a null is none)
    biases: tuple[tuple[bool, bool], ...]  # what it can be of (qkv_bias, o_bias); of two, attention_bias chooses the second
    any_width: bool = True  # hidden_size need not divide by the heads
    window: str | None = None  # what turns its sliding_window on, "" if nothing has to; None: it has none
    written: dict = dataclasses.field(default_factory=dict)  # in an export's config; a str: the value of that field of ours


FAMILIES = {  # in the order in which an export looks for one that can hold it
    "llama": Family("LlamaForCausalLM", {}, ((False, False), (True, True)), any_width=False,
                    written={"attention_bias": "o_bias"}),
    "mistral": Family("MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}, ((False, False),), window="",
                      written={"sliding_window": None}),
    "qwen2": Family("Qwen2ForCausalLM", {"num_key_value_heads": 32, "sliding_window": 4096}, ((True, False),),
                    window="use_sliding_window"),
}


@dataclass(frozen=True)
class ConvertSettings:
    out_dir: FilePath  # folder to write; must not exist
    from_hf: FilePath = ""  # Hugging Face folder to read: Llama, Mistral or Qwen2, in safetensors
    to_hf: FilePath = ""  # model folder, step_* folder or a run's for its newest, to write as a Hugging Face folder
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"  # of the weights written; source: unchanged
    shard_gb: float = 5.0  # with to_hf: a file of weights holds at most so many GB
    context_length: int = 0  # with to_hf: max_position_embeddings; 0: seq_len of its run, else what the model says
    verify: bool = False  # compare logits and tokenizer with transformers'; on a mismatch write nothing, exit with status 1

    def __post_init__(self):
        require(bool(self.from_hf) != bool(self.to_hf), "one of from_hf and to_hf must be given, not "
                + ("both" if self.from_hf else "none"))
        require(self.shard_gb > 0, f"shard_gb = {self.shard_gb} must be above 0")
        require(self.context_length >= 0, f"context_length = {self.context_length} must not be negative")


# ---- tensors, one at a time


def open_safetensors(paths: list[Path]) -> tuple[Loaders, torch.dtype]:
    """The tensors of safetensors files, none of them read yet, and the dtype that holds all of them exactly."""

    loaders, dtypes, left_out = {}, set(), 0
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.endswith("rotary_emb.inv_freq"):
                        left_out += 1
                        continue
                    code = file.get_slice(name).get_dtype()
                    check(code in DTYPES, f"{path}: {name} holds {code} numbers, not {', '.join(DTYPES)}; "
                          "take a checkpoint that is not quantised")
                    dtypes.add(DTYPES[code])
                    loaders[name] = functools.partial(read_tensor, path, name)
        except (SafetensorError, OSError) as error:
            raise no_safetensors(path, error) from None
    if left_out:
        print(f"left out {left_out} rotary_emb.inv_freq buffers: they follow from the config")
    return loaders, functools.reduce(torch.promote_types, dtypes, torch.bool)  # bool gives way to any


def write_weights(folder: Path, cfg: ModelConfig, loaders: Loaders, dtype: torch.dtype, *, source: str,
                  max_gb: float = math.inf) -> None:
    """model.safetensors, or shards of at most max_gb and their index.  The loaders must be exactly the model's tensors."""
    shapes = parameter_shapes(cfg)
    check_names(source, loaders.keys(), shapes.keys())
    nbytes = {name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = [[]]
    for name in shapes:
        if shards[-1] and sum(nbytes[n] for n in shards[-1]) + nbytes[name] > max_gb * 1e9:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    bar = tqdm(total=sum(nbytes.values()), unit="B", unit_scale=True, disable=None)

    def load(name: str) -> Tensor:
        tensor = loaders[name]().to(dtype)
        check(tensor.shape == shapes[name], f"{source}: {name} has shape {tuple(tensor.shape)}, but the config calls for "
              f"{tuple(shapes[name])}")
        check(is_finite(tensor), f"{source}: {name} holds NaN or infinite values (as {dtype})")
        bar.update(nbytes[name])
        return tensor

    for filename, names in zip(files, shards):
        write_tensors(folder / filename, {n: shapes[n] for n in names}, dict.fromkeys(names, dtype), load)
    bar.close()
    if len(files) > 1:
        places = {name: filename for filename, names in zip(files, shards) for name in names}
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": places})


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_files(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    folder.mkdir(exist_ok=True)
    for path in {p for pattern in patterns for p in source.glob(pattern) if p.is_file()}:
        shutil.copyfile(path, folder / path.name)


# ---- configs


def config_from_hf(hf: dict, source: Path) -> ModelConfig:
    """The shape that a config.json describes.  Raises UserError on what our model does not compute."""
    kind = hf.get("model_type")
    check(isinstance(kind, str) and kind in FAMILIES, f"{source}: model_type = {kind!r} is not one of "
          f"{', '.join(FAMILIES)}; README.md, 'How to change it', says where another family goes")
    family = FAMILIES[kind]
    hf = family.defaults | hf
    # transformers 5 writes rope_parameters; 4 rope_theta and rope_scaling, and its older versions type for rope_type.
    # Where both are, rope_scaling counts, and nothing of the other.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    check(isinstance(rope, dict), f"{source}: the rotary parameters {rope!r} are not an object")
    rope = {"rope_theta": hf.get("rope_theta") or 10000.0, "rope_type": rope.get("type", "default")} | rope
    only = {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None, "partial_rotary_factor": 1.0}
    for name, value in only.items():
        got = (rope | hf).get(name)
        check(got in (None, value), f"{source}: {name} = {got!r} is not supported, only {value!r}")
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "max_position_embeddings", "rms_norm_eps")
    missing = [name for name in needed if hf.get(name) is None]
    check(not missing, f"{source}: no value for {', '.join(missing)}")
    # Within a sliding window, attention is causal attention: the context ends there.
    windowed = family.window is not None and (family.window == "" or hf.get(family.window))
    qkv_bias, o_bias = family.biases[bool(hf.get("attention_bias")) and len(family.biases) > 1]
    try:
        return ModelConfig(
            vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], n_layers=hf["num_hidden_layers"],
            n_heads=hf["num_attention_heads"], n_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            intermediate_size=hf["intermediate_size"], norm_eps=hf["rms_norm_eps"], rope_theta=rope["rope_theta"],
            rope_scaling=None if rope["rope_type"] == "default" else {k: rope[k] for k in ROPE_KEYS if k in rope},
            context_length=min(hf["max_position_embeddings"], (windowed and hf.get("sliding_window")) or math.inf),
            tie_embeddings=bool(hf.get("tie_word_embeddings")), qkv_bias=qkv_bias, o_bias=o_bias,
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{source}: {error}") from None


def config_to_hf(cfg: ModelConfig, carried: dict, dtype: torch.dtype) -> dict:
    """A config.json for transformers 4 and 5: the carried one, with all that describes the model replaced."""
    divides = cfg.hidden_size % cfg.n_heads == 0  # if not, transformers 5 refuses a Llama, whatever its head_dim
    order = [name for name in (carried.get("model_type"), *FAMILIES) if isinstance(name, str) and name in FAMILIES]
    kind = next((name for name in order if (cfg.qkv_bias, cfg.o_bias) in FAMILIES[name].biases
                 and (divides or FAMILIES[name].any_width)), None)
    check(kind is not None, f"no Hugging Face class has qkv_bias = {cfg.qkv_bias}, o_bias = {cfg.o_bias} and hidden_size / "
          f"n_heads = {cfg.hidden_size} / {cfg.n_heads}")
    stale = ("_name_or_path", "transformers_version", "pretraining_tp", "layer_types", "max_window_layers",
             "use_sliding_window", "sliding_window", "partial_rotary_factor", "attention_bias", "mlp_bias", "auto_map")
    rope, name = cfg.rope_scaling or {"rope_type": "default"}, str(dtype).removeprefix("torch.")
    result = {k: v for k, v in carried.items() if k not in stale} | {
        "model_type": kind, "architectures": [FAMILIES[kind].architecture], "hidden_act": "silu",
        "vocab_size": cfg.vocab_size, "hidden_size": cfg.hidden_size, "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads, "num_key_value_heads": cfg.n_kv_heads, "head_dim": cfg.head_dim,
        "intermediate_size": cfg.intermediate_size, "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.context_length, "tie_word_embeddings": cfg.tie_embeddings,
        "dtype": name, "rope_parameters": rope | {"rope_theta": float(cfg.rope_theta)},  # transformers 5
        "torch_dtype": name, "rope_theta": float(cfg.rope_theta), "rope_scaling": cfg.rope_scaling,  # transformers 4
    } | {name: getattr(cfg, value) if isinstance(value, str) else value for name, value in FAMILIES[kind].written.items()}
    assert config_from_hf(result, Path("config.json")) == cfg, "config.json says something else than model_config.json"
    return result


# ---- the two directions


def from_hf(settings: ConvertSettings, folder: Path) -> None:
    """Fill `folder` as a model folder from a Hugging Face folder."""
    source = Path(settings.from_hf)
    check(source.suffix != ".gguf", f"from_hf = {source} is a GGUF file; make a Hugging Face folder of it first: "
          f"python -m tools.gguf_to_hf --gguf={source} --out_dir=...")
    check(source.is_dir(), f"from_hf = {source} is not a folder; fetch a model of the Hub first: hf download NAME")
    hf = read_json(source / "config.json")
    check(isinstance(hf, dict), f"{source / 'config.json'} is not a JSON object")
    cfg = config_from_hf(hf, source / "config.json")
    single, index = source / "model.safetensors", source / "model.safetensors.index.json"
    check(single.is_file() or index.is_file(), f"{source} has neither {single.name} nor {index.name}; others, such as "
          "pytorch_model.bin, are pickles and never read: have transformers save it as safetensors")
    files = [single.name]
    if not single.is_file():
        places = read_json(index)
        places = places.get("weight_map") if isinstance(places, dict) else None
        check(isinstance(places, dict) and {*map(type, places.values())} == {str}, f"{index} has no weight_map to files")
        files = sorted(set(places.values()))
    missing = sorted(set(files) - {path.name for path in source.iterdir()})
    check(not missing, f"{source} lacks the shards {', '.join(missing)} that {index.name} names")
    loaders, dtype = open_safetensors([source / file for file in files])
    if cfg.tie_embeddings and "lm_head.weight" in loaders:
        head = loaders.pop("lm_head.weight")
        same = torch.equal(head(), loaders.setdefault("model.embed_tokens.weight", head)())  # either name will do
        check(same, f"{source}: tie_word_embeddings is true, but lm_head.weight is not the embedding; if the file is "
              "right, set it to false in config.json")
    write_weights(folder, cfg, loaders, getattr(torch, settings.dtype, dtype), source=settings.from_hf)
    (folder / "model_config.json").write_text(cfg.to_json())
    code = code_files(source)
    if code:
        print(f"carried along, and never run here: {', '.join(code)}, the code of the tokenizer")
    copy_files(source, folder / "assets", (*CARRIED, *code))


def trained_context(settings: ConvertSettings, cfg: ModelConfig) -> int:
    """max_position_embeddings of an export: as asked for, or as its run trained, which is said, or the model's own."""
    run = Path(settings.to_hf).resolve().parent / "config.json"
    if settings.context_length:
        return settings.context_length
    if not (Path(settings.to_hf) / "state.json").exists() or not run.is_file():
        return cfg.context_length
    values = read_json(run)
    length = values.get("seq_len") if isinstance(values, dict) else None
    check(type(length) is int and length > 0, f"{run} has no seq_len, by which the model was trained; give --context_length")
    print(f"max_position_embeddings is {length}, the seq_len of {run.parent}; --context_length for another")
    return length


def to_hf(settings: ConvertSettings, folder: Path) -> None:
    """Fill `folder` as a Hugging Face folder from a model folder."""
    source = Path(settings.to_hf)
    cfg = read_model_config(source, ModelConfig)
    check(not (source / "masks.safetensors").exists(), f"{source} holds masks, and no Hugging Face model has any; "
          "run compact.py first")
    loaders, dtype = open_safetensors([source / "model.safetensors"])
    dtype = getattr(torch, settings.dtype, dtype)  # "source" is no name of torch's
    with verified(source):
        write_weights(folder, cfg, loaders, dtype, source=settings.to_hf, max_gb=settings.shard_gb)
    copy_files(source / "assets", folder, ("*",))
    path, unknown = folder / "config.json", {"bos_token_id": None, "eos_token_id": None}  # or transformers takes 1 and 2
    carried = read_json(path) if path.is_file() else unknown
    check(isinstance(carried, dict), f"{source / 'assets' / path.name} is not a JSON object; mend or remove it")
    config = config_to_hf(dataclasses.replace(cfg, context_length=trained_context(settings, cfg)), carried, dtype)
    try:
        check(holds_tokenizer(source / "assets"), f"{source / 'assets'} holds none")
        tokenizer = load_tokenizer(source / "assets")
        bare = not (folder / "tokenizer_config.json").is_file()
        export_tokenizer(folder, tokenizer, config["model_type"])
        config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if bare else {}
    except UserError as error:
        print(f"no tokenizer was written, only such files as there are copied: {error}")
    write_json(path, config)


@torch.no_grad()
def verify(settings: ConvertSettings, folder: Path) -> None:
    """Compare the logits of both sides in float32.  Exits with status 1 if they differ by more than TOLERANCE."""
    from transformers import AutoModelForCausalLM

    def logits(model: torch.nn.Module) -> Tensor:
        for p in model.parameters() if settings.dtype != "source" else ():
            p.copy_(p.to(getattr(torch, settings.dtype)))  # what --dtype did to one side only
        return model.eval()(tokens)

    cfg = read_model_config(settings.to_hf or folder, ModelConfig)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.vocab_size, (2, min(64, cfg.context_length)), generator=generator)  # (B, T)
    theirs = AutoModelForCausalLM.from_pretrained(settings.from_hf or folder, dtype=torch.float32)
    theirs = logits(theirs).logits  # (B, T, V)
    with torch.device("meta"):  # no time goes into weights that are about to be replaced
        model = Transformer(cfg)
    ours = logits(load_weights(model.to_empty(device="cpu"), settings.to_hf or folder))
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"verify: largest difference {difference:.2e} of logits up to {scale:.3g}, on {tokens.numel()} tokens")
    if not difference <= TOLERANCE * scale:
        print(f"convert.py: logits differ by more than {TOLERANCE} of the largest; nothing written", file=sys.stderr)
        sys.exit(1)


def main(settings: ConvertSettings) -> None:
    check(not settings.verify or importlib.util.find_spec("transformers") is not None, "--verify compares with "
          "transformers, which is not installed; pip install transformers")
    settings = dataclasses.replace(settings, from_hf=settings.from_hf and str(hub_snapshot(settings.from_hf)),
                                   to_hf=settings.to_hf and str(newest_in(settings.to_hf)))
    with new_folder(settings.out_dir) as folder:
        with one_thread():
            (from_hf if settings.from_hf else to_hf)(settings, folder)
        if settings.verify:
            verify(settings, folder)
            ours, theirs = (settings.to_hf, folder) if settings.to_hf else (folder, settings.from_hf)
            verify_tokenizer(Path(ours) / "assets", Path(theirs), is_export=settings.to_hf != "")
    print(f"wrote {settings.out_dir}")


if __name__ == "__main__":
    run_stage(main, ConvertSettings)
