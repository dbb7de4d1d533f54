"""Time whole training steps, alone or in turns with the same step of transformers and with the bare matrix products.

    python -m tools.bench --against=hf,gemm
    python -m tools.bench --against=hf,gemm --seq_len=2048 --micro_batch_size=1 --checkpointing=full
    python -m tools.bench --device=cuda --hidden_size=2048 --n_layers=24 --n_heads=16 --intermediate_size=5504 \
        --seq_len=4096 --micro_batch_size=16
    torchrun --nproc_per_node=2 -m tools.bench

A step is a stage's own: `train_step` of prune.py (masked) or of pretrain.py (dense), which tells when each phase ends.  All
variants run once a round, in turns, so that a slow minute of the machine hits them alike; reported are medians over rounds,
and the median of each round's ratios with their range.  Peak memory is what a process of
its own needs beyond its imports (on CUDA: what the allocator gave out).
"""

import dataclasses
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import pretrain
import prune
from model import ModelConfig
from run.metrics import peak_flops
from run.processes import Processes, start_processes
from run.settings import TrainSettings, check, require, run_stage
from tools.bench_steps import Stopwatch, build, write_tokens


@dataclass(frozen=True)
class BenchSettings:
    steps: str = "masked,dense"  # what to time: masked (prune.py's step), dense (pretrain.py's), or both
    against: str = ""  # and beside them: hf (transformers' Llama), gemm (bare matrix products), or hf,gemm
    rounds: int = 7  # every variant runs once a round
    memory: bool = True  # measure peak memory too, each variant in a process of its own
    profile: bool = False  # the dearest operators of each step, by torch.profiler

    hidden_size: int = 512  # d
    n_layers: int = 8  # L
    n_heads: int = 8  # H
    n_kv_heads: int = 8  # K
    intermediate_size: int = 1376  # f
    vocab_size: int = 32000  # V
    seq_len: int = 512  # tokens a sequence
    micro_batch_size: int = 4  # sequences a step

    threads: int = 2  # of the CPU
    clock: Literal["wall", "cpu"] = "wall"  # cpu: seconds of this process's threads; for a shared machine, with threads = 1
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on cuda, else float32
    attention: Literal["sdpa", "flash_attn"] = "sdpa"  # of our model
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the layers of ours and of transformers'; auto: on CUDA
    checkpointing: Literal["none", "selective", "full"] = "selective"  # of our model; full: of transformers' too

    def __post_init__(self):
        for name in ("rounds", "seq_len", "micro_batch_size", "threads"):
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)} must be above 0")
        for name, known in (("steps", ("masked", "dense")), ("against", ("hf", "gemm"))):
            for word in getattr(self, name).split(",") if getattr(self, name) else ():
                require(word in known, f"{name} has {word!r}, which is not one of {', '.join(known)}")
        require(bool(self.variants), "steps and against are both empty: nothing to time")
        require(self.n_heads % self.n_kv_heads == 0, f"n_heads = {self.n_heads} does not divide by n_kv_heads")
        require(self.hidden_size % self.n_heads == 0, f"hidden_size = {self.hidden_size} does not divide by n_heads")

    @property
    def variants(self) -> list[str]:
        return [v for v in f"{self.steps},{self.against}".split(",") if v]

    @property
    def shape(self) -> ModelConfig:
        return ModelConfig(vocab_size=self.vocab_size, hidden_size=self.hidden_size, n_layers=self.n_layers,
                           n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.hidden_size // self.n_heads,
                           intermediate_size=self.intermediate_size, context_length=max(4096, self.seq_len))

    def train_settings(self, masked: bool = False) -> TrainSettings:
        world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's; every process has a micro-batch
        shared = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(TrainSettings)}
        values = dict(data_dir="-", out_dir="-", init_from="-", global_batch_size=self.micro_batch_size * world,
                      **{name: getattr(self, name) for name in shared})
        return prune.PruneSettings(**values) if masked else pretrain.PretrainSettings(**values, update="constant")


