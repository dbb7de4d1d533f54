"""What both training loops need around their own code: processes and device, optimizer and schedule, metrics.

Nothing here knows the method.
"""

import dataclasses
import importlib.util
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from settings import Interrupted, TrainSettings, UserError, check


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
    dtype = {"auto": torch.bfloat16 if kind == "cuda" else torch.float32,
             "float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    if settings.attention == "flash_attn":
        check(kind == "cuda" and dtype == torch.bfloat16, f"attention = flash_attn needs cuda and bfloat16, not {kind} "
              f"and {dtype}; take --attention=sdpa")
        check(importlib.util.find_spec("flash_attn") is not None,
              "attention = flash_attn, but the package flash-attn is not installed; take --attention=sdpa")
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
        cpus = dist.new_group(backend="gloo", timeout=timedelta(hours=2))  # the others wait while rank 0 writes a checkpoint
    return Processes(rank, world, device, dtype, cpus)


def shard(model: nn.Module, settings: TrainSettings, processes: Processes) -> nn.Module:
    """With parallel = fsdp, shard the parameters over all processes, layer by layer (FSDP2); before they have values.

    The shards stay fp32; layers compute in the dtype of autocast, and gradients are summed in fp32.  Inputs are not cast:
    masks stay fp32.
    """
    if settings.parallel == "fsdp" and processes.world > 1:
        low = None if processes.dtype == torch.float32 else processes.dtype
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(processes.device.type, (processes.world,))
        for module in [*model.model["layers"], model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def wrap(model: nn.Module, settings: TrainSettings, processes: Processes) -> nn.Module:
    """The module to call in training: compiled in place if asked, in DDP if there are several processes.

    The argument stays the module to save and to evaluate: its parameter names never change.
    """
    if settings.compile:
        model.compile()
    if processes.world == 1 or settings.parallel == "fsdp":
        return model
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def no_sync(model: nn.Module, last: bool):
    """Hold DDP's gradient all-reduce back in all micro-steps but the last."""
    return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


# ---- reasons to stop before the last step


class Signals:
    """SIGTERM and SIGUSR1 ask a run to save and exit.  All ranks agree on the step, and no device waits for that:

    each step starts the maximum of what the ranks have received, between their CPUs, and the next step reads it.
    """

    def __init__(self, processes: Processes):
        self.cpus, self.received, self.sent, self.work = processes.cpus, 0, None, None
        self.before = {s: signal.signal(s, self.receive) for s in (signal.SIGTERM, signal.SIGUSR1)}

    def receive(self, number: int, frame) -> None:
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
    """AdamW as the paper sets it.  groups: {"params", "lr", and "maximize" or "weight_decay" where they differ}.

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


def clip_and_step(optimizer: torch.optim.AdamW, factor: float, grad_clip: float) -> tuple[Tensor, Tensor]:
    """Clip each group by its own gradient norm, then step with `factor` times every peak rate.

    A non-finite norm skips the step, on the device and so without a sync: the fused AdamW does nothing where its
    `found_inf` is 1.  Returns (norm of each group [groups], 1.0 if the step was skipped else 0.0), on the device.
    """
    norms = []
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        norm = nn.utils.clip_grad_norm_(group["params"], grad_clip, foreach=True)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norms = torch.stack(norms)
    optimizer.grad_scale, optimizer.found_inf = None, 1.0 - norms.isfinite().all().float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms, optimizer.found_inf


def average_gradients(parameters: list[nn.Parameter], processes: Processes) -> None:
    """Average the gradients of a few replicated parameters over ranks, as one tensor."""
    if processes.world > 1 and parameters:
        flat = processes.sum(torch.cat([p.grad.flatten() for p in parameters])) / processes.world
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))


# ---- metrics

# Peak dense bf16 operations a second, by a part of the device's name (vendors' data sheets)
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A10G": 70e12,
              "L40S": 362e12, "L4": 121e12, "V100": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(processes: Processes) -> float | None:
    """Peak operations a second of all devices of the run, None for a device that PEAK_FLOPS does not know."""
    if processes.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(processes.device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    return None if peak is None else peak * processes.world


def replace(new: Path, old: Path) -> None:
    """Give a file the name of another, which after a crash is the one or the other."""
    with new.open() as file:
        os.fsync(file.fileno())
    os.replace(new, old)


class Metrics:
    """metrics.jsonl of a run, TensorBoard or W&B beside it, and the progress bar.  Only rank 0 writes.

    A line holds "step", the number of optimizer steps done, so a run that resumes at step s cuts the lines past s.
    Between lines everything is added up on the device: one sync a line.  A checkpoint between two lines holds the sums.
    """

    def __init__(self, settings: TrainSettings, processes: Processes, state: RunState, *, flops_per_token: float):
        self.settings, self.processes, self.state, self.flops_per_token = settings, processes, state, flops_per_token
        held = dict(state.unlogged)
        self.steps = int(held.pop("steps", 0))  # since the last line
        self.seconds, self.started = held.pop("seconds", 0.0), None
        self.in_row = torch.tensor(held.pop("in_row", 0.0), device=processes.device)  # skipped steps up to now
        self.sums = {name: torch.tensor(value, device=processes.device) for name, value in held.items()}
        self.stop: UserError | None = None  # the reason, after too many skipped steps
        self.bar = tqdm(total=settings.max_steps, initial=state.step, disable=True if processes.rank else None)
        self.file = self.board = None
        if processes.rank == 0:
            self.open()

    def open(self) -> None:
        path = Path(self.settings.out_dir) / "metrics.jsonl"
        step, logger = self.state.step, self.settings.logger
        try:
            old = path.read_text().splitlines(keepends=True) if path.exists() and step else []
            cut = path.with_suffix(".tmp")
            cut.write_text("".join(x for x in old if x.endswith("\n") and json.loads(x)["step"] <= step))
            replace(cut, path)
            config = path.with_name("config.json")
            config.with_suffix(".tmp").write_text(json.dumps(dataclasses.asdict(self.settings), indent=2) + "\n")
            replace(config.with_suffix(".tmp"), config)
            self.file = path.open("a", buffering=1)  # by line
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} has a line that is not ours; move the file away") from None
        if logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.settings.out_dir, purge_step=step + 1)
        elif logger == "wandb":
            import wandb

            self.board = wandb.init(project="nanoshear", name=Path(self.settings.out_dir).name,
                                    dir=self.settings.out_dir, config=dataclasses.asdict(self.settings))

    def start_clock(self) -> None:
        """Time counts from here to the next line: called before each step's work, evaluation and saving left out."""
        if self.started is None:
            self.started = time.perf_counter()

    def stop_clock(self) -> None:
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum whose mean over steps the next line reports; a 0-d tensor on the device."""
        self.sums[name] = self.sums.get(name, 0) + value.detach()

    def add_norms(self, norms: Tensor, skipped: Tensor) -> None:
        """What `clip_and_step` returned; ends a step."""
        for name, norm in zip(("weights", "log_alpha", "multipliers"), norms):
            self.add(f"grad_norm/{name}", norm)
        self.add("skipped", skipped)
        self.in_row = (self.in_row + skipped) * skipped
        self.steps += 1

    def hold(self) -> None:
        """Put what no line holds yet into the state that is about to be saved, and the lines onto the disk."""
        if self.file is not None:
            os.fsync(self.file.fileno())
        self.state.unlogged = {"in_row": float(self.in_row)} if self.in_row else {}
        if self.steps:
            loss = self.processes.sum(self.sums["loss"].clone()) / self.processes.world
            self.state.unlogged |= {name: float(v) for name, v in (self.sums | {"loss": loss}).items()}
            self.state.unlogged |= {"steps": self.steps, "seconds": self.seconds}

    def log(self, values: dict[str, float | Tensor]) -> None:
        """One line of training: means since the last one, and `values`.  Sets `stop` after too many skipped steps."""
        cfg, processes = self.settings, self.processes
        values = {name: value / self.steps for name, value in self.sums.items()} | values
        values["loss"] = processes.sum(values["loss"].clone()) / processes.world
        values |= {"in_row": self.in_row, "skipped": values["skipped"] * self.steps}
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        numbers = torch.stack([v.float().to(processes.device) for v in tensors.values()]).tolist()  # the one sync
        self.stop_clock()
        values |= dict(zip(tensors, numbers))
        in_row = int(values.pop("in_row"))
        self.state.skipped += int(values["skipped"])
        rate = self.steps * cfg.global_batch_size * cfg.seq_len / self.seconds
        peak = peak_flops(processes)
        self.write(values | {"lr_factor": lr_factor(self.state.step - 1, cfg), "tokens_per_second": rate,
                             "mfu": None if peak is None else rate * self.flops_per_token / peak,
                             "skipped": self.state.skipped})
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update(self.state.step - self.bar.n)
        self.sums, self.steps, self.seconds = {}, 0, 0.0
        if in_row >= cfg.max_skipped:
            self.stop = UserError(f"the gradient was not finite in {in_row} steps in a row, up to step {self.state.step}; "
                                  f"{cfg.out_dir} holds the weights as they were before those: look for the cause in the "
                                  "data, or --resume with a lower learning_rate")

    def evaluation(self, losses: dict[str, float | None]) -> None:
        """One line of an evaluation, and the same for people."""
        state, known = self.state, [v for v in losses.values() if v is not None]
        values = {f"eval_loss/{d}": v for d, v in losses.items()}
        values |= {f"domain_weight/{d}": w for d, w in state.domain_weights.items()}
        self.write(values | {"eval_loss": sum(known) / len(known) if known else None})
        self.processes.say(f"step {state.step}: " + ", ".join(
            f"{d} {'n/a' if v is None else f'{v:.4f}'} (weight {state.domain_weights[d]:.3f})" for d, v in losses.items()))

    def write(self, values: dict[str, float | None]) -> None:
        """One line: the step and flat names with their values; None, as for any that is not finite, where there is none."""
        if self.file is None:
            return
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        try:
            self.file.write(json.dumps({"step": self.state.step} | values) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.file.name}: {error.strerror}; then go on with --resume") from None
        numbers = {name: value for name, value in values.items() if value is not None}
        if self.settings.logger == "tensorboard":
            for name, value in numbers.items():
                self.board.add_scalar(name, value, self.state.step)
        elif self.settings.logger == "wandb":
            self.board.log(numbers, step=self.state.step)

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.finish() if self.settings.logger == "wandb" else self.board.close()
