"""Reference losses of a target that does not exist yet: a power law through the losses of models of one family.

    python -m tools.reference_loss --losses=losses.json --n_params=1345423360 --out=reference_loss.json

losses.json: {"n_params": [6738415616, 13015864320, 68976648192], "cc": [1.7520, 1.6680, 1.4621], ...}, nats a token, each
domain's in the order of n_params.  For each domain fits l(N) = a / N^b + c (Sheared LLaMA, section 3.2) and evaluates it at
n_params.  prune.py and pretrain.py take the file as --reference_loss.  Without such a family, leave reference_loss out of
prune.py's settings: it then takes the source's own losses.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from run.settings import FilePath, UserError, check, read_json, require, run_stage


@dataclass(frozen=True)
class ReferenceSettings:
    losses: FilePath  # JSON file of losses by size and domain; see above
    n_params: int  # N of the target
    out: FilePath = ""  # JSON file to write, domain to loss; "": print only

    def __post_init__(self):
        require(self.n_params > 0, f"n_params = {self.n_params} must be above 0")


def fit_power_law(n_params: np.ndarray, losses: np.ndarray) -> tuple[float, float, float, float]:
    """Least squares of l(N) = a / N^b + c.  n_params, losses: float64 [n], n >= 3.

    Returns (a, b, c, largest residual in nats).  For a fixed b the rest is linear, so b alone is searched: on a grid, then
    by golden section around the best.  Three sizes are fitted exactly where a law exists; more leave a residual.
    """
    x = np.asarray(n_params, np.float64) / np.min(n_params)

    def at(b: float) -> tuple[float, np.ndarray]:
        design = np.stack([x**-b, np.ones_like(x)], axis=1)
        solution = np.linalg.lstsq(design, losses, rcond=None)[0]
        return float(((design @ solution - losses) ** 2).sum()), solution

    grid = np.geomspace(1e-3, 10, 400)
    best = int(np.argmin([at(b)[0] for b in grid]))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    ratio = (5**0.5 - 1) / 2
    for _ in range(200):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if at(left)[0] < at(right)[0]:
            high = right
        else:
            low = left
    b = (low + high) / 2
    scale, c = at(b)[1]
    residual = float(np.abs(scale * x**-b + c - losses).max())
    return float(scale * float(np.min(n_params)) ** b), float(b), float(c), residual


def main(cfg: ReferenceSettings) -> None:
    table = read_json(Path(cfg.losses))
    check(isinstance(table, dict) and isinstance(table.get("n_params"), list), f"{cfg.losses} must be an object with a list "
          '"n_params" and a list of losses for each domain')
    n_params = table.pop("n_params")
    check(len(set(map(str, n_params))) == len(n_params) >= 3, f"{cfg.losses}: n_params = {n_params}: a law of three "
          "parameters needs three different sizes or more")
    check(bool(table), f"{cfg.losses} holds no domain")
    for name, values in {"n_params": n_params, **table}.items():
        check(isinstance(values, list) and len(values) == len(n_params) and all(
            type(v) in (int, float) and 0 < v < 1e30 for v in values),
            f"{cfg.losses}: {name} = {values} must be {len(n_params)} numbers above 0")
    reference = {}
    for domain, losses in table.items():
        a, b, c, residual = fit_power_law(np.array(n_params, np.float64), np.array(losses, np.float64))
        reference[domain] = a / cfg.n_params**b + c
        print(f"{domain}: {reference[domain]:.4f} at N = {cfg.n_params:,}; l(N) = {a:.4g} / N^{b:.4f} + {c:.4f}, largest "
              f"residual {residual:.1e}")
        check(math.isfinite(reference[domain]), f"{cfg.losses}: no finite loss of {domain} at n_params = {cfg.n_params}")
        if c < 0:
            print(f"note: {domain}: c = {c:.4f}, where the law levels off, is below 0, as no loss can be; do not trust it "
                  "far from the sizes given")
    if cfg.out:
        try:
            Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
            Path(cfg.out).write_text(json.dumps(reference, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write out = {cfg.out}: {error.strerror}") from None


if __name__ == "__main__":
    run_stage(main, ReferenceSettings)
