"""Make a plain Hugging Face folder of a GGUF file of the Llama family: weights in float32, config.json and tokenizer.

    python -m tools.gguf_to_hf --gguf=SmolLM2-135M.gguf --out_dir=models/smollm2-135m-hf
    python convert.py --from_hf=models/smollm2-135m-hf --out_dir=models/smollm2-135m

GGUF's names of things are known in this file only.  Its rows of Q and K are permuted for a rotary embedding of neighbouring
pairs, which is undone; of its tokenizers those with known splits are written, and of others it is said that they are not.
"""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convert import Loaders, config_from_hf, config_to_hf, write_json, write_weights
from model import parameter_shapes, rope_frequencies
from run.hf_tokenizer import AS_IS
from run.settings import FilePath, UserError, check, require, run_stage
from run.weights import new_folder, one_thread

CONFIG = {"embedding_length": "hidden_size", "block_count": "num_hidden_layers", "rope.freq_base": "rope_theta",
               "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
               "attention.layer_norm_rms_epsilon": "rms_norm_eps", "feed_forward_length": "intermediate_size",
               "context_length": "max_position_embeddings", "rope.dimension_count": "head_dim",
               "attention.key_length": "head_dim", "attention.value_length": "head_dim"}
LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
              "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight"}


@dataclass(frozen=True)
class GgufSettings:
    gguf: FilePath  # GGUF file to read, of architecture "llama"
    out_dir: FilePath  # Hugging Face folder to write; must not exist


def open_gguf(path: Path) -> tuple[dict, Loaders]:
    """Metadata and tensors of a file, none of them read yet, under Hugging Face's names.  Raises UserError."""
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

    n_parts = meta.get("split.count") or 1
    check(n_parts == 1, f"{path} is one of {n_parts} parts of a GGUF file; make one of them first: llama-gguf-split --merge")
    heads = {"attn_q": meta.get("llama.attention.head_count")}
    heads["attn_k"] = meta.get("llama.attention.head_count_kv", heads["attn_q"])
    loaders = {}
    for tensor in reader.tensors:
        name, parts = TOP.get(tensor.name, tensor.name), tensor.name.split(".")
        if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER:
            name = f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
        loaders[name] = functools.partial(load, tensor, heads.get(parts[2]) if len(parts) > 2 else None)
    return meta, loaders


def config_of(meta: dict, loaders: Loaders, source: Path) -> dict:
    """GGUF metadata as a config.json.  Raises UserError on what that cannot say."""
    architecture = meta.get("general.architecture")
    check(architecture == "llama", f"{source}: architecture = {architecture!r} is not supported, only 'llama'")
    hf = {name: meta[f"llama.{key}"] for key, name in CONFIG.items() if f"llama.{key}" in meta}
    check(all(isinstance(v, (int, float)) for v in hf.values()), f"{source}: a size is not one number for all layers: {hf}")
    hf = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in hf.items()}  # float32 1e-5 is 9.9999997e-6
    sizes = {str(meta[f"llama.{k}"]) for k, name in CONFIG.items() if name == "head_dim" and f"llama.{k}" in meta}
    check(len(sizes) < 2, f"{source}: rotary dimension, key and value length are not equal: {', '.join(sorted(sizes))}")
    kind = meta.get("llama.rope.scaling.type", "none")
    if kind != "none":
        hf["rope_scaling"] = {"rope_type": kind, "factor": meta.get("llama.rope.scaling.factor")}
    if "rope_freqs.weight" in loaders:
        hf["rope_scaling"] = llama3_scaling(loaders.pop("rope_freqs.weight")(), hf, source)
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    hf |= {name: meta[k] for name, key in ids.items() if (k := f"tokenizer.ggml.{key}_token_id") in meta}
    tokens = meta.get("tokenizer.ggml.tokens")
    vocab_size = meta.get("llama.vocab_size") or (len(tokens) if isinstance(tokens, list) else None)
    return hf | {"model_type": "llama", "vocab_size": vocab_size, "tie_word_embeddings": "lm_head.weight" not in loaders,
                 "attention_bias": "model.layers.0.self_attn.q_proj.bias" in loaders}


def llama3_scaling(factors: Tensor, hf: dict, source: Path) -> dict:
    """The rope_scaling behind rope_freqs.weight [h/2], what each frequency is divided by.  Raises UserError if none fits."""
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # of every Llama 3.1 to 3.3
    head_dim, theta = 2 * len(factors), hf.get("rope_theta", 10000.0)
    plain, scaled = (rope_frequencies(head_dim, theta, s, torch.device("cpu")) for s in (None, scaling))
    check(torch.allclose(plain / scaled, factors.float(), rtol=1e-3), f"{source}: rope_freqs.weight is not the scaling of "
          f"Llama 3 by {scaling['factor']:g} over {scaling['original_max_position_embeddings']} positions")
    return scaling


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


def main(settings: GgufSettings) -> None:
    path = Path(settings.gguf)
    missing = [package for package in ("gguf", "tokenizers") if importlib.util.find_spec(package) is None]
    check(not missing, f"this needs packages that are not installed; pip install {' '.join(missing)}")
    check(path.is_file(), f"gguf = {path} does not exist")
    with new_folder(settings.out_dir) as folder, one_thread():
        meta, loaders = open_gguf(path)
        hf = config_of(meta, loaders, path)
        cfg = config_from_hf(hf, path)
        write_weights(folder, parameter_shapes(cfg), loaders, torch.float32, source=settings.gguf)
        write_json(folder / "config.json", config_to_hf(cfg, hf, torch.float32))
        try:
            why_not = tokenizer_from_gguf(meta, folder)
        except Exception as error:  # lists that are none or do not fit together; tokenizers' own errors say no more
            raise UserError(f"{path}: its tokenizer is damaged: {type(error).__name__}: {error}") from None
        if why_not:
            print(f"no tokenizer written: {why_not}; put the model's tokenizer files into {settings.out_dir}")
    print(f"wrote {settings.out_dir}")


if __name__ == "__main__":
    run_stage(main, GgufSettings)
