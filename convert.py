"""Convert a Hugging Face folder or a GGUF file to a model folder of ours, and a model folder to a Hugging Face folder.

    python convert.py --from_hf=Llama-2-7b-hf --out_dir=models/llama2_7b
    python convert.py --to_hf=out/1.3b/step_0048000 --out_dir=export/sheared_1.3b --dtype=bfloat16
    python convert.py --from_gguf=SmolLM2-135M.gguf --out_dir=models/smollm2_135m

Exact unless --dtype says otherwise, with one tensor in memory at a time and every tensor of the source accounted for.
--verify compares the logits of both sides, and what both make of some texts, before the new folder gets its name.  Other
projects' names of things are known in this file only.
"""

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
from run.hf_tokenizer import AS_IS, TEXTS, auto_differences, code_files, export_tokenizer
from run.settings import FilePath, UserError, check, read_json, require, run_stage
from run.tokenizer import holds_tokenizer, load_tokenizer
from run.weights import (DTYPE_CODES, check_names, is_finite, load_weights, new_folder, one_thread, read_model_config,
                         read_tensor, verified, write_tensors)

# What a Hugging Face folder holds beside its weights: carried along in assets/ and back.
CARRIED = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
           "tekken.json", "tiktoken.txt", "vocab.*", "merges.txt", "chat_template*", "LICENSE*", "NOTICE*")
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ROPE_KEYS = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
GGUF_CONFIG = {"embedding_length": "hidden_size", "block_count": "num_hidden_layers", "rope.freq_base": "rope_theta",
               "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
               "attention.layer_norm_rms_epsilon": "rms_norm_eps", "feed_forward_length": "intermediate_size",
               "context_length": "max_position_embeddings", "rope.dimension_count": "head_dim",
               "attention.key_length": "head_dim", "attention.value_length": "head_dim"}
GGUF_LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
              "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
GGUF_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight"}
TOLERANCE = 1e-4  # --verify: largest difference of a logit, as a share of the largest logit

Loaders = dict[str, Callable[[], Tensor]]  # name -> what reads the tensor


@dataclass(frozen=True)
class ConvertSettings:
    out_dir: FilePath  # folder to write; must not exist
    from_hf: FilePath = ""  # Hugging Face folder to read: Llama, Mistral or Qwen2, in safetensors
    from_gguf: FilePath = ""  # GGUF file to read, of architecture "llama"; its weights become float32
    to_hf: FilePath = ""  # model folder of ours, or a step_* folder, to write as a Hugging Face folder
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"  # of the weights written; source: unchanged
    shard_gb: float = 5.0  # with to_hf: a file of weights holds at most so many GB
    verify: bool = False  # compare logits and tokenizer with transformers'; on a mismatch write nothing, exit with status 1

    def __post_init__(self):
        given = [name for name in ("from_hf", "from_gguf", "to_hf") if getattr(self, name)]
        require(len(given) == 1, f"one of from_hf, from_gguf, to_hf must be given, not {' and '.join(given) or 'none'}")
        require(self.shard_gb > 0, f"shard_gb = {self.shard_gb} must be above 0")


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
            raise UserError(f"{path} cannot be read as safetensors: {error}") from None
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
    check(isinstance(kind, str) and kind in CLASSES, f"{source}: model_type = {kind!r} is not one of {', '.join(CLASSES)}")
    # transformers 5 writes rope_parameters; 4 rope_theta and rope_scaling, and its older versions type for rope_type.
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
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
    # Within a sliding window, attention is causal attention: the context ends there.  MistralConfig's default is 4096.
    window = hf.get("sliding_window", 4096) if kind == "mistral" or hf.get("use_sliding_window") else None
    bias = kind == "llama" and bool(hf.get("attention_bias"))
    try:
        return ModelConfig(
            vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], n_layers=hf["num_hidden_layers"],
            n_heads=hf["num_attention_heads"], n_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            intermediate_size=hf["intermediate_size"], norm_eps=hf["rms_norm_eps"], rope_theta=rope["rope_theta"],
            rope_scaling=None if rope["rope_type"] == "default" else {k: rope[k] for k in ROPE_KEYS if k in rope},
            context_length=min(hf["max_position_embeddings"], window or math.inf),
            tie_embeddings=bool(hf.get("tie_word_embeddings")),
            qkv_bias=kind == "qwen2" or bias, o_bias=bias,
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{source}: {error}") from None


