"""Scores for the units of a model without training it: the rivals of learned masks, and the start for those of `topk`.

    python -m tools.importance --init_from=models/llama2-7b --data_dir=data/redpajama --out_dir=out/activation \\
        --target_hidden_size=2048 --target_n_layers=24 --target_n_heads=16 --target_intermediate_size=5504
    python compact.py --checkpoint=out/activation --out_dir=out/activation_compact
    python prune.py ... --relaxation=topk --freeze_weights --init_scores=out/activation

The folder holds a checkpoint as the last one of prune.py, with the weights as they are and `scores` for masks, so compact.py
cuts it by the same code.  Of each row the units with the highest scores are kept, whole.

  activation  as Minitron (Muralidharan et al. 2024, arXiv 2407.14679): mean absolute output of the norms, mean norm of a
              head's context, mean absolute input of down_proj; layers by 1 - cosine of their input and output
  gradient    mean over batches of the squared gradient of the loss to the unit's mask, at a mask of one (Molchanov et al.
              2019, arXiv 1906.10771)
  magnitude   norm of the weights that a unit takes away
  random

To cut depth alone, give target_n_layers alone.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from data import RunData, Sampler, open_run_data
from l0 import TopK
from model import Transformer
from prune import PruneSettings, shapes
from run.checkpoint import carried_assets, fresh_state
from run.processes import Processes, start_processes
from run.settings import by_domain, check, require, run_stage, user_errors
from run.weights import load_weights, new_folder, verified, write_assets, write_tensors


@dataclass(frozen=True)
class ImportanceSettings(PruneSettings):
    score: Literal["gradient", "activation", "magnitude", "random"] = "activation"  # what tells a unit's worth
    calibration_sequences: int = 1024  # of the split, in equal shares of the domains, or by domain_weights

    def __post_init__(self):
        super().__post_init__()
        require(self.calibration_sequences >= self.micro_batch_size, f"calibration_sequences = {self.calibration_sequences} "
                f"must be at least micro_batch_size = {self.micro_batch_size}")


def batches(cfg: ImportanceSettings, data: RunData, processes: Processes):
    """(tokens, targets) of the calibration sequences, by micro-batches: the first that a run of this seed trains on."""
    with user_errors():
        sampler = Sampler(data.train, global_batch_size=cfg.micro_batch_size, seed=cfg.seed)
    state = fresh_state(cfg, data)
    for step in range(cfg.calibration_sequences // cfg.micro_batch_size):
        batch = sampler.draw(step, state.domain_weights, state.cursors)
        state.cursors = batch.cursors
        yield sampler.load(batch, slice(None), processes.device)


def gradient_scores(cfg: ImportanceSettings, model: Transformer, sets: dict, data: RunData,
                    processes: Processes) -> dict[str, Tensor]:
    """Sum over micro-batches of the squared gradient of the mean loss to each mask, all at one: fp32, [shape of the set]."""
    model.requires_grad_(False)
    ones = {name: torch.ones(shape, device=processes.device, requires_grad=True) for name, (shape, _) in sets.items()}
    scores = {name: torch.zeros_like(z) for name, z in ones.items()}
    for tokens, targets in batches(cfg, data, processes):
        with processes.autocast():
            loss = model(tokens, targets, ones)
        for name, gradient in zip(ones, torch.autograd.grad(loss, list(ones.values()))):
            scores[name] += gradient.square()
    return scores


@torch.no_grad()
def activation_scores(cfg: ImportanceSettings, model: Transformer, sets: dict, data: RunData,
                      processes: Processes) -> dict[str, Tensor]:
    """Minitron's scores, summed over layers where a set has no layers; fp32, [shape of the set]."""
    shape, scores = model.cfg, {name: torch.zeros(shape, device=processes.device) for name, (shape, _) in sets.items()}

    def add(name: str, value: Tensor, *at: int) -> None:
        if name in scores:
            scores[name][at] += value.float()

    def watch_layer(i: int, layer: torch.nn.Module) -> None:
        def context(module, args):
            heads = args[0].unflatten(-1, (shape.n_heads, shape.head_dim)).float()  # (B, T, H, h)
            add("head", heads.norm(dim=-1).mean((0, 1)), i)
            groups = heads.unflatten(2, (shape.n_kv_heads, -1))  # (B, T, K, G, h)
            add("query_head", groups.norm(dim=-1).mean((0, 1)), i)
            add("kv_head", groups.flatten(3).norm(dim=-1).mean((0, 1)), i)

        def influence(module, args, output):
            change = 1 - F.cosine_similarity(args[0].float(), output.float(), dim=-1).mean()
            for name in ("layer", "head_layer", "mlp"):
                add(name, change, i)

        layer.self_attn.o_proj.register_forward_pre_hook(context)
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: add(
            "intermediate", args[0].float().abs().mean((0, 1)), i))
        layer.register_forward_hook(influence)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda module, args, output: add("hidden", output.float().abs().mean((0, 1))))

    for i, layer in enumerate(model.model["layers"]):
        watch_layer(i, layer)
    model.model["norm"].register_forward_hook(lambda module, args, output: add("hidden", output.float().abs().mean((0, 1))))
    for tokens, targets in batches(cfg, data, processes):
        with processes.autocast():
            model(tokens, targets)
    return scores


