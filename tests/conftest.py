"""What the tests share: tiny models, tokens on disk in prepare.py's format, and stages in a process of their own.

Plain functions are imported (`from conftest import ...`); what is costly is a fixture of the session.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrain
import prune
from data import INDEX_KEYS, Sampler, sha256
from model import ModelConfig, Transformer
from run.settings import run_stage
from run.weights import write_assets, write_tensors

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("code", "play", "wiki")
TINY = dict(vocab_size=64, hidden_size=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, intermediate_size=48,
            context_length=64)
SHAPES = {  # what each family adds to TINY
    "llama": {},
    "qwen2": dict(qkv_bias=True, tie_embeddings=True),
    "qwen3": dict(qk_norm="head", head_dim=10, tie_embeddings=True),
    "gpt_neox": dict(n_kv_heads=4, norm="layer", gated_mlp=False, activation="gelu", qkv_bias=True, o_bias=True,
                     mlp_bias=True, parallel_residual=True, rotary_dims=2),
    "phi3": dict(rotary_dims=6),
    "olmo2": dict(qk_norm="all", norm_after=True),
    "all at once": dict(qk_norm="all", norm_after=True, norm="layer", qkv_bias=True, o_bias=True, mlp_bias=True,
                        activation="gelu_pytorch_tanh", rotary_dims=4, n_heads=6, n_kv_heads=3),
}
torch.set_num_threads(1)  # the models are so small that more threads only wait for each other


def tiny_config(**changes) -> ModelConfig:
    return ModelConfig(**(TINY | changes))


@torch.no_grad()
def random_model(cfg: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model in which no parameter is at its initial 0 or 1, and every one matters to the logits."""
    generator, model = torch.Generator().manual_seed(seed), Transformer(cfg).to(dtype)
    for name, p in model.named_parameters():
        noise = torch.empty(p.shape, dtype=dtype).normal_(generator=generator)
        if name.endswith("norm.weight"):
            p.copy_(1 + 0.3 * noise)
        elif p.dim() == 1:
            p.copy_(0.5 * noise)
        else:
            p.copy_(noise if "embed" in name else noise / p.shape[1] ** 0.5)
    return model


def write_model(folder: Path, tensors: dict[str, torch.Tensor], config, assets: list[Path]) -> None:
    """Fill a folder as a model folder: model.safetensors, model_config.json and assets/."""
    tensors = dict(sorted(tensors.items()))
    shapes, dtypes = ({name: getattr(t, kind) for name, t in tensors.items()} for kind in ("shape", "dtype"))
    write_tensors(folder / "model.safetensors", shapes, dtypes, tensors.__getitem__)
    write_assets(folder, config, assets)