def config_to_hf(cfg: ModelConfig, carried: dict, dtype: torch.dtype) -> dict:
    """A config.json for transformers 4 and 5: the carried one, with all that describes the model replaced."""
    kind = "mistral" if carried.get("model_type") == "mistral" else "llama"
    divides = cfg.hidden_size % cfg.n_heads == 0  # if not, transformers 5 refuses a Llama, whatever its head_dim
    if cfg.qkv_bias or cfg.o_bias:
        kind = "llama" if cfg.o_bias else "qwen2"
        check(cfg.qkv_bias and (divides or kind == "qwen2"), f"no Hugging Face class has qkv_bias = {cfg.qkv_bias}, "
              f"o_bias = {cfg.o_bias} and hidden_size / n_heads = {cfg.hidden_size} / {cfg.n_heads}")
    elif not divides:
        kind = "mistral"  # without a window the same function as Llama
    stale = ("_name_or_path", "transformers_version", "pretraining_tp", "layer_types", "max_window_layers",
             "use_sliding_window", "sliding_window", "partial_rotary_factor", "attention_bias", "mlp_bias", "auto_map")
    rope, name = cfg.rope_scaling or {"rope_type": "default"}, str(dtype).removeprefix("torch.")
    result = {k: v for k, v in carried.items() if k not in stale} | {
        "model_type": kind, "architectures": [CLASSES[kind]], "hidden_act": "silu",
        "vocab_size": cfg.vocab_size, "hidden_size": cfg.hidden_size, "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads, "num_key_value_heads": cfg.n_kv_heads, "head_dim": cfg.head_dim,
        "intermediate_size": cfg.intermediate_size, "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.context_length, "tie_word_embeddings": cfg.tie_embeddings,
        "dtype": name, "rope_parameters": rope | {"rope_theta": float(cfg.rope_theta)},  # transformers 5
        "torch_dtype": name, "rope_theta": float(cfg.rope_theta), "rope_scaling": cfg.rope_scaling,  # transformers 4
    } | {"llama": {"attention_bias": cfg.o_bias}, "mistral": {"sliding_window": None}, "qwen2": {}}[kind]
    assert config_from_hf(result, Path("config.json")) == cfg, "config.json says something else than model_config.json"
    return result


def gguf_to_hf(meta: dict, loaders: Loaders, source: Path) -> dict:
    """GGUF metadata as a config.json.  Raises UserError on what that cannot say."""
    architecture = meta.get("general.architecture")
    check(architecture == "llama", f"{source}: architecture = {architecture!r} is not supported, only 'llama'")
    hf = {name: meta[f"llama.{key}"] for key, name in GGUF_CONFIG.items() if f"llama.{key}" in meta}
    check(all(isinstance(v, (int, float)) for v in hf.values()), f"{source}: a size is not one number for all layers: {hf}")
    hf = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in hf.items()}  # float32 1e-5 is 9.9999997e-6
    sizes = {str(meta[f"llama.{k}"]) for k, name in GGUF_CONFIG.items() if name == "head_dim" and f"llama.{k}" in meta}
    check(len(sizes) < 2, f"{source}: rotary dimension, key and value length are not equal: {', '.join(sorted(sizes))}")
    kind = meta.get("llama.rope.scaling.type", "none")
    if kind != "none":
        hf["rope_scaling"] = {"rope_type": kind, "factor": meta.get("llama.rope.scaling.factor")}
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    hf |= {name: meta[k] for name, key in ids.items() if (k := f"tokenizer.ggml.{key}_token_id") in meta}
    tokens = meta.get("tokenizer.ggml.tokens")
    vocab_size = meta.get("llama.vocab_size") or (len(tokens) if isinstance(tokens, list) else None)
    return hf | {"model_type": "llama", "vocab_size": vocab_size, "tie_word_embeddings": "lm_head.weight" not in loaders,
                 "attention_bias": "model.layers.0.self_attn.q_proj.bias" in loaders}


