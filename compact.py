"""Cut a pruned checkpoint down to a dense model of exactly the target shape.

    python compact.py --checkpoint=out/7b_to_1.3b/step_0003200 --out_dir=out/1.3b_compact

Folds every mask into the weights that the masked forward pass puts it on (model.layer_masks is the one rule for both),
then cuts away the units whose mask is zero and renumbers the layers.  Masked and compacted logits agree to rounding: that
is checked on random tokens before anything is written.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import (check_whole, latest_checkpoint, load_weights, new_folder, read_model_config, read_state,
                        tensor_names, write_model)
from l0 import L0, mask_sets
from model import ModelConfig, Transformer, layer_masks
from settings import check, run_stage, user_errors

TOLERANCE = 1e-4  # of the logits' largest magnitude: what fp32 rounding may do to them


@dataclass(frozen=True)
class CompactSettings:
    checkpoint: str  # a step_* folder of prune.py, or its out_dir for the newest
    out_dir: str  # the model folder to write


def scale(w: Tensor, rows: Tensor | None, columns: Tensor | None = None) -> Tensor:
    """A weight [out, in] or vector [out] times factors of its rows [out] and columns [in]; None is one."""
    if columns is not None:
        w = w * columns
    return w if rows is None else w * (rows[:, None] if w.dim() == 2 else rows)


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


def cut_layer(weights: dict[str, Tensor], prefix: str, cfg: ModelConfig, z: dict[str, Tensor | None],
              hidden: Tensor) -> dict[str, Tensor]:
    """One layer, folded and cut.  z: of model.layer_masks.  hidden: indices of the dimensions to keep.

    Takes the weights whose name starts with prefix, and returns tensors by their name behind it.
    """
    w = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    h, units = cfg.head_dim, kept(z["intermediate"], cfg.intermediate_size)
    heads, kv_heads = kept_heads(z["head"], cfg)
    q_rows = (heads[:, None] * h + torch.arange(h)).flatten()  # rows of a head are next to each other
    kv_rows = (kv_heads[:, None] * h + torch.arange(h)).flatten()
    head_columns = None if z["head"] is None else z["head"].repeat_interleave(h)
    folded = w | {
        "input_layernorm.weight": scale(w["input_layernorm.weight"], z["hidden"]),
        "post_attention_layernorm.weight": scale(w["post_attention_layernorm.weight"], z["hidden"]),
        "self_attn.o_proj.weight": scale(w["self_attn.o_proj.weight"], z["attention_out"], head_columns),
        "mlp.up_proj.weight": scale(w["mlp.up_proj.weight"], z["intermediate"]),
        "mlp.down_proj.weight": scale(w["mlp.down_proj.weight"], z["mlp_out"]),
    }
    if cfg.o_bias:
        folded["self_attn.o_proj.bias"] = scale(w["self_attn.o_proj.bias"], z["attention_out"])
    rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows, "gate_proj": units, "up_proj": units}
    columns = {"o_proj": q_rows, "down_proj": units}
    cut = {}
    for name, t in folded.items():
        module = name.split(".")[-2]
        t = t[rows.get(module, hidden)]
        cut[name] = t[:, columns.get(module, hidden)].contiguous() if t.dim() == 2 else t
    return cut


@torch.no_grad()
def compact(weights: dict[str, Tensor], cfg: ModelConfig, masks: dict[str, Tensor]) -> tuple[dict[str, Tensor], ModelConfig]:
    """Fold and cut.  weights: a Transformer's named parameters.  masks: as its forward takes them, any values in [0, 1].

    Returns the compacted model's named parameters and shape.  Raises ValueError if layers keep different counts, so that
    no uniform shape exists.
    """
    z_hidden = masks.get("hidden")
    hidden = kept(z_hidden, cfg.hidden_size)
    embedding = scale(weights["model.embed_tokens.weight"].T, z_hidden).T
    # tied: the head is the scaled embedding too, which does to the logits what scaling the norm would have done
    norm = weights["model.norm.weight"] if cfg.tie_embeddings else scale(weights["model.norm.weight"], z_hidden)
    out = {"model.embed_tokens.weight": embedding[:, hidden].contiguous(), "model.norm.weight": norm[hidden]}
    if not cfg.tie_embeddings:
        out["lm_head.weight"] = weights["lm_head.weight"][:, hidden].contiguous()
    n_layers = 0
    for i in range(cfg.n_layers):
        if is_closed(masks, i):
            continue
        layer = cut_layer(weights, f"model.layers.{i}.", cfg, layer_masks(masks, i, cfg), hidden)
        out |= {f"model.layers.{n_layers}.{name}": t for name, t in layer.items()}
        n_layers += 1
    shapes = {(out[f"model.layers.{i}.self_attn.q_proj.weight"].shape[0] // cfg.head_dim,
               out[f"model.layers.{i}.self_attn.k_proj.weight"].shape[0] // cfg.head_dim,
               out[f"model.layers.{i}.mlp.up_proj.weight"].shape[0]) for i in range(n_layers)}
    if len(shapes) != 1:
        raise ValueError(f"the masks keep different shapes (heads, KV heads, MLP units) in layers: {sorted(shapes)}")
    n_heads, n_kv_heads, intermediate_size = shapes.pop()
    return out, dataclasses.replace(cfg, hidden_size=len(hidden), n_layers=n_layers, n_heads=n_heads,
                                    n_kv_heads=n_kv_heads, intermediate_size=intermediate_size)


@torch.no_grad()
def largest_difference(masked: Transformer, masks: dict[str, Tensor], dense: Transformer) -> tuple[float, float]:
    """Logits of both models on random tokens: (largest absolute difference, largest magnitude)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(masked.cfg.vocab_size, (2, min(128, masked.cfg.context_length)), generator=generator)
    expected = masked(tokens, masks=masks)
    return float((expected - dense(tokens)).abs().max()), float(expected.abs().max())


