"""Cut a pruned checkpoint down to a dense model of exactly the target shape.

    python compact.py --checkpoint=out/7b_to_1.3b/step_0003200 --out_dir=out/1.3b_compact

Folds every mask into the weights that the masked forward pass puts it on (model.layer_masks is the one rule for both),
then cuts away the units whose mask is zero and renumbers the layers, one weight in memory at a time.  Masked and compacted
logits agree to rounding: that is checked on random tokens, between the source and what was written, before the new folder
gets its name.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from l0 import L0, class_of, mask_sets, undecided
from model import ModelConfig, Transformer, layer_masks, parameter_shapes
from run.checkpoint import read_state
from run.settings import FilePath, UserError, began_with, check, run_stage, user_errors
from run.weights import (check_finite, load_weights, new_folder, newest_in, one_thread, read_model_config,
                         tensor_names, tensor_reader, verified, write_assets, write_tensors)

CHECKED = 8  # tokens of a sequence that the check runs
TOLERANCE = 1e-4  # of the logits' largest magnitude: what fp32 rounding may do to them


@dataclass(frozen=True)
class CompactSettings:
    checkpoint: FilePath  # a step_* folder of prune.py, or its out_dir for the newest
    out_dir: FilePath  # the model folder to write


def kept(z: Tensor | None, size: int) -> Tensor:
    """Indices of the units to keep: where the mask is not zero, or all."""
    return torch.arange(size) if z is None else z.nonzero().flatten()


def is_closed(masks: dict[str, Tensor], i: int) -> bool:
    """Layer i goes if `layer` closes it or, where there is no such mask, if `head_layer` and `mlp` close both its blocks.

    A layer with one block closed stays, that block with an output of zero: stock checkpoints have both.
    """
    if "layer" in masks:
        return bool(masks["layer"][i] == 0)
    return all(name in masks and bool(masks[name][i] == 0) for name in ("head_layer", "mlp"))


def kept_heads(z_head: Tensor | None, cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """(query heads, KV heads) to keep.  A KV head stays as long as a query head of its group does.

    z_head: [H].  Raises ValueError unless every KV head that stays keeps as many query heads as the others.
    """
    heads, group = kept(z_head, cfg.n_heads), cfg.n_heads // cfg.n_kv_heads
    kv_heads, counts = (heads // group).unique(return_counts=True)
    if len(counts.unique()) > 1:
        raise ValueError(f"the masks keep {counts.tolist()} query heads in the KV groups {kv_heads.tolist()} of a layer: no "
                         "uniform shape")
    return heads, kv_heads


def compacted_shape(cfg: ModelConfig, masks: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, str]]:
    """The shape that the masks lead to, and for the name of each of its weights the name that it has in the source.

    Raises ValueError if layers keep different counts, so that no uniform shape exists.
    """
    layers, shapes = [i for i in range(cfg.n_layers) if not is_closed(masks, i)], set()
    for i in layers:
        z = layer_masks(masks, i, cfg)
        heads, kv_heads = kept_heads(z["head"], cfg)
        shapes.add((len(heads), len(kv_heads), len(kept(z["intermediate"], cfg.intermediate_size))))
    if len(shapes) != 1:
        raise ValueError(f"the masks keep different shapes (heads, KV heads, MLP units) in layers: {sorted(shapes)}")
    n_heads, n_kv_heads, intermediate_size = shapes.pop()
    shape = dataclasses.replace(cfg, hidden_size=len(kept(masks.get("hidden"), cfg.hidden_size)), n_layers=len(layers),
                                n_heads=n_heads, n_kv_heads=n_kv_heads, intermediate_size=intermediate_size)
    names = {}
    for name in parameter_shapes(shape):
        parts = name.split(".")
        names[name] = ".".join([*parts[:2], str(layers[int(parts[2])]), *parts[3:]]) if parts[1] == "layers" else name
    return shape, names


def cut(name: str, w: Tensor, cfg: ModelConfig, masks: dict[str, Tensor]) -> Tensor:
    """One weight of the source, [out, in] or [out], folded and cut.  Makes at most two copies of it, one after the other."""
    parts, h, z_hidden = name.split("."), cfg.head_dim, masks.get("hidden")
    hidden = kept(z_hidden, cfg.hidden_size)
    # tied: the head is the scaled embedding too, which does to the logits what scaling the norm would have done
    sides = {  # module: (rows to keep, columns to keep, factors of rows, factors of columns); None: all, or one
        "embed_tokens": (None, hidden, None, z_hidden),
        "norm": (hidden, None, None if cfg.tie_embeddings else z_hidden, None),
        "lm_head": (None, hidden, None, None),
    }
    if parts[1] == "layers":
        z = layer_masks(masks, int(parts[2]), cfg)
        units, (heads, kv_heads) = kept(z["intermediate"], cfg.intermediate_size), kept_heads(z["head"], cfg)
        q = (heads[:, None] * h + torch.arange(h)).flatten()  # the units of a head are next to each other
        kv = (kv_heads[:, None] * h + torch.arange(h)).flatten()
        sides = {
            "input_layernorm": (hidden, None, z["attention_norm"], None),
            "q_proj": (q, hidden, None, None),
            "k_proj": (kv, hidden, None, None),
            "q_norm": (q if cfg.qk_norm == "all" else None, None, None, None),  # else [h], for every head the same
            "k_norm": (kv if cfg.qk_norm == "all" else None, None, None, None),
            "v_proj": (kv, hidden, None, None),
            "o_proj": (hidden, q, z["attention_out"], None if z["head"] is None else z["head"].repeat_interleave(h)),
            "post_attention_layernorm": (hidden, None, z["mlp_norm"], None),
            "gate_proj": (units, hidden, None, None),
            "up_proj": (units, hidden, z["intermediate"] if cfg.gated_mlp else None, None),
            "down_proj": (hidden, units, z["mlp_out"], None if cfg.gated_mlp else z["intermediate"]),
        }
    rows, columns, row_factors, column_factors = sides[parts[-2]]
    w = w if rows is None else w[rows]
    if w.dim() == 2:
        w = w[:, columns]  # a copy, and so is w[rows] of a vector: the factors go into it in place
        if column_factors is not None:
            w *= column_factors[columns]
    if row_factors is not None:
        w *= row_factors[rows].view(-1, *[1] * (w.dim() - 1))
    return w


@torch.no_grad()
def compact(weights: dict[str, Tensor], cfg: ModelConfig, masks: dict[str, Tensor]) -> tuple[dict[str, Tensor], ModelConfig]:
    """Fold and cut.  weights: a Transformer's named parameters.  masks: as its forward takes them, any values of at least 0.

    Returns the compacted model's named parameters and shape.  Raises ValueError if no uniform shape exists.
    """
    shape, names = compacted_shape(cfg, masks)
    return {name: cut(old, weights[old], cfg, masks) for name, old in names.items()}, shape


# ---- the check


class OnDisk(nn.Module):
    """A parameter that is read each time that it is used, and dropped behind it."""

    def __init__(self, read: Callable[[], Tensor]):
        super().__init__()
        self.read = read

    def forward(self, _: Tensor) -> Tensor:
        return self.read()


def model_on_disk(cfg: ModelConfig, read: Callable[[str], Tensor]) -> Transformer:
    """A model that holds no weights; read(name) gives them."""
    with torch.device("meta"):
        model = Transformer(cfg)
    for name in parameter_shapes(cfg):
        module, kind = name.rsplit(".", 1)
        register_parametrization(model.get_submodule(module), kind, OnDisk(functools.partial(read, name)), unsafe=True)
    return model


@torch.no_grad()
def largest_difference(masked: Transformer, masks: dict[str, Tensor], dense: Transformer) -> tuple[float, float]:
    """Logits of both models on random tokens: (largest absolute difference, largest magnitude)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(masked.cfg.vocab_size, (2, min(CHECKED, masked.cfg.context_length)), generator=generator)
    expected = masked(tokens, masks=masks)
    return float((expected - dense(tokens)).abs().max()), float(expected.abs().max())