@torch.no_grad()
def magnitude_scores(model: Transformer, sets: dict) -> dict[str, Tensor]:
    """Root of the summed squares of all weights that a unit takes away: fp32, [shape of the set]."""
    cfg, squares = model.cfg, {}
    layers = [dict(layer.named_parameters()) for layer in model.model["layers"]]

    def over(name: str, dim: int) -> Tensor:  # [L, size of the weights' other side]
        return torch.stack([layer[name].float().square().sum(dim) for layer in layers])

    heads = over("self_attn.o_proj.weight", 0) + over("self_attn.q_proj.weight", 1)  # (L, H h)
    kv = over("self_attn.k_proj.weight", 1) + over("self_attn.v_proj.weight", 1)  # (L, K h)
    squares["head"] = heads.unflatten(1, (cfg.n_heads, -1)).sum(2)
    squares["query_head"] = squares["head"].unflatten(1, (cfg.n_kv_heads, -1))
    squares["kv_head"] = squares["query_head"].sum(2) + kv.unflatten(1, (cfg.n_kv_heads, -1)).sum(2)
    into_mlp = ["mlp.gate_proj", "mlp.up_proj"] if cfg.gated_mlp else ["mlp.up_proj"]
    squares["intermediate"] = over("mlp.down_proj.weight", 0) + sum(over(f"{name}.weight", 1) for name in into_mlp)
    squares["head_layer"], squares["mlp"] = heads.sum(1) + kv.sum(1), squares["intermediate"].sum(1)
    squares["layer"] = squares["head_layer"] + squares["mlp"]
    inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", *into_mlp)
    squares["hidden"] = model.model["embed_tokens"].weight.float().square().sum(0) + sum(
        over(f"{name}.weight", 0).sum(0) for name in inputs) + sum(
        over(f"{name}.weight", 1).sum(0) for name in ("self_attn.o_proj", "mlp.down_proj"))
    return {name: squares[name].sqrt() for name in sets}


def measure(cfg: ImportanceSettings, model: Transformer, sets: dict, data: RunData,
            processes: Processes) -> dict[str, Tensor]:
    """The scores of every unit of the sets."""
    if cfg.score == "gradient":
        return gradient_scores(cfg, model, sets, data, processes)
    if cfg.score == "activation":
        return activation_scores(cfg, model, sets, data, processes)
    if cfg.score == "magnitude":
        return magnitude_scores(model, sets)
    generator = torch.Generator().manual_seed(cfg.seed)
    return {name: torch.rand(shape, generator=generator) for name, (shape, _) in sets.items()}


def main(cfg: ImportanceSettings) -> None:
    source, target, sets = shapes(cfg)
    folder = Path(cfg.out_dir) / "step_0000000"
    check(not folder.exists(), f"{folder} exists already; remove it or choose another out_dir")
    processes = start_processes(cfg)
    check(processes.world == 1, "this tool runs in one process; start it with python, not torchrun")
    with user_errors(), verified(cfg.init_from):
        data = open_run_data(cfg.data_dir, list(by_domain("domain_weights", cfg.domain_weights)), split=cfg.split,
                             seq_len=cfg.seq_len, vocab_size=source.vocab_size, context_length=source.context_length)
        model = load_weights(Transformer(source, attention=cfg.attention).to(processes.device), cfg.init_from)
        scores = measure(cfg, model, sets, data, processes)
        state, assets = fresh_state(cfg, data), carried_assets(cfg, data)
    weights = dict(sorted(model.named_parameters()))
    with new_folder(folder) as temporary:
        write_tensors(temporary / "model.safetensors", {n: p.shape for n, p in weights.items()},
                      {n: p.dtype for n, p in weights.items()}, weights.__getitem__)
        write_assets(temporary, source, assets)
        masks = TopK(sets)  # with gains of 0: open units are 1
        for name, s in scores.items():
            masks.scores[name].data.copy_(s)
        save_file(masks.state_dict(), temporary / "masks.safetensors")
        (temporary / "target_config.json").write_text(target.to_json())
        (temporary / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")
    print(f"wrote {folder}: scores of " + ", ".join(f"{name} {tuple(s.shape)}" for name, s in scores.items()))


if __name__ == "__main__":
    run_stage(main, ImportanceSettings)
