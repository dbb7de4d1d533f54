"""Run a matrix of cells, each a way from a source to a trained model of the target's shape, and keep what they end at.

    python -m experiments.run --ladder=demo                      # all cells of a ladder that are not in its results yet
    python -m experiments.run --ladder=small --only=learned      # those whose way is `learned`
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

from model import ModelConfig
from run.settings import UserError, check, run_stage
from run.weights import latest_checkpoint, read_model_config
from tools import demo

RESULTS = Path("experiments/results")
SPLIT = "prune"  # of the data, that choosing sees; cells train on `train`


@dataclass(frozen=True)
class Way:
    """How units are chosen: scores of tools.importance, or masks that prune.py learns from such scores."""

    score: str  # of tools.importance; "": none
    sequences: int = 0  # that the scores are measured on
    at_once: int = 8  # of those
    steps: int = 0  # of prune.py; 0: the scores choose
    batch: int = 0  # sequences of such a step
    rate: float = 0.1  # of the scores
    sampled: str = ""  # the released recipe, weights trained under sampled masks, and how it counts; "": masks alone
    budget: int = 1  # times the ladder's
    target: dict[str, int] | None = None  # target_* of prune.py; None: the ladder's
    kd_weight: float = 0.0  # of the source's distribution in the training of the cut model
    mixture: str = "constant"  # of domains: constant, or doremi steered by clipped or signed excess over the source's losses
    rival: str = "activation"  # the way that it is compared with, seed by seed


@dataclass(frozen=True)
class Ladder:
    """A source, a target, and what all cells share."""

    target: dict[str, int]  # target_* of prune.py
    seq_len: int
    batch: int  # sequences a step of the cut model
    budget: int  # steps of the cut model that every cell may spend, choosing included
    learning_rate: float
    ways: dict[str, Way]
    seeds: tuple[int, ...] = (1, 2, 3)
    source_steps: int = 0  # of pretrain.py, for the source's own training; 0: it is there
    source_shape: dict | None = None
    bytes_a_domain: int = 2_500_000
    eval_sequences: int = 100


SMALL_SHAPE = {"vocab_size": 2048, "hidden_size": 192, "n_layers": 8, "n_heads": 6, "n_kv_heads": 3, "head_dim": 32,
               "intermediate_size": 512, "context_length": 256, "tie_embeddings": True}


def target(hidden_size: int, n_layers: int, n_heads: int, n_kv_heads: int, intermediate_size: int) -> dict[str, int]:
    """target_* of prune.py."""
    return {f"target_{name}": value for name, value in locals().items()}


RIVALS = {
    "learned": Way("activation", 32, steps=40, batch=4),
    "activation": Way("activation", 128),
    "gradient": Way("gradient", 32, 1),
    "magnitude": Way("magnitude", 8),
    "random": Way("random", 8),
    "sampled": Way("", steps=60, batch=16, sampled="expected"),
    "scratch": Way(""),
}
CUT_28, CUT_74 = target(176, 7, 6, 3, 416), target(128, 4, 4, 2, 320)
QUESTIONS = {  # of the small ladder, beside the rivals
    "sampled_rescaled": Way("", steps=60, batch=16, sampled="rescaled"),
    "learned_28": Way("activation", 32, steps=40, batch=4, target=CUT_28, rival="activation_28"),
    "activation_28": Way("activation", 128, target=CUT_28),
    "learned_74": Way("activation", 32, steps=40, batch=4, target=CUT_74, rival="activation_74"),
    "activation_74": Way("activation", 128, target=CUT_74),
    "learned_10_steps": Way("activation", 32, steps=10, batch=4, rival="learned"),
    "learned_160_steps": Way("activation", 32, steps=160, batch=4, rival="learned"),
    "activation_kd_0.5": Way("activation", 128, kd_weight=0.5),
    "activation_kd_1": Way("activation", 128, kd_weight=1.0),
    "activation_clipped": Way("activation", 128, mixture="clipped"),
    "activation_signed": Way("activation", 128, mixture="signed"),
    "activation_x4": Way("activation", 128, budget=4, rival="scratch_x4"),
    "scratch_x2": Way("", budget=2),
    "scratch_x4": Way("", budget=4),
    "scratch_x8": Way("", budget=8),
}
REAL = {
    "learned": Way("activation", 16, steps=16, batch=2),
    "activation": Way("activation", 16),
    "gradient": Way("gradient", 8, 1),
    "sampled": Way("", steps=8, batch=4, sampled="expected"),
    "activation_kd_0.5": Way("activation", 16, kd_weight=0.5),
    "activation_kd_1": Way("activation", 16, kd_weight=1.0),
}
LADDERS = {
    # the demo's own source, far from converged, and its data: after `make demo`
    "demo": Ladder(target=CUT_74, seq_len=128, batch=16, budget=300, learning_rate=2e-3, ways=RIVALS),
    # a source at a plateau of its learning rate: 3.6 M parameters, 5.1 M tokens; the main cut is 55%
    "small": Ladder(target=target(144, 6, 4, 2, 384), seq_len=128, batch=16, budget=300, learning_rate=2e-3,
                    ways=RIVALS | QUESTIONS, source_steps=2500, source_shape=SMALL_SHAPE, bytes_a_domain=6_000_000),
    # real weights: half of SmolLM2-135M's parameters without the embedding
    "smollm2": Ladder(target=target(448, 26, 6, 2, 1152), seq_len=256, batch=4, budget=100, learning_rate=3e-4, ways=REAL,
                      bytes_a_domain=2_500_000, eval_sequences=8),
}


@dataclass(frozen=True)
class ExperimentSettings:
    ladder: str  # demo, small or smollm2
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
    if out.name == "demo":
        source = latest_checkpoint(demo.OUT / "source")
        check(source is not None, f"{demo.OUT}/source has no checkpoint: run `make demo` first")
        return demo.OUT / "data", source
    if not raw.exists():
        demo.BYTES_PER_DOMAIN = ladder.bytes_a_domain
        demo.gather(raw.with_suffix(".tmp"))
        raw.with_suffix(".tmp").rename(raw)
    fractions = flags(eval_fraction=0.04, prune_fraction=0.12)
    if ladder.source_shape is None:
        check(source.is_dir(), f"{source} does not exist: run configs/smollm2.sh and copy its source there")
        if not data.exists():
            stage("prepare.py", *flags(input_dir=raw, out_dir=data, tokenizer=source / "assets"), *fractions)
        return data, source
    if not data.exists():
        stage("prepare.py", *flags(input_dir=raw, out_dir=data, train_tokenizer=2048), *fractions)
    if latest_checkpoint(source) is None or latest_checkpoint(source).name != f"step_{ladder.source_steps:07d}":
        stage("pretrain.py", *flags(data_dir=data, out_dir=source, update="constant", shape=ladder.source_shape,
                                    seq_len=ladder.seq_len, global_batch_size=16, micro_batch_size=16,
                                    max_steps=ladder.source_steps, learning_rate=3e-3, warmup_steps=100, min_lr_ratio=0.02,
                                    eval_interval=250, eval_sequences=ladder.eval_sequences, save_interval=250, keep_last=1),
              "--resume")
    return data, latest_checkpoint(source)


def choose(ladder: Ladder, way: Way, seed: int, data: Path, source: Path, out: Path) -> tuple[Path | None, float]:
    """Masks by one way: (folder for compact.py, or None for none; tokens of whole source steps that this cost)."""
    if not way.score and not way.sampled:
        return None, 0.0
    shared = flags(data_dir=data, init_from=source, split=SPLIT, seq_len=ladder.seq_len, seed=seed,
                   **(way.target or ladder.target))
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


def shapes(ladder: Ladder, way: Way, source: Path) -> tuple[ModelConfig, ModelConfig]:
    """The source's shape and the target's."""
    shape = read_model_config(source, ModelConfig)
    return shape, dataclasses.replace(shape, **{k.removeprefix("target_"): v
                                                for k, v in (way.target or ladder.target).items()})


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
        losses = {k.removeprefix("eval_loss/"): v for k, v in evaluations(source.parent)[-1].items() if "/" in k}
        extra, evaluate = extra | {"reference_loss": losses, "excess": way.mixture}, 10
    rate = ladder.learning_rate * (2 if masks is None else 1)  # fresh weights bear more
    stage("pretrain.py", *flags(data_dir=data, out_dir=out / "train", seq_len=ladder.seq_len, seed=seed,
                                global_batch_size=ladder.batch, micro_batch_size=ladder.batch, max_steps=steps,
                                learning_rate=rate, warmup_steps=max(1, steps // 25), save_interval=100, keep_last=1,
                                eval_interval=max(1, steps // evaluate), eval_sequences=ladder.eval_sequences,
                                eval_between=max(1, ladder.eval_sequences // 4), **extra), "--resume")
    first, last = evaluations(out / "train")[0], evaluations(out / "train")[-1]
    domains = {k.removeprefix("eval_loss/"): v for k, v in last.items() if k.startswith("eval_loss/")}
    return {"ladder": name, "way": way_name, "seed": seed, "steps": steps, "spent_source_tokens": round(spent),
            "tokens": steps * ladder.batch * ladder.seq_len, "params": target.n_params(),
            "first_loss": first["eval_loss"], "loss": last["eval_loss"], "domains": domains,
            "at_quarters": [line["eval_loss"] for line in evaluations(out / "train")]}


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