def write_gguf(path: Path, model: torch.nn.Module, *, rope_freqs: torch.Tensor | None = None, n_parts: int = 1,
               **changes) -> None:
    """A GGUF file as llama.cpp's converter writes it: rows of Q and K permuted within each head; no tokenizer."""
    import gguf

    from tools import gguf_to_hf

    cfg, writer = model.config, gguf.GGUFWriter(path, "llama")
    meta = {"embedding_length": cfg.hidden_size, "block_count": cfg.num_hidden_layers, "vocab_size": cfg.vocab_size,
            "attention.head_count": cfg.num_attention_heads, "attention.head_count_kv": cfg.num_key_value_heads,
            "feed_forward_length": cfg.intermediate_size, "context_length": cfg.max_position_embeddings,
            "attention.key_length": cfg.head_dim, "attention.value_length": cfg.head_dim, **changes}
    for name, value in meta.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", cfg.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", cfg.rope_parameters["rope_theta"])
    top = {ours: theirs for theirs, ours in gguf_to_hf.TOP.items()}
    parts = {ours: theirs for theirs, ours in gguf_to_hf.LAYER.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        if name in top:
            writer.add_tensor(top[name], tensor.numpy())
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        part, _, kind = rest.rpartition(".")
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = cfg.num_attention_heads if "q_proj" in part else cfg.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"blk.{layer}.{parts[part]}.{kind}", tensor.contiguous().numpy())
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.numpy())
    if n_parts > 1:
        writer.add_uint16("split.count", n_parts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_tokens(cfg: ModelConfig, B: int = 2, T: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(cfg.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def soft_mask(shape: tuple[int, ...], kept: int, generator: torch.Generator) -> torch.Tensor:
    """Factors in [0.1, 1], a tenth of them exactly 1, and in every row all but `kept` of them exactly 0."""
    z = torch.empty(shape).uniform_(0.1, 1.1, generator=generator).clamp(max=1)
    rank = torch.empty(shape).uniform_(generator=generator).argsort(-1).argsort(-1)
    return torch.where(rank < kept, z, 0.0)


def write_tokens(data_dir: Path, domain: str, split: str, tokens, *, name: str = "", **changes) -> Path:
    """The two files that prepare.py writes for a domain and split, or for a shard of one (`name`).  Returns the index."""
    index = dict(format=1, domain=domain, split=split, dtype="uint16", n_tokens=len(tokens), n_documents=1,
                 n_bytes=4 * len(tokens), vocab_size=64, tokenizer="t") | changes
    path = data_dir / domain / f"{name or split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(tokens, index["dtype"]).tofile(path.with_suffix(".bin"))
    index = dict(sha256=sha256(path.with_suffix(".bin"))) | index
    assert index.keys() >= INDEX_KEYS.keys()
    path.write_text(json.dumps(index))
    return path


def text_like(n: int, seed: int, vocab_size: int = 64) -> np.ndarray:
    """Tokens that a model can learn something about: steps of 1 to 4 around a circle."""
    return np.random.default_rng(seed).integers(1, 5, n).cumsum() % vocab_size


def write_data_dir(data_dir: Path, sizes: dict[str, int], eval_size: int = 700) -> Path:
    for i, (domain, n) in enumerate(sizes.items()):
        write_tokens(data_dir, domain, "train", text_like(n, seed=i))
        write_tokens(data_dir, domain, "eval", text_like(eval_size, seed=100 + i))
    (data_dir / "tokenizer").mkdir()
    (data_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    return data_dir


@pytest.fixture(autouse=True)
def handlers():
    """A run that a test stops leaves its handlers of signals behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Three domains of 20,000 training and 700 evaluation tokens."""
    return write_data_dir(tmp_path_factory.mktemp("data"), dict.fromkeys(DOMAINS, 20_000))


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A model folder: 4 layers, 4 query heads in 2 groups."""
    folder = tmp_path_factory.mktemp("models") / "source"
    folder.mkdir()
    cfg = tiny_config()
    write_model(folder, dict(random_model(cfg).named_parameters()), cfg, [])
    return folder


@pytest.fixture(scope="session")
def letters_export(tmp_path_factory) -> Path:
    """A Hugging Face folder with random weights, whose tokenizer knows bytes, <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("letters")
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0,
                                 eos_token_id=1)).save_pretrained(folder)
    return folder


SHORT = dict(seq_len=32, global_batch_size=8, micro_batch_size=2, max_steps=6, warmup_steps=2, learning_rate=1e-3,
             eval_interval=3, eval_sequences=5, save_interval=3, device="cpu")
TARGET = dict(target_hidden_size=20, target_n_layers=3, target_n_heads=1, target_n_kv_heads=1, target_intermediate_size=30)


def prune_settings(data_dir: Path, out_dir: Path, source: Path, **changes) -> prune.PruneSettings:
    return prune.PruneSettings(**(dict(data_dir=str(data_dir), out_dir=str(out_dir), init_from=str(source),
                                       split="train", lagrangian_warmup_steps=2) | SHORT | TARGET | changes))


def pretrain_settings(data_dir: Path, out_dir: Path, source: Path, **changes) -> pretrain.PretrainSettings:
    return pretrain.PretrainSettings(**(dict(data_dir=str(data_dir), out_dir=str(out_dir), init_from=str(source),
                                             update="constant") | SHORT | changes))


@pytest.fixture(scope="session")
def pruned(tmp_path_factory, data_dir, source) -> Path:
    """out_dir of a run of prune.py, 6 steps: long enough for masks that differ, too short for them to be decided."""
    out_dir = tmp_path_factory.mktemp("runs") / "pruned"
    prune.main(prune_settings(data_dir, out_dir, source))
    return out_dir


def flags(settings) -> list[str]:
    """Settings as the flags that give them."""
    return [f"--{name}={value}" for name, value in vars(settings).items()]


def run_script(*args: str, processes: int = 1, timeout: int = 240) -> subprocess.CompletedProcess:
    """`python FILE.py ...` or `python -m tools.NAME ...` from the repository root, or torchrun of it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run([sys.executable, *launcher, *args], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env=environment | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"})


NEEDED = ["--data_dir=data", "--init_from=source"]  # settings of prune.py that have no default, but out_dir
SETTINGS = {"prepare": "PrepareSettings", "convert": "ConvertSettings", "prune": "PruneSettings",
            "compact": "CompactSettings", "pretrain": "PretrainSettings", "sample": "SampleSettings",
            "reference_loss": "ReferenceSettings", "plot": "PlotSettings", "gguf_to_hf": "GgufSettings",
            "shapes": "ShapeSettings", "evaluate": "EvaluateSettings", "finetune": "FinetuneSettings"}


def module_of(stage: str):
    """The module of a stage, at the top level, or of a tool."""
    return importlib.import_module(stage if (ROOT / f"{stage}.py").exists() else f"tools.{stage}")


def refusal(stage: str, argv: list[str], monkeypatch, capsys) -> str:
    """The stage's `__main__` in this process.  Returns its one line on stderr, without the stage's name."""
    module = module_of(stage)
    monkeypatch.setattr(sys, "argv", [f"/some/where/{stage}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run_stage(module.main, getattr(module, SETTINGS[stage]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.endswith("\n") and err.count("\n") == 1 and err.startswith(f"{stage}.py: "), err
    assert "Traceback" not in err
    return err.removeprefix(f"{stage}.py: ").strip()


def read_metrics(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


STAGES = {"prune": (prune.main, prune_settings), "pretrain": (pretrain.main, pretrain_settings)}
STEERED = dict(update="doremi", reference_loss=dict.fromkeys(DOMAINS, 3.0))
SPEED = ("tokens_per_second", "mfu")


def without_speed(out_dir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in SPEED} for line in read_metrics(out_dir)]


def train_lines(out_dir: Path) -> list[dict]:
    return [line for line in read_metrics(out_dir) if "loss" in line]


def eval_lines(out_dir: Path) -> list[dict]:
    return [line for line in read_metrics(out_dir) if "eval_loss" in line]


def same_files(a: Path, b: Path) -> None:
    names = {p.relative_to(a) for p in a.rglob("*") if p.is_file()}
    assert names == {p.relative_to(b) for p in b.rglob("*") if p.is_file()}
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def at_draw(monkeypatch, at: int, act) -> None:
    """Call act() when the batch of step `at` is drawn."""
    draw = Sampler.draw

    def acting(self, step, *args):
        if step == at:
            act()
        return draw(self, step, *args)

    monkeypatch.setattr(Sampler, "draw", acting)


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
