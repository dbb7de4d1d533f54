"""The pictures show what a run wrote, and the page needs no other file."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import (DOMAINS, SHORT, eval_lines, pretrain_settings, prune_settings, refusal, soft_mask, tiny_config,
                      train_lines)

import pretrain
import prune
from l0 import MASKS, dims, mask_sets
from model import layer_masks
from tools import importance, pictures, plot

PNG = b"\x89PNG\r\n\x1a\n"


def lines_of(axis) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), float) for line in axis.get_lines()]


def test_a_pruning_run_has_every_picture_in_one_page(pruned, tmp_path):
    plot.main(plot.PlotSettings(runs=(str(pruned),), out_dir=str(tmp_path)))
    page = (tmp_path / "page.html").read_text()
    embedded = [base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert embedded == [(tmp_path / f"{name}.png").read_bytes() for name in plot.PICTURES]
    assert all(png.startswith(PNG) for png in embedded) and page.count("src=") == len(embedded) and "http" not in page
    for d in DOMAINS:
        assert f"<td>{eval_lines(pruned)[-1][f'eval_loss/{d}']:.4f}</td>" in page


def test_lines_are_the_metrics(pruned):
    run = plot.read_run(pruned)
    for axis, d in zip(pictures.losses(run).axes, DOMAINS):
        losses = [line[f"eval_loss/{d}"] for line in eval_lines(pruned)]
        drawn, reference = lines_of(axis)
        assert drawn.tolist() == losses and set(reference) == {losses[0]}  # the source's own: none was given
    sparsity = pictures.sparsity(run).axes
    for i, name in enumerate(run.last_masks):
        for axis, metrics, scale in ((sparsity[i], ("sparsity", "target_sparsity"), 100),
                                     (sparsity[i + len(run.last_masks)], ("lambda", "phi"), 1)):
            for drawn, metric in zip(lines_of(axis), metrics, strict=True):
                assert np.allclose(drawn, [scale * line[f"{metric}/{name}"] for line in train_lines(pruned)])
    assert pictures.training(run).axes[3].get_lines()[1].get_ydata()[0] == run.target.n_params() / 1e6


def test_flips_and_near_dead_units_are_counted():
    row = torch.tensor
    run = pictures.Run("x", {}, [], [], {}, masks={0: {"hidden": row([1.0, 1.0, 0.0, 0.0])},
                                                   5: {"hidden": row([1.0, 0.0, 0.04, 0.0])},
                                                   9: {"hidden": row([0.5, 0.0, 0.01, 0.0])}})
    flipped, dead, between = (lines_of(axis)[0].tolist() for axis in pictures.decisions(run).axes)
    assert (flipped, dead, between) == ([50, 0], [0, 50, 50], [0, 0, 50])


@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_heat_maps_show_the_factors_of_the_forward_pass(n_kv_heads):
    cfg, generator = tiny_config(n_kv_heads=n_kv_heads), torch.Generator().manual_seed(0)
    heads = {"kv_head", "query_head"} if n_kv_heads == 2 else {"head"}
    n = dims(cfg)
    masks = {name: soft_mask(tuple(n[x] for x in axes), n[axes[-1]] - 1, generator)
             for name, axes in MASKS.items() if name in heads | {"layer", "head_layer", "mlp", "intermediate"}}
    shown = pictures.by_layer(masks, cfg)
    for i in range(cfg.n_layers):
        z = layer_masks(masks, i, cfg)
        assert torch.allclose(shown["query heads"][i], z["head"] * z["attention_out"][0])
        assert torch.allclose(shown["MLP units"][i], z["intermediate"] * z["mlp_out"][0])


def test_a_run_under_way_is_shown_as_far_as_it_is(pruned, tmp_path):
    """No checkpoint yet, and the last line is half-written."""
    run = tmp_path / "run"
    shutil.copytree(pruned, run)
    for folder in run.glob("step_*"):
        shutil.rmtree(folder)
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole[:whole.index('"step": 3') + 20])
    (run / "masks" / "step_0000006.safetensors").unlink()
    plot.main(plot.PlotSettings(runs=(str(run),)))
    assert {p.name for p in (run / "plot").iterdir()} == {"page.html", *(f"{name}.png" for name in plot.PICTURES)}


def test_masks_of_topk(data_dir, source, tmp_path):
    cfg = prune_settings(data_dir, tmp_path / "scores", source)
    importance.main(importance.ImportanceSettings(**vars(cfg) | dict(score="magnitude", calibration_sequences=2)))
    prune.main(prune_settings(data_dir, tmp_path / "run", source, relaxation="topk", init_scores=str(tmp_path / "scores")))
    plot.main(plot.PlotSettings(runs=(str(tmp_path / "run"),)))
    run = plot.read_run(tmp_path / "run")
    assert {name: int((z != 0).sum(-1).unique()) for name, z in run.last_masks.items()} == {
        name: kept for name, (_, kept) in mask_sets(run.source, run.target).items()}  # of each row as many as asked
    assert (tmp_path / "run" / "plot" / "sparsity.png").exists()


def test_runs_are_compared_token_by_token(pruned, data_dir, source, tmp_path):
    dense = tmp_path / "dense"
    pretrain.main(pretrain_settings(data_dir, dense, source, seq_len=16))
    plot.main(plot.PlotSettings(runs=(str(pruned), str(dense)), compare=True, out_dir=str(tmp_path / "a")))
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"page.html", "losses.png"}  # one has no masks
    first, second = pictures.compare_losses([plot.read_run(pruned), plot.read_run(dense)]).axes[0].get_lines()
    tokens = SHORT["max_steps"] * SHORT["global_batch_size"] * SHORT["seq_len"] / 1e6
    assert first.get_xdata()[-1] == tokens and second.get_xdata()[-1] == tokens / 2
    plot.main(plot.PlotSettings(runs=(str(pruned), str(pruned)), compare=True, out_dir=str(tmp_path / "b")))
    run = plot.read_run(pruned)
    bars = pictures.compare_masks([run, run]).axes[0].containers[0]
    assert [bar.get_height() for bar in bars] == pytest.approx([100] * len(run.last_masks))
    assert (tmp_path / "b" / "masks.png").exists()


def test_refusals(pruned, tmp_path, monkeypatch, capsys):
    def said(*argv: str) -> str:
        return refusal("plot", [str(a) for a in argv], monkeypatch, capsys)

    assert said() == "no value for runs: folders of runs, each with its metrics.jsonl; give RUNS"
    assert "is no folder of a run: it has no metrics.jsonl" in said(tmp_path)
    assert "--compare takes 2 to 7" in said("--compare", pruned)
    assert "one run is plotted by itself" in said(pruned, pruned)
    (tmp_path / "config.json").write_text(json.dumps({"seq_len": 1}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1}\n')
    assert "are not what a run of prune.py or pretrain.py writes" in said(tmp_path)
    (tmp_path / "config.json").write_text((pruned / "config.json").read_text())
    (tmp_path / "metrics.jsonl").write_text("")
    assert "holds no evaluation yet" in said(tmp_path)
    assert not (tmp_path / "plot").exists()
