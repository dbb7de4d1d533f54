"""Scores without training: what they measure, and that compact.py cuts by them and prune.py starts from them."""

import dataclasses

import pytest
import torch
from conftest import SHORT, TARGET, TINY, prune_settings, random_model, tiny_config, write_model
from safetensors.torch import load_file

import compact
import prune
from model import ModelConfig
from run.settings import UserError
from run.weights import read_model_config
from tools.importance import ImportanceSettings, main

SCORES = ["gradient", "activation", "magnitude", "random"]


def settings(data_dir, out_dir, source, **changes) -> ImportanceSettings:
    values = dict(data_dir=str(data_dir), out_dir=str(out_dir), init_from=str(source), split="train",
                  calibration_sequences=16) | SHORT | TARGET | changes
    return ImportanceSettings(**values)


@pytest.mark.parametrize("score", SCORES)
def test_compact_cuts_by_the_scores_and_prune_starts_from_them(tmp_path, data_dir, source, score):
    main(settings(data_dir, tmp_path / "scores", source, score=score))
    compact.main(compact.CompactSettings(checkpoint=str(tmp_path / "scores"), out_dir=str(tmp_path / "cut")))
    target = {name.removeprefix("target_"): value for name, value in TARGET.items()}
    assert read_model_config(tmp_path / "cut", ModelConfig) == dataclasses.replace(tiny_config(), **target)
    found = load_file(tmp_path / "scores" / "step_0000000" / "masks.safetensors")
    hidden = found["scores.hidden"]
    rows = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    kept = hidden.argsort(descending=True)[:TARGET["target_hidden_size"]].sort().values
    assert torch.equal(load_file(tmp_path / "cut" / "model.safetensors")["model.embed_tokens.weight"], rows[:, kept])
    prune.main(prune_settings(data_dir, tmp_path / "run", source, relaxation="topk", freeze_weights=True,
                              mask_learning_rate=1e-9, init_scores=str(tmp_path / "scores")))
    scores = load_file(tmp_path / "run" / "step_0000006" / "masks.safetensors")["scores.hidden"]
    assert set(scores.topk(len(kept)).indices.tolist()) == set(kept.tolist())  # a rate of nothing keeps the choice


@pytest.mark.parametrize("score", ["gradient", "activation", "magnitude"])
def test_a_unit_that_does_nothing_is_the_first_to_go(tmp_path, data_dir, score):
    cfg = tiny_config()
    weights = dict(random_model(cfg).named_parameters())
    with torch.no_grad():
        for i in range(cfg.n_layers):
            mlp, attention = f"model.layers.{i}.mlp", f"model.layers.{i}.self_attn"
            for name in ("gate_proj", "up_proj"):
                weights[f"{mlp}.{name}.weight"][5] = 0
            weights[f"{mlp}.down_proj.weight"][:, 5] = 0
            for name, rows in (("k_proj", 8), ("v_proj", 8), ("q_proj", 16)):
                weights[f"{attention}.{name}.weight"][:rows] = 0  # KV head 0 and its two query heads
            weights[f"{attention}.o_proj.weight"][:, :16] = 0
        for name, w in weights.items():
            if name.endswith(("norm.weight", "o_proj.weight", "down_proj.weight")):
                w[3] = 0  # hidden dimension 3: nothing writes it
            elif name.endswith("proj.weight") or "embed" in name or "lm_head" in name:
                w[:, 3] = 0
    (tmp_path / "source").mkdir()
    write_model(tmp_path / "source", weights, cfg, [])
    main(settings(data_dir, tmp_path / "scores", tmp_path / "source", score=score))
    found = load_file(tmp_path / "scores" / "step_0000000" / "masks.safetensors")
    assert found["scores.hidden"].argmin() == 3
    assert (found["scores.intermediate"].argmin(-1) == 5).all() and (found["scores.kv_head"].argmin(-1) == 0).all()
    assert found["scores.query_head"].shape == (TINY["n_layers"], 2, 2)


def test_the_gradient_score_is_the_squared_change_of_the_loss(tmp_path, data_dir, source):
    """Against finite differences, of one micro-batch."""
    from data import open_run_data
    from model import Transformer
    from run.processes import Processes
    from run.weights import load_weights
    from tools.importance import batches, gradient_scores

    cfg = settings(data_dir, tmp_path / "x", source, calibration_sequences=2)
    model = load_weights(Transformer(tiny_config()), source).double()
    data = open_run_data(cfg.data_dir, [], split="train", seq_len=cfg.seq_len, vocab_size=64, context_length=64)
    processes = Processes(0, 1, torch.device("cpu"), torch.float32)
    _, _, sets = prune.shapes(cfg)
    scores = gradient_scores(cfg, model, sets, data, processes)
    tokens, targets = next(batches(cfg, data, processes))
    for name, at in (("hidden", (7,)), ("layer", (1,)), ("intermediate", (2, 9)), ("kv_head", (0, 1)),
                     ("query_head", (3, 0, 1))):
        def loss(z: float, name=name, at=at) -> float:
            masks = {n: torch.ones(shape, dtype=torch.float64) for n, (shape, _) in sets.items()}
            masks[name][at] = z
            with torch.no_grad():
                return float(model(tokens, targets, masks))

        slope = (loss(1 + 1e-4) - loss(1 - 1e-4)) / 2e-4
        assert float(scores[name][at]) == pytest.approx(slope**2, rel=1e-2, abs=1e-9)


def test_bad_settings_are_refused(tmp_path, data_dir, source):
    (tmp_path / "there" / "step_0000000").mkdir(parents=True)
    with pytest.raises(UserError, match="exists already"):
        main(settings(data_dir, tmp_path / "there", source))
    with pytest.raises(ValueError, match="calibration_sequences = 1"):
        settings(data_dir, tmp_path / "x", source, calibration_sequences=1)
    with pytest.raises(ValueError, match="init_scores"):
        prune_settings(data_dir, tmp_path / "x", source, init_scores="scores")
