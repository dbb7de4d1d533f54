"""Prune: train a source model's weights together with masks that end at an exact target shape.

    python prune.py configs/demo_prune.py
    torchrun --nproc_per_node=8 prune.py configs/7b_to_1.3b.py --out_dir=out/7b_to_1.3b

min over weights and log_alpha, max over the multipliers, of cross-entropy + Lagrangian (l0.py), with the domain mixture
steered at each evaluation (data.py).  compact.py then cuts the last checkpoint to the target shape.

Why `count` matters: log_alpha is clamped, so P(z != 0) of a closed unit is still 0.047 and of an open one 0.998.  Counting
those probabilities ("expected", as released), masks that number exactly the target read as too dense, so training closes
more units than it should and the final count reopens some near-dead ones.  "rescaled" counts a unit at a bound as exactly
open or closed.  The end of a run says how many near-dead units were kept.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from data import Batch, RunData, Sampler, evaluate, open_run_data, steer
from l0 import BLOCKS, L0, TopK, expected_params, mask_sets, undecided
from model import ModelConfig, Transformer, layer_masks
from run.checkpoint import load_optimizer, parameter_names, save_checkpoint, save_masks, start_run
from run.metrics import Metrics
from run.plan import Parts, preflight, report
from run.processes import (Processes, RunState, Signals, average_gradients, clip_and_step, lr_factor, make_optimizer,
                           no_sync, shard, start_processes, used_up, wrap)
from run.settings import FilePath, TrainSettings, by_domain, check, check_min_weight, require, run_stage, user_errors
from run.teacher import open_teacher, teacher_config
from run.weights import at_newest, load_weights, newest_in, read_model_config


@dataclass(frozen=True)
class PruneSettings(TrainSettings):
    split: str = "prune"  # which of prepare.py's splits to train on

    target_hidden_size: int | None = None  # d of the target; None: the source's
    target_n_layers: int | None = None  # L of the target; None: the source's
    target_n_heads: int | None = None  # H, query heads of the target; None: the source's
    target_n_kv_heads: int | None = None  # K of the target; None: as many as keep the source's group size
    target_intermediate_size: int | None = None  # f of the target; None: the source's
    pruning_modules: tuple[str, ...] | None = None  # mask sets, names of l0.MASKS; None: those that the target needs

    mask_learning_rate: float = 1.0  # peak, of log_alpha (topk: of scores; 0.1 suits)
    multiplier_learning_rate: float = 1.0  # peak, of lambda and phi, which are ascended
    lagrangian_warmup_steps: int | None = None  # the target sparsity rises linearly over these; None: 20% of max_steps
    start_sparsity: float = 0.0  # where it starts
    relaxation: Literal["sample", "topk"] = "sample"  # masks: hard-concrete samples with a Lagrangian, or top-k
    init_scores: FilePath = ""  # folder that tools.importance wrote: what the scores of topk start from
    freeze_weights: bool = False  # learn the masks alone: compact.py then cuts them out of the source as it was
    count: Literal["expected", "rescaled"] = "expected"  # how open units are counted; see above
    eval_target_model: bool = False  # evaluate with the target's counts, not the masks' own; the last one always is

    shares = {"warmup_steps": 0.1, "lagrangian_warmup_steps": 0.2}

    def __post_init__(self):
        super().__post_init__()
        for name in (f.name for f in dataclasses.fields(self) if f.name.startswith("target_")):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} = {value} must be above 0, or None")
        for name in ("mask_learning_rate", "multiplier_learning_rate"):
            require(0 < getattr(self, name) < math.inf, f"{name} = {getattr(self, name)} must be above 0")
        require(0 <= self.start_sparsity < 1, f"start_sparsity = {self.start_sparsity} must be from 0 to below 1")
        require((self.init_scores != "") == (self.relaxation == "topk"), f"init_scores = {self.init_scores!r} with "
                f"relaxation = {self.relaxation}: topk starts from scores that tools.importance wrote, sample does not")
        require(self.init_from != "", "no value for init_from: the model folder of the source")


def target_config(cfg: PruneSettings, source: ModelConfig) -> ModelConfig:
    """The exact shape to end at.  Raises ValueError if the numbers do not fit together."""
    given = {k.removeprefix("target_"): n for k, n in vars(cfg).items() if k.startswith("target_") and n is not None}
    n_heads, group = given.get("n_heads", source.n_heads), source.n_heads // source.n_kv_heads
    if "n_kv_heads" not in given and n_heads % group:
        raise ValueError(f"target_n_heads = {n_heads} does not divide by the source's group of {group} query heads; "
                         f"choose a multiple, or give target_n_kv_heads")
    return dataclasses.replace(source, **({"n_kv_heads": n_heads // group} | given))


def mask_metrics(masks: L0 | TopK, source: ModelConfig, cfg: PruneSettings, step: int) -> dict[str, float | Tensor]:
    """Every sparsity (row mean) and its target, both multipliers if there are any, and the expected size of the model."""
    values, p_open = masks.metrics(step, warmup=cfg.lagrangian_warmup_steps, start=cfg.start_sparsity)
    with torch.no_grad():
        values["expected_prunable_params"], values["expected_params"] = expected_params(source, p_open)
    return values


def load_scores(folder: str, sets: dict) -> dict[str, Tensor]:
    """The scores that tools.importance wrote for these mask sets.  Raises UserError."""
    return dict(load_weights(TopK(sets), newest_in(folder) / "masks.safetensors").scores)


def make_masks(cfg: PruneSettings, sets: dict) -> L0 | TopK:
    """As cfg.relaxation says, before any training."""
    if cfg.relaxation == "sample":
        return L0(sets, count=cfg.count, seed=cfg.seed)
    return TopK(sets, ramp=cfg.lagrangian_warmup_steps)


def build(cfg: PruneSettings, source: ModelConfig, sets: dict, checkpoint: Path | None, processes: Processes):
    """The model, its masks and their optimizer: the source's, or as a checkpoint holds them."""
    with torch.device("meta"):
        model = Transformer(source, attention=cfg.attention, checkpointing=cfg.checkpointing)
    model = load_weights(shard(model, cfg, processes).to_empty(device=processes.device), checkpoint or cfg.init_from)
    masks = make_masks(cfg, sets).to(processes.device)
    if cfg.init_scores and checkpoint is None:
        masks.start_from(load_scores(cfg.init_scores, sets))
    model.requires_grad_(not cfg.freeze_weights)
    optimizer = make_optimizer([
        dict(name="weights", params=[p for p in model.parameters() if p.requires_grad], lr=cfg.learning_rate,
             weight_decay=cfg.weight_decay),
        *masks.parameter_groups(mask_lr=cfg.mask_learning_rate, multiplier_lr=cfg.multiplier_learning_rate),
    ])
    if checkpoint is not None:
        load_weights(masks, checkpoint / "masks.safetensors")
        load_optimizer(optimizer, parameter_names(model, masks), checkpoint)
    return model, masks, optimizer


