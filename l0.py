"""Hard-concrete masks and the Lagrangian that drives them to a target shape.  Spec: sections 2 and 4 of the method.

Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization" (arXiv 1712.01312), with the
constants of Sheared LLaMA's released code.  Everything here is fp32, on every rank the same, and never under autocast.

Shapes: L layers, d hidden size, H query heads, K key/value heads, G = H // K query heads a KV group, f MLP units.
Every mask set is a tensor whose last axis is a row: of each row exactly the target's count of units is kept.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

# Letter -> what a target calls the dimension, and its size in a model.ModelConfig.
DIMS = {
    "d": ("hidden_size", lambda cfg: cfg.hidden_size),
    "L": ("n_layers", lambda cfg: cfg.n_layers),
    "H": ("n_heads", lambda cfg: cfg.n_heads),
    "K": ("n_kv_heads", lambda cfg: cfg.n_kv_heads),
    "G": ("query heads a KV head", lambda cfg: cfg.n_heads // cfg.n_kv_heads),
    "f": ("intermediate_size", lambda cfg: cfg.intermediate_size),
}
# Name -> axes.  The last is the dimension of the target that the set leads to; of several sets that lead to one, the first
# is taken unless others are named: `layer` closes both blocks of a layer, `head_layer` and `mlp` close them one by one.
# Without GQA (K = H) heads are pruned by `head`; with it by `kv_head` (a KV head and its group) times `query_head`.
# The order is that of the noise.
MASKS = {
    "hidden": ("d",),
    "layer": ("L",),
    "head": ("L", "H"),
    "intermediate": ("L", "f"),
    "head_layer": ("L",),
    "mlp": ("L",),
    "kv_head": ("L", "K"),
    "query_head": ("L", "K", "G"),
}

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # temperature of the sigmoid; it is stretched to (GAMMA, ZETA), then cut to [0, 1]
EPS = 1e-6  # uniforms and probabilities stay so far from 0 and 1
MAGIC = 0.8  # the released code's name: makes the mask of evaluation softer; at LOG_ALPHA_MAX z is 0.996, without it 0.999
LOG_ALPHA_MIN, LOG_ALPHA_MAX = math.log(1e-2), math.log(1e2)
LOGIT_ZERO = math.log(-GAMMA / ZETA)  # ln(x / (1 - x)) of x = -GAMMA / (ZETA - GAMMA), which the stretch maps to 0


def dims(cfg) -> dict[str, int]:
    """The sizes that the letters of MASKS stand for, of a model.ModelConfig."""
    return {letter: size(cfg) for letter, (_, size) in DIMS.items()}


def mask_sets(source, target, modules: tuple[str, ...] | None = None) -> dict[str, tuple[tuple[int, ...], int]]:
    """The mask sets that lead from one shape to another: name -> (shape, units kept of each row).

    source, target: model.ModelConfig.  modules: names of MASKS; None takes for each dimension the first set that leads
    there.  A set whose target equals its source is left out.
    Raises ValueError if the target cannot be reached, naming the dimension.
    """
    a, b = dims(source), dims(target)
    gqa = a["K"] != a["H"]
    if not gqa and b["K"] != b["H"]:
        raise ValueError(f"target n_kv_heads = {b['K']} must equal n_heads = {b['H']}, since the source has no groups")
    for letter, (name, _) in DIMS.items():
        if not 1 <= b[letter] <= a[letter]:
            raise ValueError(f"target {name} = {b[letter]} is not between 1 and the source's {a[letter]}")
    covers = {}  # dimension -> the sets that lead there, the default first; of H, K and G those that this source has
    for name, axes in MASKS.items():
        if axes[-1] not in ("H" if gqa else "KG"):
            covers.setdefault(axes[-1], []).append(name)
    modules = [names[0] for names in covers.values()] if modules is None else modules
    if unknown := [m for m in modules if m not in MASKS]:
        raise ValueError(f"pruning_modules has {unknown[0]!r}, which is not one of {', '.join(MASKS)}")
    if wrong := set(modules).difference(*covers.values()):
        raise ValueError(f"pruning_modules has {sorted(wrong)[0]!r}, but the source has "
                         + ("grouped heads: take kv_head and query_head" if gqa else "no groups: take head"))
    sets = {name: (tuple(a[x] for x in axes), b[axes[-1]]) for name, axes in MASKS.items()
            if name in modules and a[axes[-1]] != b[axes[-1]]}
    for letter, names in covers.items():
        if a[letter] != b[letter] and not sets.keys() & set(names):
            raise ValueError(f"the target's {letter} = {b[letter]} differs from the source's {a[letter]}, but "
                             f"pruning_modules lacks {' or '.join(names)}")
    if a["L"] != b["L"] and "layer" not in sets and not {"head_layer", "mlp"} <= sets.keys():
        raise ValueError(f"the target has {b['L']} layers, the source {a['L']}: a layer is closed by `layer`, or by both "
                         "`head_layer` and `mlp`, but pruning_modules has only one of the two")
    return sets


def sample(log_alpha: Tensor, u: Tensor) -> Tensor:
    """A training mask from uniforms u in (0, 1): hard-concrete, with exact zeros and ones.  Any shape, same shape."""
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def prob_open(log_alpha: Tensor) -> Tensor:
    """P(z != 0), elementwise: z is 0 where s <= x, which is where ln u - ln(1 - u) <= LOGIT_ZERO * BETA - log_alpha."""
    return 1 - torch.sigmoid(LOGIT_ZERO * BETA - log_alpha).clamp(EPS, 1 - EPS)


def deterministic(log_alpha: Tensor, n_zero: int | Tensor) -> Tensor:
    """The mask of evaluation and compaction: soft values, with the n_zero smallest of each row exactly 0.

    n_zero: one count, or one for each row [...].  Ties are cut from the front of the row, always the same way.
    """
    soft = torch.sigmoid(log_alpha / BETA * MAGIC)
    rank = log_alpha.argsort(dim=-1, stable=True).argsort(dim=-1)
    n_zero = torch.as_tensor(n_zero, device=rank.device)
    return torch.where(rank < n_zero[..., None], 0.0, soft)


class L0(nn.Module):
    """Mask parameters `log_alpha` and multipliers `lambda_`, `phi`, one pair a mask set.

    sets: from `mask_sets`.  count: how the expected number of open units is counted.  "expected" is the released code's;
    "rescaled" counts a unit at a bound of log_alpha as exactly open or closed (module docstring of prune.py tells when).
    """

    def __init__(self, sets: dict[str, tuple[tuple[int, ...], int]], *, count: str = "expected", seed: int = 0):
        super().__init__()
        self.sets, self.count = dict(sets), count
        generator = torch.Generator().manual_seed(seed)
        self.log_alpha = nn.ParameterDict({
            name: nn.Parameter(torch.empty(shape).normal_(5.0, 0.01, generator=generator))
            for name, (shape, _) in sets.items()})
        self.lambda_ = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in sets})
        self.phi = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in sets})
        self.clamp_()

    def parameter_groups(self, *, mask_lr: float, multiplier_lr: float) -> list[dict]:
        """For AdamW: log_alpha descends, the multipliers ascend.  # spec 4"""
        multipliers = [*self.lambda_.values(), *self.phi.values()]
        return [dict(name="log_alpha", params=list(self.log_alpha.values()), lr=mask_lr),
                dict(name="multipliers", params=multipliers, lr=multiplier_lr, maximize=True)]

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bound log_alpha in place, after each optimizer step: clamping only before use lets it wind up."""
        for p in self.log_alpha.values():
            p.clamp_(LOG_ALPHA_MIN, LOG_ALPHA_MAX)

    def sample(self, seed: int, step: int, micro_batch: int) -> dict[str, Tensor]:
        """Training masks.  micro_batch: its index in the whole global batch, so the number of ranks changes nothing."""
        if not self.sets:
            return {}
        key = int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1)[0])
        sizes = [p.numel() for p in self.log_alpha.values()]
        u = torch.empty(sum(sizes), device=next(self.parameters()).device)
        u.uniform_(EPS, 1 - EPS, generator=torch.Generator(device=u.device).manual_seed(key))
        return {name: sample(p, part.view(p.shape)) for (name, p), part in zip(self.log_alpha.items(), u.split(sizes))}

    @torch.no_grad()
    def deterministic(self, *, target: bool = True) -> dict[str, Tensor]:
        """Masks for evaluation: with the target's counts, or with each row's own expected count."""
        masks = {}
        for name, p in self.log_alpha.items():
            size, kept = p.shape[-1], self.sets[name][1]
            expected = (size - prob_open(p).sum(-1)).round()
            masks[name] = deterministic(p, torch.full_like(expected, size - kept) if target else expected)
        return masks

    def open_units(self) -> dict[str, Tensor]:
        """P(z != 0) of each unit, or its rescaled count; see the class."""
        p_open = {name: prob_open(p) for name, p in self.log_alpha.items()}
        if self.count == "rescaled":
            low, high = prob_open(torch.tensor([LOG_ALPHA_MIN, LOG_ALPHA_MAX])).tolist()
            p_open = {name: (p - low) / (high - low) for name, p in p_open.items()}
        return p_open

    def sparsity(self) -> dict[str, Tensor]:
        """Expected sparsity of each row: [L], [L, K] or a scalar."""
        return {name: 1 - p.mean(-1) for name, p in self.open_units().items()}

    def target_sparsity(self, name: str, step: int, *, warmup: int, start: float = 0.0) -> float:
        """t_m at a step: from `start` linearly to the target over `warmup` steps."""
        shape, kept = self.sets[name]
        return (1 - kept / shape[-1] - start) * min(1.0, step / max(1, warmup)) + start

    def lagrangian(self, step: int, *, warmup: int, start: float = 0.0) -> Tensor:
        """Sum over sets of the row mean of lambda (s - t) + phi (s - t)^2; a scalar with gradients to all parameters."""
        terms = []
        for name, s in self.sparsity().items():
            gap = s - self.target_sparsity(name, step, warmup=warmup, start=start)
            terms.append((self.lambda_[name] * gap + self.phi[name] * gap.square()).mean())
        return torch.stack(terms).sum()

    def units(self) -> list[nn.Parameter]:
        """What the gradients of the masks reach."""
        return list(self.log_alpha.values())

    def finish_gradients_(self, step: int, *, warmup: int, start: float = 0.0) -> dict[str, Tensor]:
        """Add the Lagrangian's gradients, which are the same on every rank, to those of the tokens.  Returns what to log."""
        if not self.sets:
            return {}
        lagrangian = self.lagrangian(step, warmup=warmup, start=start)
        lagrangian.backward()
        return {"loss/lagrangian": lagrangian.detach()}

    @torch.no_grad()
    def metrics(self, step: int, *, warmup: int, start: float = 0.0) -> tuple[dict[str, float | Tensor], dict[str, Tensor]]:
        """For the log after `step` steps: sparsities (row means), targets and multipliers; and P(z != 0) of each unit."""
        values = {}
        for name, s in self.sparsity().items():
            values |= {f"sparsity/{name}": s.mean(), f"lambda/{name}": self.lambda_[name], f"phi/{name}": self.phi[name],
                       f"target_sparsity/{name}": self.target_sparsity(name, step, warmup=warmup, start=start)}
        return values, {name: prob_open(p) for name, p in self.log_alpha.items()}


