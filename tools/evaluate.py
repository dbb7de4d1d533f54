"""An export against the paper's tasks, by lm-evaluation-harness, and against our own held-out text.

    python -m tools.evaluate export/1.3b --out_dir=out/eval_1.3b                   # the paper's tasks, which it downloads
    python -m tools.evaluate export/1.3b --out_dir=out/eval --tasks=my_tasks       # a folder of task files; no network
    python -m tools.evaluate out/demo/export --out_dir=out/eval --names='()' --data_dir=out/demo/data

Each task's result becomes a file in out_dir when it ends, and is taken from there by a later call of the same export and
settings.  The paper's published averages stand beside ours.  `make extras` installs the harness.
"""

import difflib
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

from data import evaluate, open_domains
from run.processes import Processes
from run.settings import FilePath, UserError, check, export_config, read_json, require, run_stage, user_errors
from run.weights import sha256, written

# Task of the harness -> examples shown (arXiv 2310.06694), metric that counts (icl_eval/README.md of the released code)
TASKS = {"sciq": (0, "acc"), "piqa": (0, "acc"), "winogrande": (0, "acc"), "arc_easy": (0, "acc"),
         "arc_challenge": (25, "acc_norm"), "hellaswag": (10, "acc_norm"), "logiqa": (0, "acc_norm"), "boolq": (32, "acc"),
         "lambada_openai": (0, "acc"), "nq_open": (32, "exact_match"), "mmlu": (5, "acc"), "truthfulqa_mc2": (0, "acc")}
AVERAGED = [name for name in TASKS if name != "truthfulqa_mc2"]  # the 11 of the published averages, in percent:
PUBLISHED = [("OPT, about 1B", 48.2), ("Pythia, about 1B", 48.9), ("TinyLlama, about 1B (3T tokens)", 50.0),
             ("Sheared-LLaMA, about 1B", 51.0), ("OPT, about 3B", 51.4), ("Pythia, about 3B", 52.5),
             ("INCITE, about 3B", 54.7), ("OpenLLaMA v1, about 3B", 55.1), ("OpenLLaMA v2, about 3B", 55.7),
             ("Sheared-LLaMA, about 3B", 56.7), ("Llama-2-7B", 64.6)]


@dataclass(frozen=True)
class EvaluateSettings:
    export: FilePath  # Hugging Face folder, as convert.py --to_hf writes it
    out_dir: FilePath  # folder of results, a JSON file a task
    names: tuple[str, ...] | None = None  # tasks to run; None: the paper's, or all of the folder `tasks`
    tasks: FilePath = ""  # folder of task files (.yaml) of the harness, for tasks of your own; "": the harness's tasks
    limit: int = 0  # documents a task at most, for a first try; 0: all
    batch_size: int = 8  # documents, or sequences, a forward pass
    data_dir: FilePath = ""  # folder that prepare.py wrote: the loss on its eval split too, as prune.py measures it
    seq_len: int = 0  # tokens a sequence of data_dir; 0: the export's context
    eval_sequences: int = 500  # sequences a domain of data_dir
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and products; auto: the export's
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else cpu

    positional = "export"

    def __post_init__(self):
        for name, least in dict(batch_size=1, eval_sequences=1, limit=0, seq_len=0).items():
            require(getattr(self, name) >= least, f"{name} = {getattr(self, name)} must be at least {least}")
        require(self.names != () or self.data_dir, "names = () without data_dir: nothing to measure; give one of them")


def fingerprint(folder: str) -> str:
    """SHA-256 over the names and contents of a folder's files."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return hashlib.sha256("".join(f"{p.relative_to(folder)} {sha256(p)}\n" for p in files).encode()).hexdigest()


def kept(cfg: EvaluateSettings, name: str, settings: dict, measure) -> dict:
    """The result in out_dir/NAME.json if it is of these settings, else measure(), which is written there."""
    path = Path(cfg.out_dir) / f"{name}.json"
    if path.exists():
        if (found := read_json(path)).get("settings") == settings:
            print(f"{name}: taken from {path}, of the same export and settings", flush=True)
            return found["result"]
        print(f"{name}: {path} is of another export or other settings; measured again", flush=True)
    result = measure()
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps({"settings": settings, "result": result}, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)
    return result


def load_model(cfg: EvaluateSettings):
    """transformers' model of the export, on the device.  Raises UserError."""
    from transformers import AutoModelForCausalLM
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    try:
        return AutoModelForCausalLM.from_pretrained(cfg.export, dtype=cfg.dtype).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"export = {cfg.export} cannot be loaded: {error}") from None


def losses_of(model, tokens: torch.Tensor, targets: torch.Tensor, masks: dict, *, reduction: str) -> torch.Tensor:
    """The loss of each sequence, [B], of a model of transformers; called as data.evaluate calls ours."""
    logits = model(tokens).logits.float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction).view(targets.shape).mean(1)


def held_out(cfg: EvaluateSettings, indexes: list[Path], load) -> dict[str, float | None]:
    """Loss of each domain of data_dir, nats a token, over the windows that a run's last evaluation takes."""
    config = export_config(cfg.export, "max_position_embeddings", "vocab_size")
    context, vocab_size = config["max_position_embeddings"], config["vocab_size"]
    check(cfg.seq_len <= context, f"seq_len = {cfg.seq_len} is longer than the export's context of {context} tokens")
    with user_errors():
        splits = open_domains(cfg.data_dir, sorted({p.parent.name for p in indexes}), "eval", cfg.seq_len or context)
        check(max(s.max_token for s in splits) < vocab_size, f"data_dir = {cfg.data_dir} has tokens beyond the export's "
              f"{vocab_size}; prepare the text with the export's tokenizer")
        few = SimpleNamespace(eval_sequences=cfg.eval_sequences, eval_batch_size=cfg.batch_size, eval_between=0)
        return evaluate(functools.partial(losses_of, load()), {}, splits, few, Processes(0, 1, load().device, torch.float32))


