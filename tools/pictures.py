"""What tools/plot.py draws: a function a picture, from a Run, or from several, to a figure.

Colours are Okabe and Ito's and cividis, which all kinds of sight tell apart; widths are those of a README.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import ModelConfig

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # without the yellow, too pale
DASHES = ("-", "--", ":")  # for those beyond seven
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
         "grid.color": "#e4e4e4", "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.5, "savefig.dpi": 110}


@dataclass
class Run:
    """What a run's folder tells."""

    name: str
    config: dict
    steps: list[dict]  # lines of training
    evaluations: list[dict]
    reference: dict[str, float]  # nats a token
    source: ModelConfig | None = None  # of a pruning run, with what follows
    target: ModelConfig | None = None
    masks: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by step: what compact.py would cut by

    @property
    def domains(self) -> list[str]:
        return [k.removeprefix("eval_loss/") for k in self.evaluations[0] if k.startswith("eval_loss/")]

    @property
    def last_masks(self) -> dict[str, Tensor]:
        return self.masks[max(self.masks)] if self.masks else {}


def by_layer(z: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Factors of query heads [L, H] and MLP units [L, f], those of their layer and block included."""
    L, K, G = cfg.n_layers, cfg.n_kv_heads, cfg.n_heads // cfg.n_kv_heads

    def factor(name: str, *shape: int) -> Tensor:
        return z.get(name, torch.ones(shape))

    heads = factor("head", L, K * G) * (factor("kv_head", L, K)[..., None] * factor("query_head", L, K, G)).flatten(1)
    attention, mlp = (factor("layer", L) * factor(block, L) for block in ("head_layer", "mlp"))
    return {"query heads": heads * attention[:, None],
            "MLP units": factor("intermediate", L, cfg.intermediate_size) * mlp[:, None]}


def column(lines: list[dict], name: str) -> list[float]:
    """A metric line by line; nan where it is missing, which a plot leaves out."""
    return [math.nan if line.get(name) is None else line[name] for line in lines]


def new_figure(height: float):
    """As wide as a README, so many inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height), layout="constrained")


def grid(n: int, *, height: float = 1.9):
    """A figure with n panels, four in a row at most, and those."""
    columns = min(4, n if n <= 3 else math.ceil(n / 2))
    figure = new_figure(height * math.ceil(n / columns) + 0.25)
    axes = figure.subplots(math.ceil(n / columns), columns, squeeze=False).flatten()
    for axis in axes[n:]:
        axis.remove()
    return figure, axes[:n]


def losses(run: Run):
    figure, axes = grid(len(run.domains) + 1)
    x = column(run.evaluations, "step")
    for axis, d in zip(axes, [*run.domains, ""]):
        y = column(run.evaluations, f"eval_loss/{d}" if d else "eval_loss")
        reference = run.reference.get(d) if d else sum(run.reference.values()) / max(1, len(run.reference))
        axis.plot(x, y, color=COLOURS[0], marker="o" if len(x) <= 20 else "", markersize=3)
        axis.set_title(d or "mean of domains")
        text = "no held-out text" if math.isnan(y[-1]) else f"last {y[-1]:.3f}"
        if reference:
            axis.axhline(reference, color=COLOURS[1], linestyle="--", linewidth=1.2)
            text += f"\nreference {reference:.3f}"
        axis.annotate(text, (0.97, 0.95), xycoords="axes fraction", ha="right", va="top", fontsize=8, color="#333333",
                      bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=1))
        axis.margins(y=0.25)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("held-out loss (nats a token)", fontsize=9)
    return figure