def report(masks: dict[str, Tensor], cfg: ModelConfig, *, sampled: bool) -> None:
    """Print what was kept, and how sure training was of it if the masks were samples."""
    print(f"layers kept: {[i for i in range(cfg.n_layers) if not is_closed(masks, i)]}")
    for i in range(cfg.n_layers):
        z = layer_masks(masks, i, cfg)
        if not is_closed(masks, i):
            heads, kv_heads = kept_heads(z["head"], cfg)
            print(f"  layer {i}: heads {heads.tolist()}, KV heads {kv_heads.tolist()}, "
                  f"{len(kept(z['intermediate'], cfg.intermediate_size))} of {cfg.intermediate_size} MLP units")
    for name, z in masks.items():
        dead, between = undecided(z)
        sure = f", {dead} of them near-dead (z < 0.05), {between} undecided (z < 0.95)" if sampled else ""
        print(f"{name}: {int((z > 0).sum())} of {z.numel()} units kept{sure}")


def planned_steps(folder: Path) -> int:
    """max_steps of the run in this folder; 0 where there is none, or it does not say."""
    try:
        steps = began_with(str(folder)).get("max_steps")
    except UserError:  # of no weight: the checkpoint has all that a cut needs
        return 0
    return steps if type(steps) is int else 0


def main(cfg: CompactSettings) -> None:
    folder = Path(cfg.checkpoint)
    check(folder.is_dir(), f"checkpoint = {folder} does not exist")
    folder = newest_in(folder)
    check(not Path(cfg.out_dir).exists(), f"out_dir = {cfg.out_dir} exists already; remove it or choose another name")
    check((folder / "masks.safetensors").is_file(), f"{folder} is no checkpoint of prune.py: it has no masks.safetensors")
    state = read_state(folder)
    steps = planned_steps(folder.parent)
    if state.step < steps:
        print(f"note: this is step {state.step} of the {steps} that the run was begun for")
    source = read_model_config(folder, ModelConfig)
    target = read_model_config(folder, ModelConfig, "target_config.json")
    saved = tensor_names(folder / "masks.safetensors")
    with user_errors():
        sets = mask_sets(source, target, tuple(name.split(".")[1] for name in saved))
        learned = load_weights(class_of(saved)(sets), folder / "masks.safetensors")
        masks = learned.deterministic()
        shape, names = compacted_shape(source, masks)
    report(masks, source, sampled=isinstance(learned, L0))
    if "layer" not in masks:  # head_layer and mlp close blocks, and how many layers lose both is not set beforehand
        if shape.n_layers != target.n_layers:
            print(f"{shape.n_layers} layers, not the target's {target.n_layers}: attention and MLP blocks close one by one")
        target = dataclasses.replace(target, n_layers=shape.n_layers)
    check(shape == target, f"compacted to {shape}, not to the target {target}")
    path, shapes = folder / "model.safetensors", parameter_shapes(shape)
    read = tensor_reader(path, parameter_shapes(source))

    def load(name: str) -> Tensor:
        tensor = cut(names[name], read(names[name]).float(), source, masks)
        check_finite(tensor, path, names[name])  # what is cut away shows up in the logits, as nan
        return tensor

    with new_folder(cfg.out_dir) as temporary, verified(folder), one_thread():
        weights = temporary / "model.safetensors"
        write_tensors(weights, shapes, dict.fromkeys(shapes, torch.float32), load)
        write_assets(temporary, shape, [folder / "assets"])
        for name in ("domain_weights", "reference_loss"):
            (temporary / f"{name}.json").write_text(json.dumps(getattr(state, name), indent=2) + "\n")
        masked = model_on_disk(source, lambda name: read(name).float())
        dense = model_on_disk(shape, tensor_reader(weights, shapes))
        difference, largest = largest_difference(masked, masks, dense)
        print(f"{source.n_params():,} -> {shape.n_params():,} parameters; masked and compacted logits differ by at most "
              f"{difference:.2e} (largest logit {largest:.2f})")
        check(difference <= TOLERANCE * max(1.0, largest), f"that is more than {TOLERANCE} of the largest logit: a bug, "
              "or weights that are not finite, or too large for fp32; nothing was written")
    print(f"wrote {cfg.out_dir}, with domain_weights.json and reference_loss.json as pruning ended with them")


if __name__ == "__main__":
    run_stage(main, CompactSettings)