def task_manager(cfg: EvaluateSettings):
    """What finds tasks by their names: the harness's, or those of the folder `tasks`, which must be there."""
    check(importlib.util.find_spec("lm_eval") is not None, "lm_eval is not installed; pip install -e '.[eval]'")
    from lm_eval.tasks import TaskManager

    for noisy in ("lm_eval", "huggingface_hub"):  # of each setting, of each retry
        logging.getLogger(noisy).setLevel(logging.ERROR)
    check(not cfg.tasks or Path(cfg.tasks).is_dir(), f"tasks = {cfg.tasks} is no folder")
    manager = TaskManager(include_path=os.path.abspath(cfg.tasks) if cfg.tasks else None, include_defaults=not cfg.tasks)
    check(bool(manager.all_subtasks), f"tasks = {cfg.tasks} holds no task file: a .yaml with a line `task: NAME`")
    for name in cfg.names or ():
        near = difflib.get_close_matches(name, manager.task_index, n=1)
        check(name in manager.task_index, f"no task is named {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return manager


def run_task(cfg: EvaluateSettings, name: str, manager, load) -> dict:
    """{"shots": int, "metrics": what the harness reports, such as "acc,none" and "acc_stderr,none"}.  Raises UserError."""
    from lm_eval.evaluator import evaluate as run
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    here = os.getcwd()
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.export)
        os.chdir(cfg.tasks or here)  # paths in a task file are relative to the folder
        loaded = manager.load([name])
    except Exception as error:  # of the harness, datasets, the Hub's client, or a task's own code
        raise UserError(f"task {name} cannot be loaded: {error}; it takes local or cached data, or a network") from None
    finally:
        os.chdir(here)
    for task in loaded["tasks"].values():
        shots = TASKS[name][0] if not cfg.tasks and name in TASKS else task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)  # the harness's own default
    try:
        lm = HFLM(pretrained=load(), tokenizer=tokenizer, batch_size=cfg.batch_size)
        found = run(lm=lm, task_dict=loaded, limit=cfg.limit or None, log_samples=False)["results"]
    except ValueError as error:  # more shots than examples
        raise UserError(f"task {name} does not fit its data: {error}") from None
    check(name in found, f"{name} stands for several tasks; name them: {', '.join(found)}")
    return {"shots": shots, "metrics": {k: v for k, v in found[name].items() if "," in k and k[0] != ","}}


def table(results: dict[str, dict], theirs: bool) -> str:
    """Markdown.  theirs: the harness's tasks, no folder's.  Where the 11 are there, their average and the published ones."""
    rows, scores = ["| task | shots | metric | value | standard error |", "|---|---|---|---|---|"], {}
    for name, result in results.items():
        for key, value in result["metrics"].items():
            metric, _, rest = key.partition(",")
            if metric.endswith("_stderr") or (theirs and name in TASKS and metric != TASKS[name][1]):
                continue
            error = result["metrics"].get(f"{metric}_stderr,{rest}", "N/A")
            scores[name] = value, error if error != "N/A" else math.nan
            rows.append(f"| {name} | {result['shots']} | {metric} | {value:.4f} | {scores[name][1]:.4f} |")
    if theirs and set(AVERAGED) <= scores.keys():
        values, errors = zip(*(scores[name] for name in AVERAGED))
        mean, error = 100 * sum(values) / 11, 100 * math.hypot(*errors) / 11
        rows.append(f"| average of the paper's 11, in percent | | | {mean:.1f} | {error:.1f} |")
        rows += [f"| published: {name} | | | {value} | |" for name, value in PUBLISHED]
    return "\n".join(rows)


def main(cfg: EvaluateSettings) -> None:
    check((Path(cfg.export) / "config.json").is_file(), f"export = {cfg.export} has no config.json; use convert.py --to_hf")
    manager = task_manager(cfg) if cfg.names != () else None
    names = cfg.names if cfg.names is not None else tuple(manager.all_subtasks if cfg.tasks else TASKS)
    load = functools.cache(functools.partial(load_model, cfg))  # once, or not at all
    settings = {"export": fingerprint(cfg.export), "dtype": cfg.dtype, "limit": cfg.limit}
    if cfg.data_dir:
        indexes = sorted(Path(cfg.data_dir).glob("*/eval*.json"))  # each has the checksum of its tokens
        check(bool(indexes), f"data_dir = {cfg.data_dir} holds no domain with an eval split; run prepare.py")
        which = {"indexes": [sha256(p) for p in indexes], "seq_len": cfg.seq_len, "sequences": cfg.eval_sequences}
        losses = kept(cfg, "held_out", settings | which, lambda: held_out(cfg, indexes, load))
        print("\n| domain | loss, nats a token | perplexity |\n|---|---|---|\n" + "\n".join(
            f"| {domain} | " + ("n/a | n/a |" if loss is None else f"{loss:.4f} | {math.exp(loss):.2f} |")
            for domain, loss in losses.items()))
    if names:
        settings |= {"harness": version("lm_eval"), "tasks": fingerprint(cfg.tasks) if cfg.tasks else ""}
        results = {name: kept(cfg, name, settings | {"shots": None if cfg.tasks else TASKS.get(name, (None,))[0]},
                              lambda name=name: run_task(cfg, name, manager, load)) for name in names}
        print("\n" + table(results, theirs=not cfg.tasks))


if __name__ == "__main__":
    run_stage(main, EvaluateSettings)