def mixture(run: Run):
    """Each line is named at its right end; names that would touch are moved apart."""
    figure = new_figure(3)
    axis, x = figure.subplots(), column(run.evaluations, "step")
    shares = {d: [100 * w for w in column(run.evaluations, f"domain_weight/{d}")] for d in run.domains}
    for i, y in enumerate(shares.values()):
        axis.plot(x, y, DASHES[i // len(COLOURS) % len(DASHES)], color=COLOURS[i % len(COLOURS)])
    (low, high), at = axis.get_ylim(), -math.inf
    for i, (name, y) in sorted(enumerate(shares.items()), key=lambda pair: pair[1][1][-1]):
        at = max(at + 0.065 * (high - low), y[-1])
        axis.annotate(name, (1.01, at), xycoords=("axes fraction", "data"), color=COLOURS[i % len(COLOURS)], va="center")
    axis.margins(x=0)
    axis.set(xlabel="step", ylabel="share of the next batches (%)")
    return figure


def training(run: Run):
    figure, axes = grid(4 if run.masks else 3, height=2.1)
    x = column(run.steps, "step")
    axes[0].plot(x, column(run.steps, "loss"), color=COLOURS[0], linewidth=0.8)
    axes[0].set(title="training loss", ylabel="nats a token")
    for name, colour in zip([k for k in run.steps[-1] if k.startswith("grad_norm/")], COLOURS):
        axes[1].semilogy(x, column(run.steps, name), color=colour, linewidth=0.8, label=name.removeprefix("grad_norm/"))
    axes[1].set(title="gradient norm before clipping")
    axes[1].legend(loc="best")
    axes[2].plot(x, column(run.steps, "tokens_per_second"), color=COLOURS[0], linewidth=0.8)
    axes[2].set(title="speed", ylabel="tokens a second", ylim=(0, None))
    if run.masks:
        axes[3].plot(x, [v / 1e6 for v in column(run.steps, "expected_params")], color=COLOURS[0])
        axes[3].axhline(run.target.n_params() / 1e6, color=COLOURS[1], linestyle="--", linewidth=1.2)
        axes[3].set(title="expected parameters; dashed: the target's", ylabel="millions", ylim=(0, None))
    figure.supxlabel("step", fontsize=9)
    return figure


def sparsity(run: Run):
    """A column a mask set: expected sparsity and its target above; below, where there are any, the multipliers."""
    names = [k.removeprefix("sparsity/") for k in run.steps[-1] if k.startswith("sparsity/")]
    rows = 1 + (f"lambda/{names[0]}" in run.steps[-1])
    figure, x = new_figure(2.1 * rows), column(run.steps, "step")
    axes = figure.subplots(rows, len(names), squeeze=False, sharex=True)
    for (top, *bottom), name in zip(axes.T, names):
        top.plot(x, [100 * v for v in column(run.steps, f"sparsity/{name}")], color=COLOURS[0], label="expected")
        top.plot(x, [100 * v for v in column(run.steps, f"target_sparsity/{name}")], "--", color=COLOURS[1], label="target")
        top.set_title(name)
        for axis in bottom:
            axis.plot(x, column(run.steps, f"lambda/{name}"), color=COLOURS[2], label=r"$\lambda$")
            axis.plot(x, column(run.steps, f"phi/{name}"), color=COLOURS[3], label=r"$\varphi$")
    axes[0, 0].set_ylabel("sparsity (% of units)")
    axes[0, -1].legend(loc="lower right")
    for axis in axes[1:]:
        axis[0].set_ylabel("multiplier")
        axis[-1].legend(loc="best")
    figure.supxlabel("step", fontsize=9)
    return figure


def heat(axis, values: Tensor, title: str, x: str, y: str, extent: tuple[float, float, float, float]):
    """Cut units white, kept ones from yellow (hardly open) to dark blue (1)."""
    from matplotlib import colormaps

    colours = colormaps["cividis_r"].with_extremes(bad="white")
    shown = axis.imshow(torch.where(values > 0, values, torch.nan).numpy(), aspect="auto", cmap=colours, vmin=0, vmax=1,
                        interpolation="nearest", extent=extent)
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(False)
    axis.spines[["top", "right"]].set_visible(True)
    return shown


def heat_maps(run: Run):
    figure, last = new_figure(5.2), run.last_masks
    axes, (steps, masks) = figure.subplots(2, 2).flatten(), zip(*run.masks.items())
    for axis, (name, z) in zip(axes, by_layer(last, run.source).items()):
        L, n = z.shape
        unsorted = n <= 64
        shown = heat(axis, z if unsorted else z.sort(1, descending=True).values, f"{name}, step {steps[-1]}",
                     name.split()[-1].removesuffix("s") if unsorted else "unit, each layer's most open first", "layer",
                     (-0.5, n - 0.5, L - 0.5, -0.5))
    ticks = range(0, len(steps), math.ceil(len(steps) / 6))
    for axis, names in ((axes[2], ("hidden",)), (axes[3], ("layer", "head_layer", "mlp"))):
        name = next((name for name in names if name in last), None)
        if name is None:
            axis.set_axis_off()
            axis.text(0.5, 0.5, f"{names[0]}: all kept, not pruned", ha="center", va="center", transform=axis.transAxes)
            continue
        order = last[name].argsort(descending=True) if name == "hidden" else torch.arange(len(last[name]))
        heat(axis, torch.stack([z[name][order] for z in masks], 1), f"{name} over time",
             "step", "dim, the most open first" if name == "hidden" else "layer",
             (-0.5, len(steps) - 0.5, len(order) - 0.5, -0.5))
        axis.set_xticks(ticks, [steps[i] for i in ticks])
    figure.colorbar(shown, ax=axes, label="mask of what the target's counts keep; white: cut", shrink=0.6)
    return figure


def decisions(run: Run):
    """How often units changed sides, how open the kept ones are."""
    figure, axes = grid(3, height=2.6)
    steps, masks = zip(*run.masks.items())
    kept = [{name: (z > 0) for name, z in at.items()} for at in masks]
    def share(of: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        return {name: [100 * float(of(at[name][at[name] > 0]).float().mean()) for at in masks] for name in masks[-1]}

    flips = {name: [100 * float((a[name] != b[name]).float().mean()) for a, b in itertools.pairwise(kept)]
             for name in masks[-1]}
    for axis, x, title, what in (
            (axes[0], steps[1:], "flipped since the last evaluation", flips),
            (axes[1], steps, "kept, near-dead (z < 0.05)", share(lambda z: z < 0.05)),
            (axes[2], steps, "kept, undecided (to 0.95)", share(lambda z: (z >= 0.05) & (z < 0.95)))):
        for (name, y), colour in zip(what.items(), COLOURS):
            axis.plot(x, y, color=colour, marker="o" if len(steps) <= 20 else "", markersize=3, label=name)
        axis.set(title=title, xlabel="step", ylabel="% of all units" if axis is axes[0] else "% of kept units")
        axis.set_ylim(0, max(1, axis.get_ylim()[1]))
    axes[0].legend(loc="best")
    return figure


# ---- of several runs


def compare_losses(runs: list[Run]):
    domains = [d for d in runs[0].domains if all(d in run.domains for run in runs)]
    figure, axes = grid(len(domains) + 1)
    for axis, d in zip(axes, [*domains, ""]):
        for run, colour in zip(runs, COLOURS):
            tokens_a_step = run.config["global_batch_size"] * run.config["seq_len"]
            tokens = [line["step"] * tokens_a_step / 1e6 for line in run.evaluations]
            axis.plot(tokens, column(run.evaluations, f"eval_loss/{d}" if d else "eval_loss"), color=colour, label=run.name)
        axis.set_title(d or "mean of domains")
    axes[-1].legend(loc="best")
    figure.supxlabel("tokens trained on (millions)", fontsize=9)
    figure.supylabel("held-out loss (nats a token)", fontsize=9)
    return figure


def compare_masks(runs: list[Run]):
    first, *others = ({name: z > 0 for name, z in run.last_masks.items()} for run in runs)
    figure = new_figure(2.8)
    axis, width = figure.subplots(), 0.8 / len(others)
    for i, other in enumerate(others):
        agree = [100 * float((first[name] & other[name]).sum() / first[name].sum()) for name in first]
        at = [k + (i - (len(others) - 1) / 2) * width for k in range(len(first))]
        axis.bar(at, agree, width * 0.9, color=COLOURS[i + 1], label=runs[i + 1].name)
        axis.bar_label(axis.containers[-1], fmt="%.0f", fontsize=8)
    for k, name in enumerate(first):
        chance = 100 * float(others[0][name].float().mean())
        axis.plot((k - 0.4, k + 0.4), (chance, chance), "--", color="black", linewidth=1, label=None if k else "by chance")
    axis.set(xticks=range(len(first)), xticklabels=list(first), ylim=(0, 110), ylabel=f"% of {runs[0].name}'s kept units")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure
