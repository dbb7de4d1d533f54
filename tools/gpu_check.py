"""What only a GPU can show: checks, speed and memory against the plan, and a short run of every stage; `make gpu`.

    python -m tools.gpu_check                 # writes docs/gpu.md; about half an hour on one GPU
    python -m tools.gpu_check --parts=checks,bench --out=out/gpu.md

Needs no network, and of packages only torch (2.7 or newer), numpy, safetensors, tqdm and transformers.  Without a GPU it
says so, and ends with status 0.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from l0 import L0, mask_sets
from model import Transformer
from run.cost import Parts, per_device
from run.processes import start_processes
from run.settings import require, run_stage
from tools.bench import BenchSettings, in_new_process, matrix_rate, measure
from tools.demo import files
from tools.gpu_cases import CHECKS


@dataclass(frozen=True)
class GpuSettings:
    parts: str = "checks,bench,pipeline"  # what to run
    out: str = "docs/gpu.md"  # the report, which is written anew: a part of it goes elsewhere
    rounds: int = 5  # steps timed of each kind; the median counts
    steps: int = 300  # of each training stage of the pipeline
    device: str = "cuda"  # cpu: to try this tool itself

    def __post_init__(self):
        for part in self.parts.split(","):
            require(part in ("checks", "bench", "pipeline"), f"parts has {part!r}, which is not checks, bench or pipeline")
        require(self.out != "docs/gpu.md" or len(set(self.parts.split(","))) == 3,
                f"parts = {self.parts} alone would replace docs/gpu.md; give another --out")
        require(self.rounds > 0 < self.steps, f"rounds = {self.rounds} and steps = {self.steps} must be above 0")


SIZES = {"1.3B": dict(hidden_size=2048, n_layers=24, n_heads=16, n_kv_heads=16, intermediate_size=5504, micro_batch_size=4),
         "370M": dict(hidden_size=1024, n_layers=24, n_heads=8, n_kv_heads=8, intermediate_size=2816, micro_batch_size=8)}
KINDS = [(variant, compiled) for variant in ("masked", "dense", "hf") for compiled in ("off", "on")]
MFU, MASKED, PEAK = 0.5, 0.93, 0.1  # the goals, of 1.3B: dense; masked over dense; the plan's peak from the measured one


def run_checks(device: torch.device) -> tuple[list[str], int]:
    """The lines of the report, and how many checks failed.  One that fails does not keep the others from running."""
    lines, failed = ["| check | found |", "|---|---|"], 0
    for name, work in CHECKS.items():
        try:
            found = work(device)
        except Exception as error:  # whatever it is, it is this check's result
            failed += 1
            found = f"**failed**: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{name}: {found}", flush=True)
        lines.append(f"| {name} | {found} |")
    return lines, failed


def time_steps(cfg: BenchSettings) -> dict[str, float] | None:
    """Tokens a second, share of the peak and peak bytes of one variant, in this process, which must be fresh; None if the
    device has not the memory."""
    processes = start_processes(cfg.train_settings())
    try:
        seconds = statistics.median(sum(phases.values()) for phases in measure(cfg, processes)[cfg.variants[0]])
    except torch.OutOfMemoryError:
        return None
    tokens = cfg.micro_batch_size * cfg.seq_len
    return {"tokens": tokens / seconds, "bytes": torch.cuda.max_memory_allocated(),
            "mfu": tokens * cfg.shape.train_flops_per_token(cfg.seq_len) / seconds / matrix_rate(cfg, processes)}


def planned_bytes(cfg: BenchSettings) -> float:
    """What --plan says of such a step on one device."""
    masked, shape = cfg.steps == "masked", cfg.shape
    halves = {name: getattr(shape, name) // 2
              for name in ("hidden_size", "n_layers", "n_heads", "n_kv_heads", "intermediate_size")}
    sets = mask_sets(shape, dataclasses.replace(shape, **halves)) if masked else {}
    return per_device(shape, sets, cfg.train_settings(masked), Parts(Transformer, L0), 1,
                      checkpointing=cfg.checkpointing)[0]["peak"]


def run_bench(rounds: int) -> list[str]:
    """The lines of the report: every kind of step in a process of its own."""
    lines = ["| model | step | tokens/s | MFU | peak GB | planned GB |", "|---|---|---|---|---|---|"]
    found = {}
    for size, shape in SIZES.items():
        for variant, compiled in KINDS:
            ours = variant != "hf"
            cfg = BenchSettings(steps=variant if ours else "", against="" if ours else "hf", device="cuda", compile=compiled,
                                seq_len=4096, rounds=rounds, memory=False, **shape)
            row = f"| {size} | {variant if ours else 'transformers'}{', compiled' * (compiled == 'on')} |"
            each = in_new_process(time_steps, cfg)
            if each is None:
                lines.append(f"{row} out of memory | | | |")
                continue
            planned = planned_bytes(cfg) if ours else None
            found[size, variant, compiled] = each | {"planned": planned}
            lines.append(f"{row} {each['tokens']:,.0f} | {each['mfu']:.1%} | {each['bytes'] / 1e9:.1f} | "
                         f"{'' if planned is None else f'{planned / 1e9:.1f}'} |")
            print(lines[-1], flush=True)
    return [*lines, "", *goals(found)]


def goals(found: dict[tuple[str, str, str], dict[str, float]]) -> list[str]:
    """What was asked of the largest model, and what came of it."""
    large = {(variant, compiled): each for (size, variant, compiled), each in found.items() if size == "1.3B"}
    if not {("dense", "on"), ("masked", "on")} <= large.keys():
        return ["The goals could not be measured: a step of 1.3B did not run."]
    best = {variant: max(each["tokens"] for (v, _), each in large.items() if v == variant)
            for variant in ("dense", "masked")}
    mfu = max(each["mfu"] for (variant, _), each in large.items() if variant == "dense")
    off = max(abs(each["planned"] / each["bytes"] - 1) for each in large.values() if each["planned"])
    return [f"- dense 1.3B: {mfu:.1%} MFU, asked {MFU:.0%}: {'met' if mfu >= MFU else '**missed**'}",
            f"- masked / dense: {best['masked'] / best['dense']:.3f}, asked {MASKED}: "
            f"{'met' if best['masked'] >= MASKED * best['dense'] else '**missed**'}",
            f"- the plan's peak is off by {off:.1%}, asked {PEAK:.0%}: {'met' if off <= PEAK else '**missed**'}"]


def write_text(raw: Path) -> None:
    """Real text that is there wherever this runs: Python's library, its help topics, and torch's headers."""
    from pydoc_data.topics import topics

    texts = {"python": files(Path(sysconfig.get_path("stdlib")), "*.py"), "help": iter(topics.values()),
             "cpp": files(Path(torch.__file__).parent / "include", "*.h")}
    for domain, documents in texts.items():
        (raw / domain).mkdir(parents=True)
        with (raw / domain / "part.jsonl").open("w", encoding="utf-8") as file:
            for text, _ in zip(documents, range(1500)):
                file.write(json.dumps({"text": text}) + "\n")


def write_tokenizer(raw: Path, path: Path) -> None:
    """tokenizer.json with 2048 pieces of bytes, by the package that comes with transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    documents = (json.loads(line)["text"] for part in sorted(raw.glob("*/*.jsonl")) for line in part.open(encoding="utf-8"))
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))