def resident_peak() -> int:
    """Bytes of the most memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak is that of the parent, as long as it is the higher one
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(cfg: BenchSettings, variant: str) -> int:
    """Bytes that two steps of a variant need at most, in this process, which must be fresh."""
    torch.set_num_threads(cfg.threads)
    processes = start_processes(cfg.train_settings())
    if variant == "hf":
        from transformers import LlamaForCausalLM  # noqa: F401
    watch, before = Stopwatch(processes.device), resident_peak()
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(folder, cfg)
        step = build(cfg, processes, variant, folder, watch)
        for i in range(2):
            watch.start()
            step(i)
    return torch.cuda.max_memory_allocated() if processes.device.type == "cuda" else resident_peak() - before


def in_new_process(function: Callable, *args):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def matrix_rate(cfg: BenchSettings, processes: Processes) -> float:
    """Floating-point operations a second: the device's peak where it is known, else as measured with one large product."""
    if peak_flops(processes) is not None and processes.dtype == torch.bfloat16:  # what the data sheets tell
        return peak_flops(processes) / processes.world
    a = torch.randn(2048, 2048, device=processes.device, dtype=processes.dtype)
    watch, seconds = Stopwatch(processes.device, cfg.clock), []
    for _ in range(8):
        watch.start()
        torch.mm(a, a)
        watch.mark("product")
        seconds.append(watch.seconds()["product"])
    return 2 * 2048**3 / min(seconds)


def measure(cfg: BenchSettings, processes: Processes) -> dict[str, list[dict[str, float]]]:
    """Seconds of each phase, for each variant and round."""
    watch = Stopwatch(processes.device, cfg.clock)
    with tempfile.TemporaryDirectory() as folder:  # what is mapped stays readable when the folder is gone
        write_tokens(folder, cfg)
        steps = {v: build(cfg, processes, v, folder, watch) for v in cfg.variants}
    found = {v: [] for v in steps}
    for i in range(cfg.rounds + 1):
        for variant, step in steps.items():
            watch.start()
            step(i)
            if i:  # the first round warms up
                found[variant].append(watch.seconds())
    if cfg.profile:
        for variant, step in steps.items():
            with torch.profiler.profile() as profiler:
                watch.start()
                step(cfg.rounds + 1)
            key = "self_cuda_time_total" if processes.device.type == "cuda" else "self_cpu_time_total"
            print(f"{variant}\n{profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=50)}")
    return found


def report(cfg: BenchSettings, processes: Processes, found: dict, rate: float, memory: dict[str, int]) -> None:
    """The table, the ratios and where time goes."""
    tokens = cfg.micro_batch_size * cfg.seq_len
    flops = tokens * cfg.shape.train_flops_per_token(cfg.seq_len)
    totals = {v: [sum(r.values()) for r in rounds] for v, rounds in found.items()}
    print(f"{cfg.shape.n_params():,} parameters, {cfg.micro_batch_size} x {cfg.seq_len} tokens a step and process, "
          f"{processes.world} processes, {processes.device.type}, {processes.dtype}; {flops / 1e9:.0f} GFLOP a step, "
          f"products at {rate / 1e9:.0f} GFLOP/s; median of {cfg.rounds} rounds, {cfg.clock} clock")
    print(f"{'step':<8}{'ms':>9}{'tokens/s':>10}{'MFU':>7}{'peak MB':>9}")
    for v, times in totals.items():
        t, m = statistics.median(times), memory.get(v)
        print(f"{v:<8}{1000 * t:>9.0f}{processes.world * tokens / t:>10,.0f}{flops / t / rate:>7.1%}"
              f"{'' if m is None else f'{m / 1e6:.0f}':>9}")
    for a, b in (("masked", "dense"), ("dense", "hf"), ("masked", "hf"), ("masked", "gemm"), ("dense", "gemm")):
        if a in totals and b in totals:
            ratios = [x / y for x, y in zip(totals[a], totals[b])]
            line = f"{a} / {b}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            print(line + (f", memory {memory[a] / memory[b]:.3f}" if a in memory and b in memory else ""))
    for v, rounds in found.items():
        print(f"{v}: " + ", ".join(f"{p} {1000 * statistics.median(r[p] for r in rounds):.1f} ms" for p in rounds[0]))


def main(cfg: BenchSettings) -> None:
    torch.set_num_threads(cfg.threads)
    processes = start_processes(cfg.train_settings())
    check("hf" not in cfg.variants or processes.world == 1, "against = hf runs in one process; take away torchrun")
    memory = {}
    if cfg.memory and processes.world == 1:
        memory = {v: in_new_process(peak_memory, cfg, v) for v in cfg.variants if v != "gemm"}
    found = measure(cfg, processes)
    if processes.rank == 0:
        report(cfg, processes, found, matrix_rate(cfg, processes), memory)


if __name__ == "__main__":
    run_stage(main, BenchSettings)