def shapes(cfg: PruneSettings) -> tuple[ModelConfig, ModelConfig, dict]:
    """The source, the target, and the mask sets that lead from one to the other.  Raises UserError."""
    with user_errors():
        source = read_model_config(cfg.init_from, ModelConfig)
        check(not (Path(cfg.init_from) / "masks.safetensors").exists(), f"init_from = {cfg.init_from} holds masks, which "
              "would be lost; run compact.py on it first, or go on with that run by --resume")
        target = target_config(cfg, source)
        sets = mask_sets(source, target, cfg.pruning_modules)
        layer_masks({name: torch.ones(shape) for name, (shape, _) in sets.items()}, 0, source)  # or a set does nothing
    check(bool(sets) or cfg.pruning_modules is not None, "nothing to prune: no target_* is smaller than the source's "
          f"({source}); give one, or --pruning_modules='()' to train without masks")
    return source, target, sets


def main(cfg: PruneSettings) -> None:
    cfg = at_newest(cfg)
    source, target, sets = shapes(cfg)
    parts = Parts(Transformer, partial(make_masks, cfg), teacher_config(cfg, source), frozen=cfg.freeze_weights)
    check(bool(sets) or not cfg.freeze_weights, "nothing to learn: freeze_weights, and no masks; give a target_*")
    if cfg.plan:
        return print(report(cfg, source, sets, parts))
    check(not cfg.freeze_weights or cfg.relaxation == "sample" or not sets.keys() <= set(BLOCKS), "nothing to learn: topk "
          f"takes whole layers as init_scores has them; run compact.py on {cfg.init_scores}")
    processes = start_processes(cfg)
    signals = Signals(processes)
    with user_errors():
        data = open_run_data(cfg.data_dir, list(by_domain("domain_weights", cfg.domain_weights)), split=cfg.split,
                             seq_len=cfg.seq_len, vocab_size=source.vocab_size, context_length=source.context_length)
        check_min_weight(cfg.min_weight, len(data.domains))
        sampler = Sampler(data.train, global_batch_size=cfg.global_batch_size, seed=cfg.seed)
    state, checkpoint, assets = processes.on_main(start_run, cfg, data)
    if checkpoint is not None or cfg.resume:
        processes.say(f"going on from {checkpoint}" if checkpoint else f"no checkpoint in {cfg.out_dir} yet: the run begins")
    processes.say(f"{source.n_params():,} parameters -> {target.n_params():,}.  Masks: "
                  + (", ".join(f"{name} {shape}, {kept} kept" for name, (shape, kept) in sets.items()) or "none"))
    flops_per_token = processes.on_main(preflight, cfg, processes, source, sets, parts, data, state)
    model, masks, optimizer = build(cfg, source, sets, checkpoint, processes)
    teacher = open_teacher(cfg, parts.teacher, Transformer, processes)
    metrics = Metrics(cfg, processes, state, flops_per_token=flops_per_token)
    train(cfg, processes, signals, metrics, data, sampler, state, model, teacher, masks, optimizer, target, assets)
    for name, z in (masks.deterministic() if cfg.relaxation == "sample" else {}).items():
        asked, (dead, between) = masks.target_sparsity(name, cfg.max_steps, warmup=0), undecided(z)
        found = float(masks.sparsity()[name].detach().mean())
        far = "; not settled: raise max_steps" if abs(found - asked) > 0.02 else ""
        processes.say(f"{name}: expected sparsity {found:.4f}, the target's {asked:.4f}; {dead} near-dead units kept "
                      f"(z < 0.05), {between} undecided (z < 0.95){far}")