def undecided(z: Tensor) -> tuple[int, int]:
    """Of the units that a deterministic mask keeps: how many are near-dead (z < 0.05), how many between (z < 0.95).

    Near-dead units are dead weight in the compacted model: training closed them and the count reopened them.
    """
    kept = z[z > 0]
    return int((kept < 0.05).sum()), int(((kept >= 0.05) & (kept < 0.95)).sum())


GAIN_RATE = 0.3  # of TopK's gains, of its scores'
BLOCKS = "layer", "head_layer", "mlp"  # what closes blocks of a layer, whole


class TopK(nn.Module):
    """Masks by scores: no noise, no multipliers, and at every step exactly as many units as asked.

    Of each row the highest scores are open, the others 0; how many falls from all units to the target's over `ramp` steps.
    An open unit's value is exp(gain), 1 at first: it makes up for what closed ones gave, and compact.py folds it into the
    weights.  Gradients reach the scores straight through (Bengio et al. 2013, arXiv 1308.3432), as if a value were
    sigmoid(score - the row's threshold), so a closed unit that is missed comes back.
    `scores` starts from what tools.importance wrote.  Two findings are built in (docs/results.md).  Soft masks do not show
    what a zero does: learned so, they were worse than what they started from.  And a gradient says little of what closing a
    whole layer does: BLOCKS stay as they start, closed from the first step on.
    """

    def __init__(self, sets: dict[str, tuple[tuple[int, ...], int]], *, ramp: int = 1):
        super().__init__()
        self.sets, self.ramp = dict(sets), ramp
        self.scores = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape), requires_grad=name not in BLOCKS)
                                        for name, (shape, _) in sets.items()})
        self.gains = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, (shape, _) in sets.items()})

    @torch.no_grad()
    def start_from(self, scores: dict[str, Tensor]) -> None:
        """Each row's scores (above 0: of their logarithms) by their mean and standard deviation, in place."""
        for name, p in self.scores.items():
            s = scores[name].log() if (scores[name] > 0).all() else scores[name]
            p.copy_((s - s.mean(-1, keepdim=True)) / s.std(-1, keepdim=True).clamp(min=1e-6))

    def parameter_groups(self, *, mask_lr: float, multiplier_lr: float) -> list[dict]:
        """For AdamW, see L0; scores with an eps that makes a step the mean gradient itself, since Adam's scale for each unit
        would move those that do not matter as far as those that do.  `finish_gradients_` sets the scale, not clipping."""
        eps = 100.0
        return [dict(name="scores", params=self.learned_scores(), lr=mask_lr * eps, eps=eps, clip=math.inf),
                dict(name="gains", params=list(self.gains.values()), lr=mask_lr * GAIN_RATE, clip=math.inf)]

    @torch.no_grad()
    def finish_gradients_(self, step: int, **ramp) -> dict[str, Tensor]:
        """Divide those of each row of scores by their root mean square, in place, before the step.  Nothing to log."""
        for p in self.learned_scores():
            p.grad /= p.grad.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        return {}

    def learned_scores(self) -> list[nn.Parameter]:
        """All but those of BLOCKS."""
        return [p for p in self.scores.values() if p.requires_grad]

    def clamp_(self) -> None:
        """Scores have no bounds."""

    def count(self, name: str, step: int) -> int:
        """Units open in each row of a set at a step."""
        shape, kept = self.sets[name]
        return kept if name in BLOCKS else shape[-1] + round((kept - shape[-1]) * min(1.0, (step + 1) / max(1, self.ramp)))

    def mask(self, name: str, count: int) -> Tensor:
        """Of a set, with so many units of each row open."""
        return straight_through(self.scores[name], count) * self.gains[name].exp()

    def sample(self, seed: int, step: int, micro_batch: int) -> dict[str, Tensor]:
        """Training masks, the same for all micro-batches of a step."""
        return {name: self.mask(name, self.count(name, step)) for name in self.sets}

    @torch.no_grad()
    def deterministic(self, *, target: bool = True) -> dict[str, Tensor]:
        """Masks with the target's counts: 0, or exp(gain)."""
        return {name: self.mask(name, kept) for name, (_, kept) in self.sets.items()}

    def units(self) -> list[nn.Parameter]:
        """What the gradients of the masks reach."""
        return [p for p in self.parameters() if p.requires_grad]

    @torch.no_grad()
    def metrics(self, step: int, **ramp) -> tuple[dict[str, float], dict[str, Tensor]]:
        """For the log after `step` steps: sparsities, which are their targets; and 1 for each unit open then."""
        values = {}
        for name, (shape, _) in self.sets.items():
            sparsity = 1 - self.count(name, step - 1) / shape[-1]
            values |= {f"sparsity/{name}": sparsity, f"target_sparsity/{name}": sparsity}
        return values, {name: (z != 0).float() for name, z in self.sample(0, step - 1, 0).items()}  # whatever the gains


