"""Convert a Hugging Face folder to a model folder of ours, and a model folder to a Hugging Face folder.

    python convert.py --from_hf=Llama-2-7b-hf --out_dir=models/llama2-7b
    python convert.py --to_hf=out/pretrain_1.3b --out_dir=export/1.3b --dtype=bfloat16

Exact unless --dtype says otherwise, with one tensor in memory at a time (of those fused, the parts) and each accounted for.
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
BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")  # the last two, GPT-NeoX: the causal mask
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
TOLERANCE = 1e-4  # --verify: largest difference of a logit, as a share of the largest logit

Loaders = dict[str, Callable[[], Tensor]]  # name -> what reads the tensor

# Field of ModelConfig -> its name in a config.json, unless the family has another; None: it has none, and one value.
KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "intermediate_size": "intermediate_size", "norm_eps": "rms_norm_eps", "activation": "hidden_act",
    "context_length": "max_position_embeddings", "tie_embeddings": "tie_word_embeddings",
    "rope_theta": "rope_theta", "rotary_dims": None,  # as a share of head_dim
}
REQUIRED = ("vocab_size", "hidden_size", "n_layers", "n_heads", "intermediate_size", "context_length", "norm_eps")
ATTENTION_BIAS = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}


@dataclass(frozen=True)
class Family:
    """What tells one model_type from another: all that is known of it here."""

    architecture: str  # transformers' class
    keys: dict = dataclasses.field(default_factory=dict)  # as KEYS, what is more or other there
    fixed: dict = dataclasses.field(default_factory=dict)  # fields of ModelConfig in which it is not what our default says
    defaults: dict = dataclasses.field(default_factory=dict)  # of its config class, for names that config.json may lack
    modules: dict = dataclasses.field(default_factory=dict)  # our name -> its; several of ours in one lie there in our order
    by_head: bool = False  # they lie there head by head, not one behind the other
    any_width: bool = True  # hidden_size need not divide by the heads
    scaling: bool = True  # of rotary embeddings; False: only the plain ones
    window: str | None = None  # what turns its sliding_window on, "" if nothing has to; None: it has none


FAMILIES = {  # in the order in which an export looks for one that can hold it
    "llama": Family("LlamaForCausalLM", ATTENTION_BIAS | {"mlp_bias": "mlp_bias"}, any_width=False),
    "mistral": Family("MistralForCausalLM", defaults={"num_key_value_heads": 8, "sliding_window": 4096}, window=""),
    "qwen2": Family("Qwen2ForCausalLM", fixed={"qkv_bias": True}, window="use_sliding_window",
                    defaults={"num_key_value_heads": 32, "sliding_window": 4096}),
    "qwen3": Family("Qwen3ForCausalLM", ATTENTION_BIAS, {"qk_norm": "head"}, window="use_sliding_window",
                    defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096}),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        ATTENTION_BIAS | {"n_kv_heads": None, "head_dim": None, "norm_eps": "layer_norm_eps", "rotary_dims": "rotary_pct",
                          "rope_theta": "rotary_emb_base", "parallel_residual": "use_parallel_residual"},
        {"norm": "layer", "gated_mlp": False, "mlp_bias": True}, any_width=False, by_head=True,
        defaults={"hidden_act": "gelu", "attention_bias": True, "use_parallel_residual": True, "rotary_pct": 0.25},
        modules={"model.embed_tokens": "gpt_neox.embed_in", "model.layers": "gpt_neox.layers", "lm_head": "embed_out",
                 "model.norm": "gpt_neox.final_layer_norm", "self_attn.o_proj": "attention.dense",
                 **{f"self_attn.{x}_proj": "attention.query_key_value" for x in "qkv"},
                 "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h"}),
    "phi3": Family("Phi3ForCausalLM", {"rotary_dims": "partial_rotary_factor"}, scaling=False, window="",
                   modules={**{f"self_attn.{x}_proj": "self_attn.qkv_proj" for x in "qkv"},
                            "mlp.gate_proj": "mlp.gate_up_proj", "mlp.up_proj": "mlp.gate_up_proj"}),
    "olmo2": Family("Olmo2ForCausalLM", ATTENTION_BIAS, {"qk_norm": "all", "norm_after": True},
                    modules={"input_layernorm": "post_attention_layernorm",
                             "post_attention_layernorm": "post_feedforward_layernorm"}),
}
REFUSED = {  # model_type, or rope_type -> why model.py does not compute it
    "gemma": "its embedding is scaled by a width that pruning changes",
    "gemma2": "four norms a layer, soft caps on scores and logits, local layers",
    **dict.fromkeys(("gemma3", "gemma3_text"), "four norms a layer, local layers with another rotary base"),
    "mixtral": "experts", "qwen3_moe": "experts", "olmo": "norms without weights",
    "phi": "one norm for both blocks of a layer", "longrope": "frequencies that change with the length of a text",
}
STALE = {  # of a carried config: what another shape or class makes wrong
    "_name_or_path", "transformers_version", "pretraining_tp", "layer_types", "max_window_layers", "use_sliding_window",
    "sliding_window", "auto_map", "partial_rotary_factor", "original_max_position_embeddings",
    *(name for family in FAMILIES.values() for name in (KEYS | family.keys).values() if name)}


@dataclass(frozen=True)
class ConvertSettings:
    out_dir: FilePath  # folder to write; must not exist
    from_hf: FilePath = ""  # Hugging Face folder to read, of one of FAMILIES, in safetensors
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
                    if name.endswith(BUFFERS):
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
        print(f"left out {left_out} buffers (inv_freq, causal masks): they follow from the config")
    return loaders, functools.reduce(torch.promote_types, dtypes, torch.bool)  # bool gives way to any


def write_weights(folder: Path, shapes: dict[str, torch.Size], loaders: Loaders, dtype: torch.dtype, *, source: str,
                  max_gb: float = math.inf) -> None:
    """model.safetensors, or shards of at most max_gb and their index, of exactly the tensors of these shapes."""
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


def their_name(name: str, family: Family) -> str:
    """Of a tensor of ours: model.layers.3.self_attn.o_proj.weight -> gpt_neox.layers.3.attention.dense.weight."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{family.modules.get(module, module)}.{kind}"
    i, part = module.removeprefix("model.layers.").split(".", 1)
    return f"{family.modules.get('model.layers', 'model.layers')}.{i}.{family.modules.get(part, part)}.{kind}"