def train_step(cfg: PruneSettings, processes: Processes, model: nn.Module, masks: L0 | TopK, optimizer: torch.optim.AdamW,
               sampler: Sampler, batch: Batch, step: int, mark: Callable[[str], None] = lambda phase: None, *,
               teacher: nn.Module | None = None) -> dict[str, Tensor]:
    """One step of the optimizers: accumulate, clip, step.  model: of `wrap`.  mark(phase) is called as each phase ends.

    Returns what a log line averages, 0-d tensors on the device: the losses, and what `clip_and_step` tells.
    """
    rank, world, device = processes.rank, processes.world, processes.device
    accum = cfg.global_batch_size // (cfg.micro_batch_size * world)
    found = {}
    for micro_step in range(accum):
        index = micro_step * world + rank  # of the micro-batch in the global batch, on any number of ranks
        rows = slice(index * cfg.micro_batch_size, (index + 1) * cfg.micro_batch_size)
        tokens, targets = sampler.load(batch, rows, device)
        mark("data")
        z = masks.sample(cfg.seed, step, index)
        mark("masks")
        with no_sync(model, last=micro_step == accum - 1):
            with processes.autocast():
                if teacher is None:
                    losses = {"loss": model(tokens, targets, z)}
                else:
                    with torch.no_grad():
                        learned = teacher.body(tokens)
                    losses = model(tokens, targets, z, teacher=learned, kd_weight=cfg.kd_weight)
            mark("forward")
            (losses["loss"] / accum).backward()
        found = {name: found.get(name, 0) + loss.detach() / accum for name, loss in losses.items()}
        mark("backward")
    average_gradients(masks.units(), processes)
    found |= masks.finish_gradients_(step, warmup=cfg.lagrangian_warmup_steps, start=cfg.start_sparsity)
    mark("masks")
    found |= clip_and_step(optimizer, lr_factor(step, cfg), cfg.grad_clip)
    masks.clamp_()
    mark("optimizer")
    return found


def train(cfg: PruneSettings, processes: Processes, signals: Signals, metrics: Metrics, data: RunData, sampler: Sampler,
          state: RunState, model: Transformer, teacher: Transformer | None, masks: L0 | TopK, optimizer: torch.optim.AdamW,
          target: ModelConfig, assets: list[Path]) -> None:
    """Before each step and after the last one, in this order: evaluate and steer, draw the next batch, save, stop.

    So a checkpoint of step s is the run after s steps and the evaluation that belongs there, and no stop comes unsaved.
    """
    wrapped = wrap(model, cfg, processes)
    first = state.step
    for step in range(first, cfg.max_steps + 1):
        last = step == cfg.max_steps
        metrics.stop_clock()
        if (step % cfg.eval_interval == 0 or last) and state.evaluated != step:
            # before the first step the source as it is, so that one that loads wrong shows at once
            z = {} if step == 0 else masks.deterministic(target=cfg.eval_target_model or last)
            turn = None if step == 0 or last else step // cfg.eval_interval
            with user_errors():
                losses = evaluate(model, z, data.eval, cfg, processes, turn=turn)
            steer(state, losses, cfg)
            metrics.evaluation(losses, data.bits_per_byte, mask_metrics(masks, model.cfg, cfg, step) if step else None)
            if processes.rank == 0 and masks.sets:
                save_masks(cfg.out_dir, masks, step)
        stop = metrics.stop
        if not last:
            batch = sampler.draw(step, state.domain_weights, state.cursors)
            stop = signals.asked(step) or stop or used_up(sampler.exhausted(state.cursors, batch.cursors), cfg, processes)
        if step > first and (step % cfg.save_interval == 0 or last or stop is not None):
            metrics.hold()
            save_checkpoint(cfg, state, processes, model=model, model_config=model.cfg, optimizer=optimizer, masks=masks,
                            target=target, assets=assets)
        if stop is not None:
            raise stop
        if last:
            break
        metrics.start_clock()
        metrics.add(train_step(cfg, processes, wrapped, masks, optimizer, sampler, batch, step, teacher=teacher))
        state.step, state.cursors = step + 1, batch.cursors
        if state.step % cfg.log_interval == 0 or state.step == cfg.max_steps:
            metrics.log(mask_metrics(masks, model.cfg, cfg, state.step))
    metrics.close()
    signals.close()


if __name__ == "__main__":
    run_stage(main, PruneSettings)
