"""What a run will take: data, disk, memory, operations, hours.  The stages hand in the model and the masks they train.

    python prune.py configs/7b_to_1.3b.py --plan=8          # of a run on 8 GPUs; needs no GPU, and of the source its config

`preflight` says before every run what its data and checkpoints come to, and refuses one that cannot end.  `report`, behind
--plan, adds memory.  Nothing is allocated for that: the real training step runs on torch's fake tensors, which have shapes
and no memory, and every storage alive is counted.  So the figures follow model.py, whatever becomes of it.
"""

import math
import shutil
import typing
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from run.metrics import PEAK_FLOPS
from run.processes import Processes, RunState, clip_and_step, make_optimizer
from run.settings import TrainSettings, UserError, check, user_errors
from run.weights import all_checkpoints, let_go, step_of

MFU = (0.3, 0.4, 0.5)  # shares of a device's peak that the hours are told for
CHECKPOINTING = typing.get_args(TrainSettings.__annotations__["checkpointing"])
GB = 1e9


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live, now and at most, of whatever tensors operations return."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def freed(self, key: int, n: int) -> None:
        self.seen.discard(key)
        self.now -= n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, n = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += n
                    weakref.finalize(storage, self.freed, key, n)
        self.peak = max(self.peak, self.now)
        return result


@dataclass(frozen=True)
class Parts:
    """What a stage trains."""

    model: Callable[..., nn.Module]  # model.Transformer
    masks: Callable[..., nn.Module] | None = None  # l0.L0, of a stage that has masks


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step where nothing is sharded."""

    weights: int
    optimizer: int
    activations: int  # alive at the end of a forward pass, for the backward pass
    peak: int  # of all, at any moment of a step


def step_memory(shape, sets: dict, cfg: TrainSettings, parts: Parts, *, half: bool, checkpointing: str,
                gradients_stay: bool, dtype: torch.dtype = torch.float32) -> Memory:
    """Run two training steps on fake tensors and count.  shape: model.ModelConfig.  sets: l0.mask_sets, or {}.

    half: bf16 autocast.  gradients_stay: they are there before the forward pass, as in accumulation and in DDP's buckets.
    dtype: of the weights.
    """
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        torch.set_default_dtype(dtype)
        try:
            model = parts.model(shape, checkpointing=checkpointing)
        finally:
            torch.set_default_dtype(torch.float32)
        weights, masks = live.now, parts.masks(sets) if sets else None
        optimizer = make_optimizer([dict(params=list(model.parameters()), lr=1.0)]
                                   + (masks.parameter_groups(mask_lr=1.0, multiplier_lr=1.0) if masks else []))
        tokens = torch.zeros(cfg.micro_batch_size, cfg.seq_len, dtype=torch.int64)
        for _ in range(2):  # the first one makes the optimizer's state
            live.peak = static = live.now
            for micro_step in range(2 if gradients_stay else 1):
                before = live.now
                with autocast:
                    loss = model(tokens, tokens, masks.sample(0, 0, micro_step) if masks else None)
                activations = live.now - before
                loss.backward()
            if masks:
                masks.lagrangian(1, warmup=1).backward()
            del loss
            clip_and_step(optimizer, 1.0, 1.0)
        return Memory(weights, static - weights, activations, live.peak)


def per_device(shape, sets: dict, cfg: TrainSettings, parts: Parts, devices: int, *, checkpointing: str) -> dict[str, float]:
    """Bytes on each device: weights, gradients, optimizer, gathered (by FSDP, of the others), activations, and the peak."""
    half = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and cfg.device in ("auto", "cuda"))
    if cfg.parallel == "ddp" or devices == 1:
        stay = devices > 1 or cfg.global_batch_size > cfg.micro_batch_size
        m = step_memory(shape, sets, cfg, parts, half=half, checkpointing=checkpointing, gradients_stay=stay)
        return {"weights": m.weights, "gradients": m.weights, "optimizer": m.optimizer, "gathered": 0,
                "activations": m.activations, "peak": m.peak}
    # FSDP: weights come whole in the dtype of autocast, two layers (one computing, one on its way) with embedding and head;
    # one gradient is whole in fp32.  What a step of one device needs beside weights, gradients and state is not shared.
    m = step_memory(shape, sets, cfg, parts, half=half, checkpointing=checkpointing, gradients_stay=True,
                    dtype=torch.bfloat16 if half else torch.float32)
    rest = shape.vocab_size * shape.hidden_size * (2 - shape.tie_embeddings)
    layer = (shape.n_params() - rest) / shape.n_layers
    share = 4 * shape.n_params() / devices
    fixed = {"weights": share, "gradients": share, "optimizer": 2 * share,
             "gathered": (2 * layer + rest) * (2 if half else 4) + 4 * max(layer, rest)}
    return fixed | {"activations": m.activations, "peak": sum(fixed.values()) + m.peak - 2 * m.weights - m.optimizer}


def report(cfg: TrainSettings, shape, sets: dict, parts: Parts) -> str:
    """What --plan prints: a run of these settings on cfg.plan devices.  Raises UserError if the batch does not divide."""
    devices, accum = cfg.plan, cfg.global_batch_size / (cfg.micro_batch_size * cfg.plan)
    check(accum == int(accum), f"global_batch_size = {cfg.global_batch_size} does not divide by micro_batch_size x plan = "
          f"{cfg.micro_batch_size} x {devices}")
    tokens = cfg.global_batch_size * cfg.seq_len
    flops_per_token = shape.train_flops_per_token(cfg.seq_len)
    flops = flops_per_token * tokens * cfg.max_steps
    lines = [f"parameters           {shape.n_params():,}" + "".join(f"; masks {n} {s}" for n, (s, _) in sets.items()),
             f"tokens a step        {tokens:,} = {devices} devices x {int(accum)} micro-steps x {cfg.micro_batch_size} "
             f"sequences x {cfg.seq_len}",
             f"tokens in all        {tokens * cfg.max_steps:,} in {cfg.max_steps:,} steps",
             f"GB on each device    {''.join(f'{kind:>12}' for kind in CHECKPOINTING)}   (checkpointing, here "
             f"{cfg.checkpointing}; {cfg.parallel}; without the device's context and what its allocator loses)"]
    found = [per_device(shape, sets, cfg, parts, devices, checkpointing=kind) for kind in CHECKPOINTING]
    lines += [f"  {name:<19}" + "".join(f"{bytes_of[name] / GB:>12.2f}" for bytes_of in found) for name in found[0]]
    lines += [f"operations           {flops:.3g} ({flops_per_token:.3g} a token, recomputing left out)",
              f"hours at an MFU of   {''.join(f'{mfu:>10.0%}' for mfu in MFU)}"]
    lines += [f"  {devices} x {name:<15}" + "".join(f"{flops / (devices * PEAK_FLOPS[name] * mfu) / 3600:>10.2f}"
                                                    for mfu in MFU) for name in ("A100", "H100")]
    n, size = checkpoints(cfg, 0, []), checkpoint_bytes(shape, sets)
    lines += [f"disk                 {amount(n * size)}: checkpoints of {amount(size)}, at most {n} at once"]
    return "\n".join(lines)


def checkpoint_bytes(shape, sets: dict) -> int:
    """Of one checkpoint: weights and both of AdamW's moments in fp32, of the masks too; what is small left out."""
    return 12 * (shape.n_params() + sum(math.prod(s) for s, _ in sets.values()))