def run_pipeline(device: str, steps: int) -> list[str]:
    """prepare, pretrain, prune, compact, continue, export and its check against transformers.  The lines of the report."""
    lines, shape = ["| stage | seconds | last loss, nats a token |", "|---|---|---|"], dict(
        vocab_size=2048, hidden_size=512, n_layers=8, n_heads=8, n_kv_heads=4, head_dim=64, intermediate_size=1376)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_text(folder / "raw")
        write_tokenizer(folder / "raw", folder / "tokenizer.json")
        train = [f"--data_dir={folder}/data", "--seq_len=256", "--global_batch_size=16", "--micro_batch_size=16",
                 f"--max_steps={steps}", f"--warmup_steps={max(1, steps // 20)}", "--eval_sequences=64",
                 f"--device={device}", "--compile=off"]
        target = ["--target_hidden_size=320", "--target_n_layers=6", "--target_n_heads=4", "--target_n_kv_heads=2",
                  "--target_intermediate_size=800", f"--lagrangian_warmup_steps={max(1, steps * 2 // 5)}"]
        for name, *arguments in (
                ("prepare", f"--input_dir={folder}/raw", f"--out_dir={folder}/data", f"--tokenizer={folder}/tokenizer.json",
                 "--eval_fraction=0.05", "--prune_fraction=0.3"),
                ("pretrain", *train, f"--shape={json.dumps(shape)}", f"--out_dir={folder}/source", "--update=constant",
                 "--learning_rate=2e-3"),
                ("prune", *train, *target, f"--init_from={folder}/source/step_{steps:07d}", f"--out_dir={folder}/prune",
                 "--learning_rate=1e-3"),
                ("compact", f"--checkpoint={folder}/prune", f"--out_dir={folder}/compact"),
                ("pretrain", *train, f"--init_from={folder}/compact", f"--out_dir={folder}/continue", "--learning_rate=1e-3",
                 f"--domain_weights={folder}/compact/domain_weights.json",
                 f"--reference_loss={folder}/compact/reference_loss.json"),
                ("convert", f"--to_hf={folder}/continue/step_{steps:07d}", f"--out_dir={folder}/export", "--verify")):
            started = time.perf_counter()
            done = subprocess.run([sys.executable, f"{name}.py", *arguments], capture_output=True, text=True)
            assert done.returncode == 0, f"{name}.py: {done.stderr[-1000:]}"
            out = next((a.partition("=")[2] for a in arguments if a.startswith("--out_dir=")), "")
            metrics = Path(out) / "metrics.jsonl"
            losses = [json.loads(line).get("eval_loss") for line in metrics.open()] if metrics.exists() else []
            last = [loss for loss in losses if loss is not None]
            lines.append(f"| {name} | {time.perf_counter() - started:.0f} | {f'{last[-1]:.3f}' if last else ''} |")
            print(lines[-1], flush=True)
    return lines


def main(cfg: GpuSettings) -> None:
    if cfg.device == "cuda" and not torch.cuda.is_available():
        return print("gpu_check: torch sees no CUDA device here: 0 passed")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or its products are not the same twice
    device, parts, lines, failed = torch.device(cfg.device, 0), cfg.parts.split(","), [], 0
    name = torch.cuda.get_device_name() if cfg.device == "cuda" else cfg.device
    if "checks" in parts:
        found, failed = run_checks(device)
        lines += ["## Checks", "", *found, ""]
    if "bench" in parts:
        lines += ["## Whole steps", "", *run_bench(cfg.rounds), ""]
    if "pipeline" in parts:
        lines += ["## All stages, on real text", "", *run_pipeline(cfg.device, cfg.steps), ""]
    title = [f"# On one {name}, as measured", "", f"By `make gpu`; torch {torch.__version__}.", ""]
    Path(cfg.out).write_text("\n".join([*title, *lines]))
    print(f"{len(CHECKS) * ('checks' in parts) - failed} passed, {failed} failed; {cfg.out} is written")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_stage(main, GpuSettings)
