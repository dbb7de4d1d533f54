"""How cost grows: measured exponents beside the FLOP count's, and what larger machines should give, on paper.

    python -m tools.scaling --what=growth --out=docs/growth.svg
    python -m tools.scaling --what=paper

growth: steps of pretrain.py (bench.py's) over hidden sizes and sequence lengths, in CPU seconds of one thread, and
t = c x^a fitted to the larger half of each.  paper: tokens a second and GPU for Llama-2-7B -> 1.3B by what run/cost.py
counts of a step, with its assumptions.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from model import ModelConfig, Transformer
from pretrain import PretrainSettings
from run.cost import LINKS, PRODUCTS, TRAFFIC, Parts, per_device, run_seconds
from run.metrics import PEAK_FLOPS
from run.processes import start_processes
from run.settings import FilePath, check, run_stage
from tools.bench import BenchSettings, measure


@dataclass(frozen=True)
class ScalingSettings:
    what: Literal["growth", "paper"] = "paper"  # measure and plot, or only calculate
    out: FilePath = "docs/growth.svg"  # the plot of growth
    rounds: int = 3  # steps at each point; the median counts


SMALL = BenchSettings(steps="dense", memory=False, clock="cpu", threads=1, device="cpu", n_layers=2, n_heads=4, n_kv_heads=4,
                      vocab_size=2048)
HIDDEN_SIZES = (256, 384, 512, 768, 1024)  # at 1 x 512 tokens, heads of 64, f = 2.75 d
SEQ_LENS = (256, 512, 1024, 2048, 4096)  # at d = 256, one sequence


def points() -> dict[str, list[tuple[int, BenchSettings]]]:
    """What is measured: by the quantity that grows, (its value, the step)."""
    def at_hidden_size(d: int) -> BenchSettings:
        return dataclasses.replace(SMALL, hidden_size=d, n_heads=d // 64, n_kv_heads=d // 64, intermediate_size=d * 11 // 4,
                                   seq_len=512, micro_batch_size=1)

    return {"hidden size": [(d, at_hidden_size(d)) for d in HIDDEN_SIZES],
            "sequence length": [(T, dataclasses.replace(at_hidden_size(256), seq_len=T)) for T in SEQ_LENS]}


def exponent(x: list[float], y: list[float]) -> float:
    """a of y = c x^a, least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def growth(cfg: ScalingSettings) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    torch.set_num_threads(1)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for axis, (name, sizes) in zip(axes, points().items()):
        seconds, flops = [], []
        for _, step in sizes:
            step = dataclasses.replace(step, rounds=cfg.rounds)
            rounds = measure(step, start_processes(step.train_settings()))["dense"]
            seconds.append(statistics.median(sum(r.values()) for r in rounds))
            flops.append(step.micro_batch_size * step.seq_len * step.shape.train_flops_per_token(step.seq_len))
        x = [size for size, _ in sizes]
        for size, t, f in zip(x, seconds, flops):
            print(f"{name} {size}: {t:.3f} s, {f / 1e9:.1f} GFLOP, {f / t / 1e9:.1f} GFLOP/s")
        measured, counted = exponent(x[-3:], seconds[-3:]), exponent(x[-3:], flops[-3:])
        print(f"{name}: exponent over the last three {measured:.2f}, of the FLOP count {counted:.2f}")
        axis.loglog(x, seconds, "o-", label=f"measured, exponent {measured:.2f}")
        scale = seconds[-1] / flops[-1]
        axis.loglog(x, [f * scale for f in flops], "--", label=f"FLOP count, exponent {counted:.2f}")
        axis.set(xlabel=name, ylabel="CPU seconds a step", xticks=x, xticklabels=x)
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(cfg.out)


# ---- on paper


SHAPES = {"7B": (4096, 32, 32, 11008), "2.7B": (2560, 32, 20, 6912), "1.3B": (2048, 24, 16, 5504)}  # d, L, H, f
RUNS = [  # shape, parallel, GPU, GPUs, sequences, micro-batch, published tokens a second and A100 (authors' README)
    ("7B", "fsdp", "A100", 8, 32, 2, 1844), ("7B", "fsdp", "H100", 8, 32, 2, None),
    ("7B", "fsdp", "A100", 128, 128, 1, None), ("7B", "fsdp", "H100", 128, 128, 1, None),
    ("2.7B", "ddp", "A100", 16, 256, 1, 4957), ("1.3B", "ddp", "A100", 16, 256, 4, 8684),
    ("1.3B", "ddp", "A100", 8, 256, 4, None), ("1.3B", "ddp", "H100", 8, 256, 4, None),
    ("1.3B", "ddp", "A100", 128, 256, 2, None), ("1.3B", "ddp", "H100", 128, 256, 2, None)]
SEQ_LEN = 4096


def paper() -> None:
    """One step of each run by run/cost.py's count, which --plan tells of any config: selective checkpointing, dense."""
    print(f"products at {PRODUCTS:.0%} of the peak, memory at {TRAFFIC:.0%}, links at {LINKS:.0%}, sequences of {SEQ_LEN}; "
          "tokens/s a GPU")
    row = "{:<6}{:>11}{:>12}{:>12}{:>12}{:>10}{:>10}{:>8}{:>11}{:>9}"
    print(row.format("model", "GPUs", "products s", "all else s", "messages s", "eager", "compiled", "MFU", "published",
                     "its MFU"))
    for name, parallel, gpu, gpus, sequences, micro, published in RUNS:
        d, L, H, f = SHAPES[name]
        shape = ModelConfig(vocab_size=32000, hidden_size=d, n_layers=L, n_heads=H, n_kv_heads=H, head_dim=128,
                            intermediate_size=f)
        eager = PretrainSettings(data_dir="-", out_dir="-", init_from="-", update="constant", seq_len=SEQ_LEN, max_steps=1,
                                 parallel=parallel, global_batch_size=sequences, micro_batch_size=micro, device="cuda",
                                 compile="off")
        _, step = per_device(shape, {}, eager, Parts(Transformer), gpus, checkpointing="selective")
        found = [run_seconds(shape, cfg, step, gpus, gpu, domains=0, checkpoint_bytes=0, parts=Parts(Transformer))
                 for cfg in (eager, dataclasses.replace(eager, compile="on"))]
        rates = [sequences * SEQ_LEN / gpus / each["in all"] for each in found]
        flops = shape.train_flops_per_token(SEQ_LEN) / PEAK_FLOPS[gpu]
        print(row.format(name, f"{gpus} x {gpu}", f"{found[0]['products']:.2f}", f"{found[0]['all else']:.2f}",
                         f"{found[0]['messages']:.2f}", f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{rates[1] * flops:.1%}",
                         published or "", f"{published * flops:.1%}" if published else ""))


def main(cfg: ScalingSettings) -> None:
    check(cfg.rounds > 0, f"rounds = {cfg.rounds} must be above 0")
    growth(cfg) if cfg.what == "growth" else paper()


if __name__ == "__main__":
    run_stage(main, ScalingSettings)