def report(masks: dict[str, Tensor], undecided: dict[str, tuple[int, int]], cfg: ModelConfig) -> None:
    """Print what was kept, and how sure training was of it."""
    print(f"layers kept: {[i for i in range(cfg.n_layers) if not is_closed(masks, i)]}")
    for i in range(cfg.n_layers):
        z = layer_masks(masks, i, cfg)
        if not is_closed(masks, i):
            heads, kv_heads = kept_heads(z["head"], cfg)
            print(f"  layer {i}: heads {heads.tolist()}, KV heads {kv_heads.tolist()}, "
                  f"{len(kept(z['intermediate'], cfg.intermediate_size))} of {cfg.intermediate_size} MLP units")
    for name, z in masks.items():
        dead, between = undecided[name]
        print(f"{name}: {int((z > 0).sum())} of {z.numel()} units kept, {dead} of them near-dead (z < 0.05), {between} "
              "undecided (z < 0.95)")


def main(cfg: CompactSettings) -> None:
    folder = Path(cfg.checkpoint)
    check(folder.is_dir(), f"checkpoint = {folder} does not exist")
    folder = latest_checkpoint(folder) or folder
    check(not Path(cfg.out_dir).exists(), f"out_dir = {cfg.out_dir} exists already; remove it or choose another name")
    check((folder / "masks.safetensors").is_file(), f"{folder} is no checkpoint of prune.py: it has no masks.safetensors")
    check_whole(folder)
    state = read_state(folder)
    source = read_model_config(folder, ModelConfig)
    target = read_model_config(folder, ModelConfig, "target_config.json")
    names = tensor_names(folder / "masks.safetensors")
    modules = tuple(name.removeprefix("log_alpha.") for name in names if name.startswith("log_alpha."))
    with user_errors():
        l0 = load_weights(L0(mask_sets(source, target, modules)), folder / "masks.safetensors")
        masks = l0.deterministic()
        with torch.device("meta"):
            model = Transformer(source)
        model = load_weights(model.to_empty(device="cpu"), folder)
        weights, shape = compact(dict(model.named_parameters()), source, masks)
    report(masks, l0.undecided(), source)
    if "layer" not in masks:  # head_layer and mlp close blocks, and how many layers lose both is not set beforehand
        if shape.n_layers != target.n_layers:
            print(f"{shape.n_layers} layers, not the target's {target.n_layers}: attention and MLP blocks close one by one")
        target = dataclasses.replace(target, n_layers=shape.n_layers)
    check(shape == target, f"compacted to {shape}, not to the target {target}")
    with torch.device("meta"):
        dense = Transformer(shape)
    dense.load_state_dict(weights, assign=True)
    difference, largest = largest_difference(model, masks, dense)
    print(f"{source.n_params():,} -> {shape.n_params():,} parameters; masked and compacted logits differ by at most "
          f"{difference:.2e} (largest logit {largest:.2f})")
    check(difference <= TOLERANCE * max(1.0, largest), f"that is more than {TOLERANCE} of the largest logit: a bug, "
          "or weights of a size that fp32 cannot hold; nothing was written")
    with new_folder(cfg.out_dir) as temporary:
        write_model(temporary, weights, shape, [folder / "assets"])
        for name in ("domain_weights", "reference_loss"):
            (temporary / f"{name}.json").write_text(json.dumps(getattr(state, name), indent=2) + "\n")
    print(f"wrote {cfg.out_dir}, with domain_weights.json and reference_loss.json as pruning ended with them")


if __name__ == "__main__":
    run_stage(main, CompactSettings)