def checkpoints(cfg: TrainSettings, first: int, there: list[int]) -> int:
    """The most checkpoints on the disk at once in a run from step `first`, those of the steps `there` counted too."""
    kept, most = list(there), len(there)
    steps = range((first // cfg.save_interval + 1) * cfg.save_interval, cfg.max_steps, cfg.save_interval)
    for step in [*steps, *[cfg.max_steps] * (first < cfg.max_steps)]:
        kept.append(step)
        most = max(most, len(kept))  # an old one goes when a new one is there
        gone = let_go(kept, cfg.keep_last, cfg.keep_every)
        kept = [s for s in kept if s not in gone]
    return most


def amount(n: float) -> str:
    """Bytes for people."""
    return f"{n / GB:,.1f} GB" if n >= GB else f"{n / 1e6:.1f} MB"


def preflight(cfg: TrainSettings, processes: Processes, shape, sets: dict, data, state: RunState) -> None:
    """Before the first step: say what the run comes to.  For rank 0.  Raises UserError if it could not end."""
    sequences = (cfg.max_steps - state.step) * cfg.global_batch_size
    processes.say(data.budget_table(state.domain_weights, state.cursors, sequences))
    for s in data.train:
        epochs = (state.cursors[s.domain] + state.domain_weights[s.domain] * sequences) / s.n_windows
        if epochs > 1:
            moving = cfg.update == "doremi"  # the weights may yet leave enough of it: the run itself watches
            share = state.domain_weights[s.domain]
            found = f"domain {s.domain} has tokens for 1 of {epochs:.2f} epochs at its weight of {share:.4f}"
            check(cfg.on_exhausted == "wrap" or moving, f"{found}, and on_exhausted = error; prepare more of it, lower its "
                  "weight or max_steps, or take --on_exhausted=wrap")
            processes.say(f"note: {found}")
    if cfg.verify_data:
        processes.say("comparing the token files with their checksums")
        with user_errors():
            data.verify()
    there = [step_of(path) for path in all_checkpoints(cfg.out_dir)]
    n, size = checkpoints(cfg, state.step, there) - len(there), checkpoint_bytes(shape, sets)  # more than now, at most
    try:
        free = shutil.disk_usage(cfg.out_dir).free
    except OSError as error:
        raise UserError(f"cannot tell how much room {cfg.out_dir} has: {error.strerror}") from None
    check(free >= min(n, 1) * size, f"{Path(cfg.out_dir).resolve()} has {amount(free)} free, and a checkpoint takes "
          f"{amount(size)}; make room, or choose another out_dir")
    if free < n * size:
        processes.say(f"warning: {n} more checkpoints of {amount(size)} will not fit into the {amount(free)} free: make "
                      "room, save less often (save_interval), or let old ones go (keep_last)")
    tokens = cfg.global_batch_size * cfg.seq_len
    processes.say(f"steps {state.step:,} to {cfg.max_steps:,} of {tokens:,} tokens on {processes.world} x "
                  f"{processes.device.type} ({cfg.parallel if processes.world > 1 else 'alone'}, "
                  f"{str(processes.dtype).removeprefix('torch.')}): {sequences * cfg.seq_len:,} tokens, "
                  f"{shape.train_flops_per_token(cfg.seq_len) * sequences * cfg.seq_len:.2g} operations, "
                  f"{n} more checkpoints of {amount(size)}, {amount(free)} free")