def split(read: Callable[[], Tensor], j: int, rows: list[int], heads: int | None, name: str) -> Tensor:
    """The j-th of the matrices, or biases, that lie in one of theirs.  rows: of each; heads: see `fuse`."""
    fused = read()
    check(fused.shape[:1] == (sum(rows),), f"{name} has shape {tuple(fused.shape)}, the config calls for {sum(rows)} rows")
    parts = fused.split(rows) if heads is None else [
        part.flatten(0, 1) for part in fused.unflatten(0, (heads, len(rows), -1)).unbind(1)]
    return parts[j].contiguous()


def fuse(reads: list[Callable[[], Tensor]], shapes: list[torch.Size], heads: int | None, name: str) -> Tensor:
    """Several in one, one behind the other, or with `heads` the first head of each, then the second..."""
    parts = [read() for read in reads]
    check([p.shape for p in parts] == shapes, f"what goes into {name} has the shapes {[tuple(p.shape) for p in parts]}, but "
          f"the config calls for {[tuple(s) for s in shapes]}")
    return torch.cat(parts) if heads is None else torch.stack([p.unflatten(0, (heads, -1)) for p in parts], 1).flatten(0, 2)


def translate(cfg: ModelConfig, family: Family, loaders: Loaders, source: str, *,
              to_ours: bool) -> tuple[dict[str, torch.Size], Loaders]:
    """Shapes of our tensors and what reads them, from what reads theirs; or the other way.  Raises UserError."""
    shapes, theirs = parameter_shapes(cfg), {}  # name of each tensor of theirs -> names of ours that lie in it, in order
    for name in shapes:
        theirs.setdefault(their_name(name, family), []).append(name)
    check_names(source, loaders.keys(), theirs.keys() if to_ours else shapes.keys())
    found, heads = {}, cfg.n_heads if family.by_head else None
    for name, ours in theirs.items():
        sizes, rows, where = [shapes[n] for n in ours], [shapes[n][0] for n in ours], f"{source}: {name}"
        if len(ours) == 1:
            found |= {ours[0]: loaders[name]} if to_ours else {name: loaders[ours[0]]}
        elif to_ours:
            found |= {n: functools.partial(split, loaders[name], j, rows, heads, where) for j, n in enumerate(ours)}
        else:
            found[name] = functools.partial(fuse, [loaders[n] for n in ours], sizes, heads, where)
    if not to_ours:
        shapes = {name: torch.Size([sum(shapes[n][0] for n in ours), *shapes[ours[0]][1:]]) for name, ours in theirs.items()}
    return shapes, found


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_files(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    folder.mkdir(exist_ok=True)
    for path in {p for pattern in patterns for p in source.glob(pattern) if p.is_file()}:
        shutil.copyfile(path, folder / path.name)


# ---- configs


def config_from_hf(hf: dict, source: Path) -> ModelConfig:
    """The shape that a config.json describes.  Raises UserError on what our model does not compute."""
    def why(value: object) -> str:
        return f" ({REFUSED[value]})" if isinstance(value, str) and value in REFUSED else ""

    kind = hf.get("model_type")
    check(isinstance(kind, str) and kind in FAMILIES, f"{source}: model_type = {kind!r} is not one of "
          f"{', '.join(FAMILIES)}{why(kind)}; README.md, 'Model families', tells more")
    family, keys = FAMILIES[kind], KEYS | FAMILIES[kind].keys
    hf = family.defaults | hf
    missing = [keys[field] for field in REQUIRED if hf.get(keys[field]) is None]
    check(not missing, f"{source}: no value for {', '.join(missing)}")
    # transformers 5 writes rope_parameters; 4 rope_theta and rope_scaling, and its older versions type for rope_type.
    # Where both are, rope_scaling counts, and nothing of the other.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    check(isinstance(rope, dict), f"{source}: the rotary parameters {rope!r} are not an object")
    share = keys["rotary_dims"] or "partial_rotary_factor"
    rope = {"rope_theta": hf.get(keys["rope_theta"]) or 10000.0, "rope_type": rope.get("type", "default"),
            "partial_rotary_factor": hf.get(share, 1.0)} | rope
    more = {"mlp_bias": "mlp_bias" in keys, "partial_rotary_factor": keys["rotary_dims"], "rope_type": family.scaling}
    for name, value in (("quantization_config", None), ("mlp_bias", False), ("partial_rotary_factor", 1.0),
                        ("rope_type", "default")):
        got = (hf | rope).get(name)
        allowed = more.get(name) or got in (None, value)
        check(allowed, f"{source}: {name} = {got!r}{why(got)} is not supported, only {value!r}")
    # Within a sliding window, attention is causal attention: the context ends there.
    windowed = family.window is not None and (family.window == "" or hf.get(family.window))
    values = {field: hf[name] for field, name in keys.items() if name and hf.get(name) is not None} | family.fixed
    try:
        values = {"n_kv_heads": values["n_heads"], "head_dim": values["hidden_size"] // values["n_heads"]} | values
        turned = int(values["head_dim"] * (1.0 if rope["partial_rotary_factor"] is None else rope["partial_rotary_factor"]))
        return ModelConfig(**values | dict(
            rope_theta=rope["rope_theta"], rotary_dims=None if turned == values["head_dim"] else turned,
            rope_scaling=None if rope["rope_type"] == "default" else {k: rope[k] for k in ROPE_KEYS if k in rope},
            context_length=min(values["context_length"], (windowed and hf.get("sliding_window")) or math.inf)))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{source}: {error}") from None


def as_family(cfg: ModelConfig, kind: str, carried: dict, dtype: torch.dtype) -> dict:
    """A config.json of this family for transformers 4 and 5: the carried one, with all that describes the model replaced."""
    family, keys = FAMILIES[kind], KEYS | FAMILIES[kind].keys
    rope, theta = cfg.rope_scaling or {"rope_type": "default"}, float(cfg.rope_theta)
    name = str(dtype).removeprefix("torch.")
    result = {k: v for k, v in carried.items() if k not in STALE} | {
        "model_type": kind, "architectures": [family.architecture],
        **{key: getattr(cfg, field) for field, key in keys.items() if key},
        "dtype": name, "rope_parameters": rope | {"rope_theta": theta},  # transformers 5
        "torch_dtype": name, keys["rope_theta"]: theta, "rope_scaling": cfg.rope_scaling,  # transformers 4
    } | ({} if family.window is None else {"sliding_window": None})
    if keys["rotary_dims"]:
        share = 1.0 if cfg.rotary_dims is None else cfg.rotary_dims / cfg.head_dim
        if int(cfg.head_dim * share) != (cfg.rotary_dims or cfg.head_dim):  # rounded down
            share = math.nextafter(share, 1)
        result[keys["rotary_dims"]] = result["rope_parameters"]["partial_rotary_factor"] = share
    return result


def config_to_hf(cfg: ModelConfig, carried: dict, dtype: torch.dtype) -> dict:
    """The config.json of the carried one's family, or the first that can hold the model: its config reads as the model's."""
    other, own = {}, str(carried.get("model_type"))  # family -> in how many fields that no config sets, and what is other
    for kind in sorted(FAMILIES, key=lambda kind: kind != own):
        result, family = as_family(cfg, kind, carried, dtype), FAMILIES[kind]
        found = [f"hidden_size = {cfg.hidden_size} must divide by n_heads = {cfg.n_heads}"
                 ] * (not family.any_width and cfg.hidden_size % cfg.n_heads != 0)
        try:
            back = config_from_hf(result, Path("config.json"))
            found += [f"{f.name} = {theirs}, not {ours}" for f in dataclasses.fields(cfg)
                      if (theirs := getattr(back, f.name)) != (ours := getattr(cfg, f.name))]
        except UserError as error:
            found.append(str(error))
        if not found:
            return result
        other[kind] = sum(getattr(cfg, f.name) != family.fixed.get(f.name, f.default) for f in dataclasses.fields(cfg)
                          if f.name not in KEYS | family.keys), "; ".join(found)
    nearest = min(other, key=lambda kind: other[kind][0])
    raise UserError("no class of transformers can hold this model; the nearest is "
                    f"{FAMILIES[nearest].architecture}: {other[nearest][1]}")


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
    family = FAMILIES[hf["model_type"]]
    head_name, embedding = (their_name(name, family) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if cfg.tie_embeddings and head_name in loaders:
        head = loaders.pop(head_name)
        same = torch.equal(head(), loaders.setdefault(embedding, head)())  # either name will do
        check(same, f"{source}: tie_word_embeddings is true, but {head_name} is not the embedding; if the file is "
              "right, set it to false in config.json")
    shapes, loaders = translate(cfg, family, loaders, settings.from_hf, to_ours=True)
    write_weights(folder, shapes, loaders, getattr(torch, settings.dtype, dtype), source=settings.from_hf)
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
    carried, path = source / "assets" / "config.json", folder / "config.json"
    unknown = {f"{kind}_token_id": None for kind in ("bos", "eos", "pad")}  # or transformers takes some numbers
    carried = read_json(carried) if carried.is_file() else unknown
    check(isinstance(carried, dict), f"{source / 'assets' / path.name} is not a JSON object; mend or remove it")
    config = config_to_hf(dataclasses.replace(cfg, context_length=trained_context(settings, cfg)), carried, dtype)
    with verified(source):
        shapes, loaders = translate(cfg, FAMILIES[config["model_type"]], loaders, settings.to_hf, to_ours=False)
        write_weights(folder, shapes, loaders, dtype, source=settings.to_hf, max_gb=settings.shard_gb)
    copy_files(source / "assets", folder, ("*",))
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
