"""What both training loops need around their own code: processes and device, signals, optimizer and schedule."""

import importlib.util
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from run.settings import Interrupted, TrainSettings, UserError, check


@dataclass
class RunState:
    """What changes in a run apart from tensors; state.json of a checkpoint."""

    step: int  # optimizer steps done
    domain_weights: dict[str, float]
    cursors: dict[str, int]  # sequences that each domain has given
    reference_loss: dict[str, float]  # empty until the source is measured
    evaluated: int = -1  # the step of the last evaluation
    skipped: int = 0  # steps skipped for a non-finite gradient
    unlogged: dict[str, float] = field(default_factory=dict)  # what Metrics has added up since its last line
    tokens: dict[str, str] = field(default_factory=dict)  # fingerprint of each domain's training tokens


@dataclass(frozen=True)
class Processes:
    """This process's place among all, and where it computes."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of autocast
    cpus: dist.ProcessGroup | None = None  # between the hosts' CPUs: for what no device should wait for

    def autocast(self):
        """The context of a forward pass: bf16 products with fp32 weights, or nothing."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def say(self, message: str) -> None:
        """Print on rank 0, above a progress bar."""
        if self.rank == 0:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def on_main(self, work: Callable, *args):
        """What work(*args) returns on rank 0, on every rank; so is its UserError, and no rank waits for one that left."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = work(*args)
            except UserError as e:
                error = e
        if self.world > 1:
            box = [result, error]
            dist.broadcast_object_list(box, group=self.cpus)
            result, error = box
        if error is not None:
            raise error
        return result

    def everywhere(self, work: Callable, *args) -> list:
        """What work(*args) returns on each rank, by rank, on every rank; and so is the first one's UserError."""
        result, error = None, None
        try:
            result = work(*args)
        except UserError as e:
            error = e
        found = [(result, error)]
        if self.world > 1:
            found = [None] * self.world
            dist.all_gather_object(found, (result, error), group=self.cpus)
        for _, error in found:
            if error is not None:
                raise error
        return [result for result, _ in found]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


def start_processes(settings: TrainSettings) -> Processes:
    """Join the process group that torchrun describes, if any, and choose the device.  Raises UserError."""
    rank, world, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    # github.com/pytorch/pytorch/issues/135712: a restart would look for the processes that are no more
    stale = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    check(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0" or not stale, "torchrun --max-restarts works only with "
          "--standalone or --rdzv-backend=c10d, and with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment")
    kind = settings.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    check(kind != "cuda" or torch.cuda.is_available(), "device = cuda, but torch sees no CUDA device; take --device=cpu")
    check(kind != "mps" or torch.backends.mps.is_available(), "device = mps, but torch sees none; take --device=cpu")
    check(kind != "cuda" or local_rank < torch.cuda.device_count(),
          f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} here; lower --nproc_per_node")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        # micro-batches, evaluations and saves ask for blocks of many sizes, and what lies free between them would be lost
        if "PYTORCH_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # before sm_80 a GPU has no bf16 products, and emulates them
    fast = kind == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    dtype = {"auto": torch.bfloat16 if fast else torch.float32,
             "float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    if settings.attention == "flash_attn":
        check(kind == "cuda" and dtype == torch.bfloat16, f"attention = flash_attn needs cuda and bfloat16, not {kind} "
              f"and {dtype}; take --attention=sdpa")
        check(importlib.util.find_spec("flash_attn") is not None,
              "attention = flash_attn, but the package flash-attn is not installed; take --attention=sdpa")
    reason = why_eager(device)
    check(settings.compile != "on" or kind != "cuda" or not reason, f"compile = on, but {reason}; take --compile=off")
    check(settings.global_batch_size % (settings.micro_batch_size * world) == 0,
          f"global_batch_size = {settings.global_batch_size} does not divide by micro_batch_size x processes = "
          f"{settings.micro_batch_size} x {world}")
    check(settings.logger == "none" or importlib.util.find_spec(settings.logger) is not None, f"logger = {settings.logger}, "
          f"but the package is not installed; pip install {settings.logger}, or take --logger=none")
    if kind == "cuda":
        torch.cuda.set_device(device)
    cpus = None
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None,
                                timeout=timedelta(minutes=settings.timeout_minutes))
        cpus = dist.new_group(backend="gloo", timeout=timedelta(hours=2))  # the others wait while rank 0 checks one
    processes = Processes(rank, world, device, dtype, cpus)
    if settings.compile == "auto" and kind == "cuda" and reason:
        processes.say(f"note: layers are not compiled: {reason}")
    return processes