# ---- tokenizers: the files that let transformers' AutoTokenizer read them


def write_tokenizer(folder: Path, vocab: dict, merges: list, *, special: list, add_bos: bool, names: dict, parts: dict,
                    **options) -> None:
    """tokenizer.json of a BPE tokenizer, and tokenizer_config.json."""
    from tokenizers import Tokenizer, models, processors

    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.add_special_tokens(special)
    if add_bos:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", AS_IS | names)


def tokenizer_from_gguf(meta: dict, folder: Path) -> str:
    """Write the tokenizer of GGUF metadata if it is a byte-level BPE with known splits.  Returns why not, or ""."""
    get = {name.removeprefix("tokenizer.").removeprefix("ggml."): value for name, value in meta.items()}.get
    if get("model") != "gpt2" or get("pre") not in ("smollm", "gpt-2"):
        return f"the file's is {get('model')!r} with pre-tokenizer {get('pre')!r}; neither smollm's nor gpt-2's"
    from tokenizers import decoders, pre_tokenizers

    tokens = get("tokens")
    split = [pre_tokenizers.Digits(individual_digits=True)] * (get("pre") == "smollm")
    split += [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    names = {name: tokens[i] for name, key in keys.items() if (i := get(f"{key}_token_id")) is not None}
    names |= {"chat_template": get("chat_template")} if get("chat_template") else {}
    write_tokenizer(
        folder, {token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in get("merges")],
        special=[token for token, kind in zip(tokens, get("token_type")) if kind == 3],  # 3: control
        add_bos=bool(get("add_bos_token")), names=names,
        parts={"pre_tokenizer": pre_tokenizers.Sequence(split), "decoder": decoders.ByteLevel()})
    return ""


# ---- the three directions


def from_hf(settings: ConvertSettings, folder: Path) -> None:
    """Fill `folder` as a model folder from a Hugging Face folder."""
    source = Path(settings.from_hf)
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
    if cfg.tie_embeddings and "lm_head.weight" in loaders and "model.embed_tokens.weight" in loaders:
        same = torch.equal(loaders.pop("lm_head.weight")(), loaders["model.embed_tokens.weight"]())
        check(same, f"{source}: tie_word_embeddings is true, but lm_head.weight is not the embedding; if the file is "
              "right, set it to false in config.json")
    write_weights(folder, cfg, loaders, getattr(torch, settings.dtype, dtype), source=settings.from_hf)
    (folder / "model_config.json").write_text(cfg.to_json())
    code = code_files(source)
    if code:
        print(f"carried along, and never run here: {', '.join(code)}, the code of the tokenizer")
    copy_files(source, folder / "assets", (*CARRIED, *code))


def from_gguf(settings: ConvertSettings, folder: Path) -> None:
    """Fill `folder` as a model folder from a GGUF file."""
    path = Path(settings.from_gguf)
    check(path.is_file(), f"from_gguf = {path} does not exist")
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, *args, **kwargs):
            found = super()._get(offset, dtype, count, *args, **kwargs)
            require(len(found) == count, "it ends too early")  # where the package's own reader goes on, perhaps for ever
            return found

    try:
        reader = Reader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as GGUF: {error}") from None

    def load(tensor: gguf.ReaderTensor, n_heads: int | None) -> Tensor:
        try:
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            # The rotary embedding of GGUF turns neighbouring rows of a head, (h/2, 2); ours the two halves, (2, h/2).
            return values if n_heads is None else values.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).reshape(values.shape)
        except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
            raise UserError(f"{path}: {tensor.name}: {error}") from None

    heads = {"attn_q": meta.get("llama.attention.head_count")}
    heads["attn_k"] = meta.get("llama.attention.head_count_kv", heads["attn_q"])
    loaders = {}
    for tensor in reader.tensors:
        name, parts = GGUF_TOP.get(tensor.name, tensor.name), tensor.name.split(".")
        if parts[0] == "blk" and len(parts) == 4 and parts[2] in GGUF_LAYER:
            name = f"model.layers.{parts[1]}.{GGUF_LAYER[parts[2]]}.{parts[3]}"
        loaders[name] = functools.partial(load, tensor, heads.get(parts[2]) if len(parts) > 2 else None)
    hf = gguf_to_hf(meta, loaders, path)
    cfg = config_from_hf(hf, path)
    write_weights(folder, cfg, loaders, getattr(torch, settings.dtype, torch.float32), source=settings.from_gguf)
    (folder / "model_config.json").write_text(cfg.to_json())
    (folder / "assets").mkdir()
    write_json(folder / "assets" / "config.json", config_to_hf(cfg, hf, torch.float32))
    try:
        why_not = tokenizer_from_gguf(meta, folder / "assets")
    except Exception as error:  # lists that are none or do not fit together; tokenizers' own errors are no more than that
        raise UserError(f"{path}: its tokenizer is damaged: {type(error).__name__}: {error}") from None
    if why_not:
        print(f"no tokenizer written: {why_not}; put the model's tokenizer files into {settings.out_dir}/assets")


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
    config = config_to_hf(cfg, carried, dtype)
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
    path, options = settings.from_hf or folder, {}
    if settings.from_gguf:
        path, options = Path(settings.from_gguf).parent, {"gguf_file": Path(settings.from_gguf).name}
    theirs = logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)).logits  # (B, T, V)
    with torch.device("meta"):  # no time goes into weights that are about to be replaced
        model = Transformer(cfg)
    ours = logits(load_weights(model.to_empty(device="cpu"), settings.to_hf or folder))
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"verify: largest difference {difference:.2e} of logits up to {scale:.3g}, on {tokens.numel()} tokens")
    if not difference <= TOLERANCE * scale:
        print(f"convert.py: logits differ by more than {TOLERANCE} of the largest; nothing written", file=sys.stderr)
        sys.exit(1)


