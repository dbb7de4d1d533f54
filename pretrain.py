"""Train a dense model: continue from a converted or compacted one, or start a shape from fresh weights.

    python pretrain.py configs/demo_source.py
    torchrun --nproc_per_node=8 pretrain.py configs/pretrain_1.3b.py --init_from=out/1.3b_compact

The loop is prune.py's without masks; tests/test_training.py holds the two to the same weights.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data import Batch, RunData, Sampler, evaluate, open_run_data, steer
from model import ModelConfig, Transformer, init_weights
from run.checkpoint import load_optimizer, parameter_names, save_checkpoint, start_run
from run.metrics import Metrics
from run.plan import Parts, preflight, report
from run.processes import (Processes, RunState, Signals, clip_and_step, lr_factor, make_optimizer, no_sync, shard,
                           start_processes, used_up, wrap)
from run.settings import TrainSettings, by_domain, check, check_min_weight, require, run_stage, user_errors
from run.teacher import open_teacher, teacher_config
from run.weights import at_newest, load_weights, read_model_config


@dataclass(frozen=True)
class PretrainSettings(TrainSettings):
    shape: dict[str, object] | None = None  # fields of model.ModelConfig, for fresh weights instead of init_from

    global_batch_size: int = 256  # sequences a step, over all ranks
    max_steps: int = 48000  # optimizer steps
    eval_interval: int = 400  # steps between evaluations; one comes before the first step

    shares = {"warmup_steps": 0.03}
    most_at_once = 16

    def __post_init__(self):
        super().__post_init__()
        require((self.init_from == "") != (self.shape is None), "give either init_from, a model folder, or shape, for fresh "
                f"weights; init_from = {self.init_from!r}, shape = {self.shape}")
        files = {name: os.path.join(self.init_from, f"{name}.json") for name in ("reference_loss", "domain_weights")}
        here = " ".join(f"--{name}={path}" for name, path in files.items() if self.init_from and os.path.isfile(path))
        require(self.update == "constant" or self.reference_loss != "", "update = doremi needs reference_loss: what the "
                "losses should come down to (" + (f"here: {here}" if here else "tools.reference_loss computes it")
                + "); or take --update=constant")


def model_config(cfg: PretrainSettings) -> ModelConfig:
    """The shape to train.  Raises ValueError or UserError."""
    if cfg.shape is None:
        shape = read_model_config(cfg.init_from, ModelConfig)
        check(not (Path(cfg.init_from) / "masks.safetensors").exists(), f"init_from = {cfg.init_from} holds masks, which "
              "would be lost; run compact.py on it first")
        return shape
    try:
        return ModelConfig.from_dict(cfg.shape)
    except ValueError as error:
        raise ValueError(f"shape: {error}") from None


def build(cfg: PretrainSettings, shape: ModelConfig, checkpoint: Path | None, processes: Processes):
    """The model and its optimizer: fresh, from init_from, or as a checkpoint holds them."""
    with torch.device("meta"):
        model = Transformer(shape, attention=cfg.attention, checkpointing=cfg.checkpointing)
    if checkpoint is None and cfg.shape is not None:
        init_weights(model.to_empty(device=processes.device), cfg.seed)
        model = shard(model, cfg, processes)
    else:
        model = shard(model, cfg, processes).to_empty(device=processes.device)
        load_weights(model, checkpoint or cfg.init_from)
    optimizer = make_optimizer([dict(name="weights", params=list(model.parameters()), lr=cfg.learning_rate,
                                     weight_decay=cfg.weight_decay)])
    if checkpoint is not None:
        load_optimizer(optimizer, parameter_names(model), checkpoint)
    return model, optimizer


def main(cfg: PretrainSettings) -> None:
    cfg = at_newest(cfg)
    with user_errors():
        shape = model_config(cfg)
    parts = Parts(Transformer, teacher=teacher_config(cfg, shape))
    if cfg.plan:
        return print(report(cfg, shape, {}, parts))
    processes = start_processes(cfg)
    signals = Signals(processes)
    with user_errors():
        data = open_run_data(cfg.data_dir, list(by_domain("domain_weights", cfg.domain_weights)), split=cfg.split,
                             seq_len=cfg.seq_len, vocab_size=shape.vocab_size, context_length=shape.context_length)
        check_min_weight(cfg.min_weight, len(data.domains))
        sampler = Sampler(data.train, global_batch_size=cfg.global_batch_size, seed=cfg.seed)
    state, checkpoint, assets = processes.on_main(start_run, cfg, data)
    if checkpoint is not None or cfg.resume:
        processes.say(f"going on from {checkpoint}" if checkpoint else f"no checkpoint in {cfg.out_dir} yet: the run begins")
    processes.say(f"{shape.n_params():,} parameters")
    flops_per_token = processes.on_main(preflight, cfg, processes, shape, {}, parts, data, state)
    model, optimizer = build(cfg, shape, checkpoint, processes)
    teacher = open_teacher(cfg, parts.teacher, Transformer, processes)
    metrics = Metrics(cfg, processes, state, flops_per_token=flops_per_token)
    train(cfg, processes, signals, metrics, data, sampler, state, model, teacher, optimizer, assets)


def train_step(cfg: PretrainSettings, processes: Processes, model: nn.Module, optimizer: torch.optim.AdamW, sampler: Sampler,
               batch: Batch, step: int, mark: Callable[[str], None] = lambda phase: None, *,
               teacher: nn.Module | None = None) -> dict[str, Tensor]:
    """One step of the optimizer: accumulate, clip, step.  model: of `wrap`.  mark(phase) is called as each phase ends.

    Returns what a log line averages, 0-d tensors on the device: the loss, and what `clip_and_step` tells.
    """
    rank, world, device = processes.rank, processes.world, processes.device
    accum = cfg.global_batch_size // (cfg.micro_batch_size * world)
    found = {}
    for micro_step in range(accum):
        index = micro_step * world + rank  # of the micro-batch in the global batch, on any number of ranks
        rows = slice(index * cfg.micro_batch_size, (index + 1) * cfg.micro_batch_size)
        tokens, targets = sampler.load(batch, rows, device)
        mark("data")
        with no_sync(model, last=micro_step == accum - 1):
            with processes.autocast():
                if teacher is None:
                    losses = {"loss": model(tokens, targets)}
                else:
                    with torch.no_grad():
                        learned = teacher.body(tokens)
                    losses = model(tokens, targets, teacher=learned, kd_weight=cfg.kd_weight)
            mark("forward")
            (losses["loss"] / accum).backward()
        found = {name: found.get(name, 0) + loss.detach() / accum for name, loss in losses.items()}
        mark("backward")
    found |= clip_and_step(optimizer, lr_factor(step, cfg), cfg.grad_clip)
    mark("optimizer")
    return found


def train(cfg: PretrainSettings, processes: Processes, signals: Signals, metrics: Metrics, data: RunData, sampler: Sampler,
          state: RunState, model: Transformer, teacher: Transformer | None, optimizer: torch.optim.AdamW,
          assets: list[Path]) -> None:
    """Before each step and after the last one, in this order: evaluate and steer, draw the next batch, save, stop.

    So a checkpoint of step s is the run after s steps and the evaluation that belongs there, and no stop comes unsaved.
    """
    wrapped = wrap(model, cfg, processes)
    first = state.step
    for step in range(first, cfg.max_steps + 1):
        last = step == cfg.max_steps
        metrics.stop_clock()
        if (step % cfg.eval_interval == 0 or last) and state.evaluated != step:
            turn = None if step == 0 or last else step // cfg.eval_interval
            with user_errors():
                losses = evaluate(model, {}, data.eval, cfg, processes, turn=turn)
            steer(state, losses, cfg)
            metrics.evaluation(losses, data.bits_per_byte)
        stop = metrics.stop
        if not last:
            batch = sampler.draw(step, state.domain_weights, state.cursors)
            stop = signals.asked(step) or stop or used_up(sampler.exhausted(state.cursors, batch.cursors), cfg, processes)
        if step > first and (step % cfg.save_interval == 0 or last or stop is not None):
            metrics.hold()
            save_checkpoint(cfg, state, processes, model=model, model_config=model.cfg, optimizer=optimizer, assets=assets)
        if stop is not None:
            raise stop
        if last:
            break
        metrics.start_clock()
        metrics.add(train_step(cfg, processes, wrapped, optimizer, sampler, batch, step, teacher=teacher))
        state.step, state.cursors = step + 1, batch.cursors
        if state.step % cfg.log_interval == 0 or state.step == cfg.max_steps:
            metrics.log({})
    metrics.close()
    signals.close()


if __name__ == "__main__":
    run_stage(main, PretrainSettings)
