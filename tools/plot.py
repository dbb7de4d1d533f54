"""Pictures of a run, PNG files and one page that holds them all: page.html, to open in any browser.

    python -m tools.plot out/demo/prune                                  # into out/demo/prune/plot
    python -m tools.plot --compare out/demo/continue out/demo/scratch    # into out/demo/continue/compare

What a run has not logged yet is left out, so one that is under way can be looked at.  Cut and kept units are counted as
compact.py would cut them at that evaluation, by the target's counts.
"""

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from l0 import class_of, mask_sets
from model import ModelConfig
from prune import target_config
from run.settings import FilePath, UserError, by_domain, check, read_json, require, run_stage, user_errors
from run.weights import latest_checkpoint, load_weights, read_model_config, step_of, tensor_names
from tools import pictures
from tools.pictures import Run


@dataclass(frozen=True)
class PlotSettings:
    runs: tuple[str, ...]  # folders of runs, each with its metrics.jsonl
    compare: bool = False  # the runs in one picture; else there is one run
    out_dir: FilePath = ""  # where the pictures go; "": plot/ or compare/ in the first run's folder

    positional = "runs"

    def __post_init__(self):
        most = len(pictures.COLOURS)
        require(1 < len(self.runs) <= most if self.compare else len(self.runs) == 1, f"runs = {' '.join(self.runs)}: one "
                f"run is plotted by itself, and --compare takes 2 to {most}")


def read_run(folder: Path) -> Run:
    """Raises UserError where a file is missing or not ours."""
    path = folder / "metrics.jsonl"
    check(path.is_file(), f"{folder} is no folder of a run: it has no metrics.jsonl")
    config = read_json(folder / "config.json")
    try:  # a run under way may be in the middle of its last line
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        run = Run(folder.name, config, [x for x in lines if "loss" in x], [x for x in lines if "eval_loss" in x], {})
        config["global_batch_size"] * config["seq_len"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} and its config.json are not what a run of prune.py or pretrain.py writes") from None
    check(bool(run.evaluations), f"{path} holds no evaluation yet; wait for the first one")
    run.reference = by_domain("reference_loss", config["reference_loss"]) or {
        d: loss for d in run.domains if (loss := run.evaluations[0][f"eval_loss/{d}"]) is not None}  # as data.steer does
    paths = sorted((folder / "masks").glob("step_*.safetensors"), key=lambda p: step_of(p.with_suffix("")))
    if paths:
        with user_errors():
            run.source = read_model_config(latest_checkpoint(folder) or config["init_from"], ModelConfig)
            run.target = target_config(SimpleNamespace(**config), run.source)
            learned = class_of(tensor_names(paths[-1]))(mask_sets(run.source, run.target, config["pruning_modules"]))
        for path in paths:
            run.masks[step_of(path.with_suffix(""))] = load_weights(learned, path).deterministic()
    return run


def alike(runs: list[Run]) -> bool:
    """Whether all have masks, of the same units."""
    shapes = [{name: z.shape for name, z in run.last_masks.items()} for run in runs]
    return bool(shapes[0]) and all(other == shapes[0] for other in shapes)


PICTURES = {  # name -> (how it is drawn, whether a run has it, what it shows)
    "losses": (pictures.losses, lambda run: True, "Held-out loss of each domain at each evaluation. Dashed: the reference "
               "loss, which dynamic batch loading steers towards (none given: the source's own, before the first step)."),
    "mixture": (pictures.mixture, lambda run: True, "Share of each domain in the batches drawn after each evaluation."),
    "training": (pictures.training, lambda run: run.steps, "What a step reports: its batch's loss (under sampled masks in "
                 "pruning), gradient norms by parameter group, speed."),
    "sparsity": (pictures.sparsity, lambda run: run.steps and run.masks, "Above: the share of each mask set's units that is "
                 "expected to be closed, and where the ramp wants it. Below: the multipliers, which grow while it lags."),
    "masks": (pictures.heat_maps, lambda run: run.masks, "Which units the target's counts keep, and how open they are; a "
              "head or an MLP unit counts with its layer's mask. Yellow ones are near-dead: they stay, at a small factor."),
    "decisions": (pictures.decisions, lambda run: len(run.masks) > 1, "How settled the choice is: units that went from kept "
                  "to cut or back between two evaluations, and kept ones that are not fully open. Best when all end low."),
}
COMPARED = {
    "losses": (pictures.compare_losses, lambda runs: True, "Held-out loss against the tokens that each run has trained on."),
    "masks": (pictures.compare_masks, alike, "How many of the units that the first run keeps the others keep too, and how "
              "many a choice at random of the second one's size would."),
}


# ---- the page


def table(runs: list[Run]) -> str:
    """Last evaluation of each run, as HTML."""
    domains = runs[0].domains
    rows = [("", *domains, "mean")]
    for run in runs:
        last = run.evaluations[-1]
        rows.append((f"{run.name}, step {last['step']}", *(last.get(f"eval_loss/{d}") for d in domains), last["eval_loss"]))
        rows.append(("weight", *(last.get(f"domain_weight/{d}") for d in domains), None))
    cells = [["" if v is None else html.escape(v) if isinstance(v, str) else f"{v:.4f}" for v in row] for row in rows]
    return "<table>" + "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in cells) + "</table>"


def page(title: str, runs: list[Run], drawn: dict[str, bytes], said: dict[str, str]) -> str:
    """One file that needs no other: the pictures are in it."""
    body = "".join(f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
                   f"<figcaption>{html.escape(said[name])}</figcaption></figure>" for name, png in drawn.items())
    settings = "".join(f"<details><summary>settings of {html.escape(run.name)}</summary><pre>"
                       f"{html.escape(json.dumps(run.config, indent=2))}</pre></details>" for run in runs)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }}
img {{ width: 100% }} figure {{ margin: 2.5em 0 }} figcaption {{ color: #555 }} td {{ padding: 0 1em 0 0 }}
</style><h1>{html.escape(title)}</h1><p>Last evaluation, nats a token, and the shares of the domains:</p>{table(runs)}{body}
{settings}</html>
"""


def png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def main(cfg: PlotSettings) -> None:
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed; pip install -e '.[plot]'") from None
    runs = [read_run(Path(folder)) for folder in cfg.runs]
    if len({run.name for run in runs}) < len(runs):
        for run, folder in zip(runs, cfg.runs):
            run.name = str(Path(folder))
    catalogue, subject = (COMPARED, runs) if cfg.compare else (PICTURES, runs[0])
    with matplotlib.rc_context(pictures.STYLE):
        drawn = {name: png(draw(subject)) for name, (draw, has, _) in catalogue.items() if has(subject)}
    out_dir = Path(cfg.out_dir or Path(cfg.runs[0]) / ("compare" if cfg.compare else "plot"))
    text = page(" and ".join(map(str, cfg.runs)), runs, drawn, {name: said for name, (*_, said) in catalogue.items()})
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in drawn.items():
            (out_dir / f"{name}.png").write_bytes(content)
        (out_dir / "page.html").write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {out_dir}: {error.strerror}") from None
    print(f"{out_dir / 'page.html'} and {len(drawn)} pictures beside it: {', '.join(drawn)}")


if __name__ == "__main__":
    run_stage(main, PlotSettings)
