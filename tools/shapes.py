"""Target shapes of about a size for a source model, with the flags of prune.py that ask for them.

    python -m tools.shapes --target_params=1.3e9 models/llama2-7b
    python -m tools.shapes --target_params=4e9 --tensor_parallel=8 Meta-Llama-3-8B    # of a Hugging Face folder

First published shapes of the source's family (those of the same heads, which pruning can reach), then the source's
proportions, then deep ones (all its layers), wide ones (fewer layers) and depth alone.  Speed is that of training by the
FLOPs a token, as --plan counts them; the KV cache is in bf16.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from convert import config_from_hf, config_to_hf
from l0 import mask_sets
from model import ModelConfig
from run.cost import PRODUCTS
from run.metrics import PEAK_FLOPS
from run.settings import FilePath, UserError, check, read_json, require, run_stage
from run.weights import newest_in, read_model_config

# family -> name -> hidden size, layers, query heads, KV heads, MLP units, head dim, as their configs have them
PUBLISHED = {
    "Llama 2": {"Llama-2-13B": (5120, 40, 40, 40, 13824, 128), "Llama-2-7B": (4096, 32, 32, 32, 11008, 128),
                "Sheared-LLaMA-2.7B": (2560, 32, 20, 20, 6912, 128), "Sheared-LLaMA-1.3B": (2048, 24, 16, 16, 5504, 128),
                "Sheared-LLaMA-370M": (1024, 24, 8, 8, 2816, 128)},
    "Llama 3": {"Llama-3-8B": (4096, 32, 32, 8, 14336, 128), "Llama-3.1-Minitron-4B-Width": (3072, 32, 32, 8, 9216, 128),
                "Llama-3.1-Minitron-4B-Depth": (4096, 16, 32, 8, 14336, 128), "Llama-3.2-3B": (3072, 28, 24, 8, 8192, 128)},
    "Qwen2.5": {"Qwen2.5-7B": (3584, 28, 28, 4, 18944, 128), "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 128),
                "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 128), "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 64)},
    "Qwen3": {"Qwen3-8B": (4096, 36, 32, 8, 12288, 128), "Qwen3-4B": (2560, 36, 32, 8, 9728, 128),
              "Qwen3-1.7B": (2048, 28, 16, 8, 6144, 128), "Qwen3-0.6B": (1024, 28, 16, 8, 3072, 128)},
    "SmolLM2": {"SmolLM2-1.7B": (2048, 24, 32, 32, 8192, 64), "SmolLM2-360M": (960, 32, 15, 5, 2560, 64),
                "SmolLM2-135M": (576, 30, 9, 3, 1536, 64)},
    "Pythia": {"Pythia-6.9B": (4096, 32, 32, 32, 16384, 128), "Pythia-1.4B": (2048, 24, 16, 16, 8192, 128),
               "Pythia-410M": (1024, 24, 16, 16, 4096, 64), "Pythia-160M": (768, 12, 12, 12, 3072, 64),
               "Pythia-70M": (512, 6, 8, 8, 2048, 64)},
}
NEAR = 0.3  # a published shape counts as of about the size within this share of it
# name -> the power of the width's scale that the layers' count goes by; None: the width stays
KINDS = {"the source's proportions": 1.0, "deep: all layers": 0.0, "wide: fewer layers": 2.0, "depth alone": None}


@dataclass(frozen=True)
class ShapeSettings:
    source: FilePath  # model folder, a run's, or a Hugging Face folder, of which config.json is read
    target_params: float  # parameters of the target, embeddings counted
    multiple: int = 64  # hidden_size and intermediate_size divide by this
    tensor_parallel: int = 1  # query heads and MLP units divide by this; KV heads divide by it, or it by them
    seq_len: int = 4096  # tokens a sequence, for the FLOPs of attention
    gpu: str = "H100"  # of the expected speed: a name of metrics.PEAK_FLOPS

    positional = "source"

    def __post_init__(self):
        for name in ("target_params", "multiple", "tensor_parallel", "seq_len"):
            require(0 < getattr(self, name) < math.inf, f"{name} = {getattr(self, name)} must be above 0")
        require(self.gpu in PEAK_FLOPS, f"gpu = {self.gpu} is not one of {', '.join(PEAK_FLOPS)}")


def read_source(folder: Path) -> ModelConfig:
    """The shape of a model folder of ours or of a Hugging Face folder.  Raises UserError."""
    folder = newest_in(folder)
    if (folder / "model_config.json").exists():
        return read_model_config(folder, ModelConfig)
    check((folder / "config.json").exists(), f"source = {folder} has no model_config.json and no config.json")
    hf = read_json(folder / "config.json")
    check(isinstance(hf, dict), f"{folder / 'config.json'} is not an object")
    return config_from_hf(hf, folder)


def reachable(source: ModelConfig, shape: ModelConfig) -> bool:
    """Whether prune.py could end there, and a class of transformers hold it."""
    try:
        config_to_hf(shape, {}, torch.float32)
        return bool(mask_sets(source, shape))
    except (ValueError, UserError):
        return False


def published(source: ModelConfig, target_params: float) -> list[tuple[str, ModelConfig]]:
    """Shapes of the family that the source's own is in, nearest first: of about the size, and reachable."""
    def numbers(cfg: ModelConfig) -> tuple[int, ...]:
        return cfg.hidden_size, cfg.n_layers, cfg.n_heads, cfg.n_kv_heads, cfg.intermediate_size, cfg.head_dim

    family = next((shapes for shapes in PUBLISHED.values() if numbers(source) in shapes.values()), {})
    found = [(name, dataclasses.replace(source, hidden_size=d, n_layers=L, n_heads=H, n_kv_heads=K, intermediate_size=f))
             for name, (d, L, H, K, f, h) in family.items() if h == source.head_dim]
    near = [(name, shape) for name, shape in found
            if abs(shape.n_params() / target_params - 1) <= NEAR and reachable(source, shape)]
    return sorted(near, key=lambda pair: abs(pair[1].n_params() - target_params))