def shard(model: nn.Module, settings: TrainSettings, processes: Processes) -> nn.Module:
    """With parallel = fsdp, shard the parameters over all processes, layer by layer (FSDP2); before they have values.

    The shards stay fp32; layers compute in the dtype of autocast, and gradients are summed in fp32.  Inputs are not cast:
    masks stay fp32.
    """
    if settings.parallel == "fsdp" and dist.is_initialized():
        low = None if processes.dtype == torch.float32 else processes.dtype
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(processes.device.type, (processes.world,))
        for module in [*model.model["layers"], model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def wrap(model: nn.Module, settings: TrainSettings, processes: Processes) -> nn.Module:
    """The module to call in training: its layers compiled in place if asked, in DDP if there are several processes.

    The argument stays the module to save and to evaluate: its parameter names never change.
    """
    if compiles(settings, processes.device):
        compile_layers(model)
    if not dist.is_initialized() or settings.parallel == "fsdp" or not any(p.requires_grad for p in model.parameters()):
        return model
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def why_eager(device: torch.device) -> str:
    """Why compile = auto does not compile layers on this device; "" if it does."""
    if device.type != "cuda":
        return "it gains nothing but on CUDA"  # docs/performance.md
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "that takes a GPU of compute capability 7.0 or more"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as triton looks for it
    return "" if compiler else "that takes gcc, and there is none here"


def compiles(settings: TrainSettings, device: torch.device) -> bool:
    """Whether layers are compiled; auto: if why_eager finds nothing against it: 1.6 to 1.9 times as fast (docs/gpu.md)."""
    return settings.compile == "on" or (settings.compile == "auto" and not why_eager(device))


def compile_layers(model: nn.Module) -> None:
    """Compile each layer by itself, in place: all of them share one graph, so that a run starts soon, and FSDP, which
    gathers between layers, breaks none (of a model compiled whole it leaves a tenth of the products in graphs).

    The compiler itself chooses what of a layer to compute again, so that selective checkpointing has nothing left to do.
    """
    if model.checkpointing == "selective":
        model.checkpointing = "none"
    for layer in model.model["layers"]:
        layer.compile(dynamic=False)


def no_sync(model: nn.Module, last: bool):
    """Hold DDP's gradient all-reduce back in all micro-steps but the last."""
    return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


# ---- reasons to stop before the last step


class Signals:
    """SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask a run to save and exit; a second SIGINT ends it at once, nothing saved.

    All ranks agree on the step, and no device waits for that: each step starts the maximum of what the ranks have
    received, between their CPUs, and the next step reads it.
    """

    def __init__(self, processes: Processes):
        self.cpus, self.received, self.sent, self.work = processes.cpus, 0, None, None
        self.before = {s: signal.signal(s, self.receive) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        self.main, self.interrupted = processes.rank == 0, 0.0  # when the first SIGINT came

    def receive(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted and now - self.interrupted > 0.5:  # a terminal and a launcher may both send the first
                raise KeyboardInterrupt("stopped at once, nothing saved; --resume goes on from the newest checkpoint")
            if self.main and not self.interrupted:
                os.write(2, b"\nCtrl-C: the run ends this step and saves; once more stops it at once\n")  # safe in a handler
            self.interrupted = self.interrupted or now
        self.received = number

    def asked(self, step: int) -> Interrupted | None:
        """The reason to stop before this step, if there is one.  Every rank calls it once a step."""
        number = self.received
        if self.cpus is not None:
            number = self.agreed()
            self.sent = torch.tensor(self.received)
            self.work = dist.all_reduce(self.sent, dist.ReduceOp.MAX, group=self.cpus, async_op=True)
        if number == 0:
            return None
        return Interrupted(f"stopped by {signal.Signals(number).name} after step {step}; go on with --resume")

    def agreed(self) -> int:
        """The signal that any rank had received one step ago, or 0."""
        if self.work is None:
            return 0
        self.work.wait()
        return int(self.sent)

    def close(self) -> None:
        self.agreed()
        for number, handler in self.before.items():
            signal.signal(number, handler)


def used_up(domains: list[str], settings: TrainSettings, processes: Processes) -> UserError | None:
    """Domains about to start over in a new order: say so, or return the reason to stop if on_exhausted asks for that."""
    if domains and settings.on_exhausted == "error":
        return UserError(f"domain {domains[0]} is used up and on_exhausted = error; prepare more of it, or go on with "
                         "--resume --on_exhausted=wrap")
    for domain in domains:
        processes.say(f"warning: domain {domain} is used up; its sequences come again in a new order")
    return None


# ---- optimizer and schedule


def make_optimizer(groups: list[dict]) -> torch.optim.AdamW:
    """AdamW as the paper sets it.  groups: {"name", "params", "lr", and "maximize" or "weight_decay" where they differ}.

    Each group keeps its peak as "peak_lr"; `set_lr` scales it.
    """
    groups = [dict(g, peak_lr=g["lr"]) for g in groups if g["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)


def lr_factor(step: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to min_lr_ratio at max_steps."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def clip_and_step(optimizer: torch.optim.AdamW, factor: float, grad_clip: float) -> dict[str, Tensor]:
    """Clip each group by its own gradient norm (to its "clip", or grad_clip), then step with `factor` times every peak rate.

    A non-finite norm skips the step, on the device and so without a sync: the fused AdamW does nothing where its
    `found_inf` is 1.  Returns "grad_norm/weights" and so on, before clipping, and "skipped", 1.0 or 0.0; on the device.
    """
    norms = []
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        norm = nn.utils.clip_grad_norm_(group["params"], group.get("clip", grad_clip), foreach=True)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norms = torch.stack(norms)
    optimizer.grad_scale, optimizer.found_inf = None, 1.0 - norms.isfinite().all().float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    named = {f"grad_norm/{group['name']}": norm for group, norm in zip(optimizer.param_groups, norms)}
    return named | {"skipped": optimizer.found_inf}


def average_gradients(parameters: list[nn.Parameter], processes: Processes) -> None:
    """Average the gradients of a few replicated parameters over ranks, as one tensor."""
    if processes.world > 1 and parameters:
        flat = processes.sum(torch.cat([p.grad.flatten() for p in parameters])) / processes.world
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))