def verify_tokenizer(settings: ConvertSettings, folder: Path) -> None:
    """Hold AutoTokenizer on the Hugging Face folder against our own reader.  Exits with status 1 if an export differs."""
    ours, theirs = (Path(settings.to_hf), folder) if settings.to_hf else (folder, Path(settings.from_hf))
    try:
        found = auto_differences(load_tokenizer(ours / "assets"), theirs)
    except UserError as error:
        return print(f"verify: no tokenizer was compared: {error}")
    if not found:
        return print(f"verify: AutoTokenizer does the same on {len(TEXTS)} texts")
    print(f"verify: AutoTokenizer on {theirs} differs from run/tokenizer.py: " + "; ".join(found[:3])
          + f"; {len(found)} differences in all", file=sys.stderr)
    if settings.to_hf:
        print("convert.py: an export's tokenizer must be the model's own; nothing written", file=sys.stderr)
        sys.exit(1)
    print("note: text is tokenized here as the tokenizer's own file says, and an export will do the same", file=sys.stderr)


def main(settings: ConvertSettings) -> None:
    needed = ["gguf", "tokenizers"] * bool(settings.from_gguf) + ["transformers"] * settings.verify
    needed += ["accelerate"] * (settings.verify and bool(settings.from_gguf))  # transformers reads GGUF through it
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    check(not missing, f"this needs packages that are not installed; pip install {' '.join(missing)}")
    with new_folder(settings.out_dir) as folder:
        with one_thread():
            (from_hf if settings.from_hf else from_gguf if settings.from_gguf else to_hf)(settings, folder)
        if settings.verify:
            verify(settings, folder)
            if not settings.from_gguf:
                verify_tokenizer(settings, folder)
    print(f"wrote {settings.out_dir}")


if __name__ == "__main__":
    run_stage(main, ConvertSettings)