def class_of(names: list[str]) -> type[L0] | type[TopK]:
    """Whose parameters these are, as a masks.safetensors names them."""
    return TopK if any(name.startswith("scores.") for name in names) else L0


def straight_through(scores: Tensor, count: int) -> Tensor:
    """1 for the `count` highest scores of each row and 0 for the others, with the gradient of sigmoid(score - threshold).

    scores [..., n] -> [..., n], fp32.  The threshold lies between the lowest that is kept and the highest that is not.
    """
    rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
    hard, n_zero = (rank >= scores.shape[-1] - count).to(scores.dtype), scores.shape[-1] - count
    with torch.no_grad():
        ordered = scores.sort(dim=-1).values
        threshold = (ordered[..., max(0, n_zero - 1)] + ordered[..., min(n_zero, scores.shape[-1] - 1)])[..., None] / 2
    soft = torch.sigmoid(scores - threshold)
    return hard + (soft - soft.detach())


def expected_params(cfg, p_open: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Expected number of parameters: (prunable: attention and MLP matrices; total, with embeddings, norms, biases and head).

    cfg: model.ModelConfig of the source.  p_open: P(z != 0) by set; a missing set is all open.  A product of sums:
    no outer product of hidden and intermediate units is ever formed.
    """
    n = dims(cfg)
    some = next(iter(p_open.values()), torch.ones(()))
    p = {name: p_open.get(name, some.new_ones([n[x] for x in axes])) for name, axes in MASKS.items()}
    hidden, units = p["hidden"].sum(), p["intermediate"].sum(1)  # (), (L)
    kv, query = p["kv_head"], p["head"] * (p["kv_head"][..., None] * p["query_head"]).flatten(1)  # (L, K), (L, H)
    query = query.sum(1)
    kv = kv.sum(1) if cfg.n_kv_heads != cfg.n_heads else query
    attention, mlp = p["layer"] * p["head_layer"], p["layer"] * p["mlp"]  # (L), that the blocks are there
    columns = (attention * cfg.head_dim * 2 * (query + kv) + mlp * (2 + cfg.gated_mlp) * units).sum()  # of width `hidden`
    ends = attention.sum() * cfg.o_bias + mlp.sum() * cfg.mlp_bias  # biases of that width, then those of other widths
    normed = {"none": 0, "head": 2, "all": query + kv}[cfg.qk_norm]  # heads' worth of weights
    inner = (attention * cfg.head_dim * ((query + 2 * kv) * cfg.qkv_bias + normed)
             + mlp * (1 + cfg.gated_mlp) * units * cfg.mlp_bias).sum()
    norms = ((attention + mlp).sum() + 1) * (2 if cfg.norm == "layer" else 1)
    prunable = hidden * columns
    return prunable, prunable + hidden * (cfg.vocab_size * (2 - cfg.tie_embeddings) + norms + ends) + inner