def fits(shape: ModelConfig, tensor_parallel: int) -> bool:
    """Whether so many GPUs can share its heads and MLP units; a KV head may be held by several."""
    K = shape.n_kv_heads
    return (shape.n_heads % tensor_parallel == 0 and shape.intermediate_size % tensor_parallel == 0
            and (K % tensor_parallel == 0 or tensor_parallel % K == 0))


def most_gpus(shape: ModelConfig) -> int:
    return max(n for n in range(1, shape.n_heads + 1) if fits(shape, n))


def scaled(source: ModelConfig, cfg: ShapeSettings, power: float | None) -> ModelConfig | None:
    """The shape nearest to target_params whose width is s times the source's, and its layers s**power times, for any s.

    Of grouped heads as many KV heads stay as can.  MLP units take up what rounding left, by up to a fifth.  None if no
    shape near the size divides as the settings ask.
    """
    group, step = source.n_heads // source.n_kv_heads, math.lcm(cfg.multiple, cfg.tensor_parallel)
    heads = [(K * G, K) for K in range(1, source.n_kv_heads + 1) for G in (range(1, group + 1) if group > 1 else [1])]
    heads = [pair for pair in heads if fits(dataclasses.replace(source, n_heads=pair[0], n_kv_heads=pair[1],
                                                                intermediate_size=step), cfg.tensor_parallel)]

    def whole(value: float, multiple: int, most: int) -> int:
        return max(1, min(most // multiple, round(value / multiple))) * multiple

    def candidates() -> Iterator[ModelConfig]:
        if power is None:
            return (yield from (dataclasses.replace(source, n_layers=L) for L in range(1, source.n_layers)
                                if fits(source, cfg.tensor_parallel)))
        for s in (i / 200 for i in range(1, 201) if heads):
            H, K = min(heads, key=lambda pair: (abs(pair[0] - s * source.n_heads), -pair[1]))
            shape = dataclasses.replace(
                source, n_layers=max(1, round(s**power * source.n_layers)), n_heads=H, n_kv_heads=K,
                hidden_size=whole(s * source.hidden_size, cfg.multiple, source.hidden_size),
                intermediate_size=whole(s * source.intermediate_size, step, source.intermediate_size))
            f = shape.intermediate_size
            unit = (2 + shape.gated_mlp) * shape.hidden_size  # parameters of an MLP unit
            lacking = (cfg.target_params - shape.n_params()) / (shape.n_layers * unit)  # of them, a layer
            yield dataclasses.replace(shape, intermediate_size=whole(
                f + max(-0.2 * f, min(0.2 * f, lacking)), step, source.intermediate_size))

    def worth(shape: ModelConfig) -> tuple[float, int, float]:  # within 2% the one that most GPUs can share
        gap = abs(shape.n_params() / cfg.target_params - 1)
        return max(0.02, gap), -most_gpus(shape), gap

    near = [shape for shape in candidates() if reachable(source, shape) and worth(shape)[2] <= NEAR / 2]
    return min(near, key=worth, default=None)


def shapes(source: ModelConfig, cfg: ShapeSettings) -> list[tuple[str, ModelConfig]]:
    """(what it is, shape), the published first.  None twice."""
    found = [(name, shape) for name, shape in published(source, cfg.target_params) if fits(shape, cfg.tensor_parallel)]
    for name, power in KINDS.items():
        shape = scaled(source, cfg, power)
        if shape is not None and shape not in [s for _, s in found]:
            found.append((name, shape))
    return found


def kv_bytes(shape: ModelConfig) -> int:
    """Of a token in a bf16 KV cache."""
    return 2 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim


def flags(shape: ModelConfig) -> str:
    """What prune.py is given to end there."""
    return " ".join(f"--target_{name}={getattr(shape, name)}" for name in
                    ("hidden_size", "n_layers", "n_heads", "n_kv_heads", "intermediate_size"))


def main(cfg: ShapeSettings) -> None:
    source = read_source(Path(cfg.source))
    check(cfg.target_params < source.n_params(), f"target_params = {cfg.target_params:,.0f} must be below the source's "
          f"{source.n_params():,}")
    found = shapes(source, cfg)
    check(bool(found), f"no shape of about {cfg.target_params:,.0f} parameters divides by multiple = {cfg.multiple} and "
          f"tensor_parallel = {cfg.tensor_parallel}; take smaller ones")
    print(f"{'':<28}{'d':>6}{'L':>4}{'H':>4}{'K':>4}{'f':>7}{'parameters':>16}{'of target':>11}{'speed':>8}"
          f"{'tokens/s':>12}{'KV bytes':>10}{'GPUs':>6}")
    for name, shape in [("the source", source), *found]:
        H, K, f = shape.n_heads, shape.n_kv_heads, shape.intermediate_size
        flops = shape.train_flops_per_token(cfg.seq_len)
        times, rate = source.train_flops_per_token(cfg.seq_len) / flops, PRODUCTS * PEAK_FLOPS[cfg.gpu] / flops
        print(f"{name:<28}{shape.hidden_size:>6}{shape.n_layers:>4}{H:>4}{K:>4}{f:>7}{shape.n_params():>16,}"
              f"{shape.n_params() / cfg.target_params:>11.1%}{times:>7.1f}x{rate:>12,.0f}{kv_bytes(shape):>10,}"
              f"{most_gpus(shape):>6}")
    print(f"\nspeed: of training, by FLOPs a token at {cfg.seq_len} tokens; tokens/s: on one {cfg.gpu} at {PRODUCTS:.0%} of "
          "its peak, dense;\nKV bytes: a token; GPUs: the most that can share its heads and MLP units\n")
    for name, shape in found:
        print(f"{name}:\n  {flags(shape)}")


if __name__ == "__main__":
    run_stage(main, ShapeSettings)
