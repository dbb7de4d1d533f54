"""Both loops: what must be the same however a run is cut, split or resumed, and what becomes of runs that go wrong."""

import dataclasses
import json
import math
import shutil
import signal
import sys

import pytest
import torch
from conftest import (DOMAINS, SHORT, STAGES, STEERED, TARGET, at_draw, eval_lines, flags, pretrain_settings, prune_settings,
                      read_metrics, refusal, run_script, same_files, tiny_config, train_lines, without_speed, write_data_dir,
                      write_tokens)
from safetensors.torch import load_file, save_file

import pretrain
import prune
from data import evaluate, open_run_data
from l0 import L0, mask_sets
from model import Transformer
from run.processes import Processes, clip_and_step, lr_factor, make_optimizer
from run.settings import UserError
from run.weights import load_weights
from tools import importance

SAME_SIZE = dict.fromkeys(TARGET) | dict(pruning_modules=())  # target None: the source's


# ---- the same weights


@pytest.mark.parametrize("update", [dict(update="constant"), STEERED])
def test_prune_without_masks_is_pretrain(tmp_path, data_dir, source, update):
    shared = dict(max_steps=5, eval_interval=2, **update)
    prune.main(prune_settings(data_dir, tmp_path / "a", source, **SAME_SIZE, **shared))
    pretrain.main(pretrain_settings(data_dir, tmp_path / "b", source, **shared))
    a, b = (load_file(tmp_path / x / "step_0000005" / "model.safetensors") for x in "ab")
    start = load_file(source / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and not torch.equal(a[n], start[n]) for n in a)
    assert [x["loss"] for x in train_lines(tmp_path / "a")] == [x["loss"] for x in train_lines(tmp_path / "b")]
    assert eval_lines(tmp_path / "a") == eval_lines(tmp_path / "b")
    same_files(tmp_path / "a" / "step_0000005" / "assets", tmp_path / "b" / "step_0000005" / "assets")


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_identical(tmp_path, data_dir, source, stage, monkeypatch):
    main, make = STAGES[stage]
    changes = dict(max_steps=7, eval_interval=2, weight_decay=0.1, **STEERED)
    whole, parts = (make(data_dir, tmp_path / x, source, **changes) for x in ("whole", "parts"))
    main(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_draw(patch, 5, lambda: signal.default_int_handler(signal.SIGINT, None))
        main(parts)
    assert train_lines(tmp_path / "parts")[-1]["step"] == 5  # past the checkpoint: to be cut
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # what a crash leaves of a line
    main(dataclasses.replace(parts, resume=True))
    assert without_speed(tmp_path / "parts") == without_speed(tmp_path / "whole")
    same_files(tmp_path / "whole" / "step_0000007", tmp_path / "parts" / "step_0000007")
    state = json.loads((tmp_path / "whole" / "step_0000007" / "state.json").read_text())
    assert sum(state["cursors"].values()) == 7 * 8 and state["evaluated"] == 7


def test_an_evaluation_tells_people_each_sparsity_beside_its_target(tmp_path, data_dir, source, capsys):
    prune.main(prune_settings(data_dir, tmp_path / "out", source))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    line = {x["step"]: x for x in train_lines(tmp_path / "out")}[3]
    for name in ("hidden", "layer", "intermediate"):
        assert f"{name} {line[f'sparsity/{name}']:.3f} of {line[f'target_sparsity/{name}']:.3f}" in said[1]
    assert "sparsity" not in said[0]  # the source as it is


SCORES = dict(relaxation="topk", freeze_weights=True, mask_learning_rate=0.1)


@pytest.fixture(scope="module")
def scores(tmp_path_factory, data_dir, source) -> str:
    """A folder of scores to start from."""
    folder = tmp_path_factory.mktemp("scores") / "activation"
    importance.main(importance.ImportanceSettings(
        data_dir=str(data_dir), out_dir=str(folder), split="train", init_from=str(source), score="activation",
        calibration_sequences=16, **SHORT | TARGET))
    return str(folder)


def test_masks_learned_alone_leave_the_source_as_it_was_and_resume_to_the_bit(tmp_path, data_dir, source, scores):
    whole = prune_settings(data_dir, tmp_path / "whole", source, init_scores=scores, **SCORES)
    prune.main(whole)
    last = tmp_path / "whole" / "step_0000006"
    before, after = (load_file(folder / "model.safetensors") for folder in (source, last))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    moments = {name.split(".")[1] for name in load_file(last / "optimizer.safetensors")}
    assert moments == {"scores", "gains"}  # none of weights
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "step_0000006")
    prune.main(dataclasses.replace(whole, out_dir=str(tmp_path / "resumed"), resume=True))
    same_files(last, tmp_path / "resumed" / "step_0000006")
    assert without_speed(tmp_path / "whole") == without_speed(tmp_path / "resumed")


def test_whole_layers_are_not_learned_from_a_frozen_source(tmp_path, data_dir, source, scores):
    depth = dict(target_hidden_size=None, target_n_heads=None, target_n_kv_heads=None, target_intermediate_size=None)
    with pytest.raises(UserError, match="nothing to learn"):
        prune.main(prune_settings(data_dir, tmp_path / "run", source, init_scores=scores, **SCORES, **depth))
    with pytest.raises(UserError, match="nothing to learn: freeze_weights, and no masks"):
        prune.main(prune_settings(data_dir, tmp_path / "run", source, freeze_weights=True, **SAME_SIZE))
    with pytest.raises(ValueError, match="topk starts from scores"):
        prune_settings(data_dir, tmp_path / "run", source, **SCORES)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_masks_learned_alone_are_the_same_on_two_processes(tmp_path, data_dir, source, scores, parallel):
    prune.main(prune_settings(data_dir, tmp_path / "one", source, init_scores=scores, **SCORES))
    two = prune_settings(data_dir, tmp_path / "two", source, parallel=parallel, init_scores=scores, **SCORES)
    done = run_script("prune.py", *flags(two), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "step_0000006" / "masks.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4)


def test_resume_of_a_finished_run_does_nothing(tmp_path, data_dir, source):
    cfg = pretrain_settings(data_dir, tmp_path / "out", source)
    pretrain.main(cfg)
    before = without_speed(tmp_path / "out")
    pretrain.main(dataclasses.replace(cfg, resume=True))
    assert without_speed(tmp_path / "out") == before


def test_checkpointing_a_run_more_often_changes_nothing(tmp_path, data_dir, source):
    for name, interval in (("often", 1), ("never", 100)):
        prune.main(prune_settings(data_dir, tmp_path / name, source, save_interval=interval))
    same_files(tmp_path / "often" / "step_0000006", tmp_path / "never" / "step_0000006")
    assert len(list((tmp_path / "often").glob("step_*"))) == 6


def test_more_micro_batches_are_the_same_batch(tmp_path, data_dir, source):
    for micro in (8, 2):
        pretrain.main(pretrain_settings(data_dir, tmp_path / str(micro), source, max_steps=10, micro_batch_size=micro))
    a, b = (train_lines(tmp_path / name) for name in "82")
    assert len(a) == 10
    for x, y in zip(a, b):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5)
        assert y["grad_norm/weights"] == pytest.approx(x["grad_norm/weights"], rel=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_the_losses_of_one(tmp_path, data_dir, source, stage, parallel):
    main, make = STAGES[stage]
    changes = dict(max_steps=20, eval_interval=10, **STEERED)
    main(make(data_dir, tmp_path / "one", source, **changes))
    two = make(data_dir, tmp_path / "two", source, parallel=parallel, **changes)
    done = run_script(f"{stage}.py", *flags(two), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (without_speed(tmp_path / name) for name in ("one", "two"))
    assert [x["step"] for x in one] == [x["step"] for x in two] and len(one) == 20 + 3
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a:
            if "loss" in name or name.startswith(("sparsity", "domain_weight")):
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), (a["step"], name)
    files = ["state.json", "model.safetensors", "optimizer.safetensors"] + ["masks.safetensors"] * (stage == "prune")
    for name in files:  # nothing depends on the number of ranks
        assert (tmp_path / "two" / "step_0000020" / name).is_file()
    cursors = [json.loads((tmp_path / x / "step_0000020" / "state.json").read_text())["cursors"] for x in ("one", "two")]
    assert cursors[0] == cursors[1]


@pytest.mark.parametrize("stage", STAGES)
def test_sharded_and_whole_runs_resume_each_other(tmp_path, data_dir, source, stage):
    """10 steps of one process and 10 of two that shard, and the other way round: both are the run of one process."""
    main, make = STAGES[stage]
    changes = dict(max_steps=20, eval_interval=10, save_interval=10, **STEERED)
    main(make(data_dir, tmp_path / "one", source, **changes))
    shutil.copytree(tmp_path / "one", tmp_path / "then_two")
    shutil.rmtree(tmp_path / "then_two" / "step_0000020")
    two = make(data_dir, tmp_path / "then_two", source, parallel="fsdp", resume=True, **changes)
    done = run_script(f"{stage}.py", *flags(two), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    two = make(data_dir, tmp_path / "two", source, parallel="fsdp", **changes)
    done = run_script(f"{stage}.py", *flags(two), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(tmp_path / "two" / "step_0000020")
    main(make(data_dir, tmp_path / "two", source, resume=True, **changes))
    weights = [load_file(tmp_path / x / "step_0000020" / "model.safetensors") for x in ("one", "then_two", "two")]
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
    losses = [[x["loss"] for x in train_lines(tmp_path / x)] for x in ("one", "then_two", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_sharded_and_whole_runs_are_one_in_bf16(tmp_path, data_dir, source, stage):
    """FSDP rounds weights that DDP does not: norms', and those that masks scale.  So to three digits, not to the bit."""
    make = STAGES[stage][1]
    for parallel in ("ddp", "fsdp"):
        cfg = make(data_dir, tmp_path / parallel, source, parallel=parallel, dtype="bfloat16", max_steps=12, eval_interval=6)
        done = run_script(f"{stage}.py", *flags(cfg), processes=2)
        assert done.returncode == 0, done.stderr[-3000:]
    for read in (train_lines, eval_lines):
        ddp, fsdp = (read(tmp_path / parallel) for parallel in ("ddp", "fsdp"))
        name = "loss" if read is train_lines else "eval_loss"
        assert [x[name] for x in fsdp] == pytest.approx([x[name] for x in ddp], rel=1e-3)


# ---- masks


@pytest.mark.parametrize("count", ["expected", "rescaled"])
def test_expected_sparsities_reach_their_targets(tmp_path, data_dir, source, count):
    cfg = prune_settings(data_dir, tmp_path / "out", source, max_steps=240, warmup_steps=10, lagrangian_warmup_steps=60,
                         eval_interval=120, save_interval=1000, global_batch_size=4, micro_batch_size=2, count=count)
    prune.main(cfg)
    last = train_lines(tmp_path / "out")[-1]
    names = [k.removeprefix("sparsity/") for k in last if k.startswith("sparsity/")]
    assert sorted(names) == ["hidden", "intermediate", "kv_head", "layer", "query_head"]
    for name in names:
        assert abs(last[f"sparsity/{name}"] - last[f"target_sparsity/{name}"]) < 0.02, (name, last)


def test_evaluation_takes_the_masks_own_counts_and_the_targets_at_the_end(data_dir, source, pruned):
    cfg = prune_settings(data_dir, pruned, source)
    data = open_run_data(data_dir, [], split="train", seq_len=32, vocab_size=64, context_length=64)
    target = dataclasses.replace(tiny_config(), **{k.removeprefix("target_"): v for k, v in TARGET.items()})
    for line, at_target in zip(eval_lines(pruned)[1:], (False, True)):
        folder = pruned / f"step_{line['step']:07d}"
        masks = load_weights(L0(mask_sets(tiny_config(), target)), folder / "masks.safetensors")
        model = load_weights(Transformer(tiny_config()), folder)
        alone = Processes(0, 1, torch.device("cpu"), torch.float32)
        losses = [evaluate(model, masks.deterministic(target=t), data.eval, cfg, alone) for t in (False, True)]
        assert losses[0] != losses[1] and losses[at_target] == {d: line[f"eval_loss/{d}"] for d in DOMAINS}


@pytest.mark.parametrize("stage", STAGES)
def test_evaluations_between_take_fewer_sequences(tmp_path, data_dir, source, stage):
    """Those of the first and the last are all that there are, and a resumed run takes the same."""
    main, make = STAGES[stage]
    sizes, rows = [], []

    def counting(model, masks, splits, cfg, processes, *, turn=None):
        sizes.append(turn)
        return evaluate(model, masks, splits, cfg, processes, turn=turn)

    changes = dict(eval_interval=2, max_steps=7, **STEERED)
    for name, few in (("all", 0), ("few", 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[stage], "evaluate", counting)
            main(make(data_dir, tmp_path / name, source, eval_between=few, **changes))
        rows.append(eval_lines(tmp_path / name))
    assert sizes == [None, 1, 2, 3, None] * 2
    assert rows[0][0] == rows[1][0] and all(rows[0][i]["eval_loss"] != rows[1][i]["eval_loss"] for i in (1, 2, 3))


def test_the_ramp_and_the_schedule_are_logged_as_they_are_used(pruned):
    lines = train_lines(pruned)
    want = {"hidden": 12 / 32, "layer": 1 / 4, "intermediate": 18 / 48, "kv_head": 1 / 2, "query_head": 1 / 2}
    for line in lines:
        for name, t in want.items():
            assert line[f"target_sparsity/{name}"] == pytest.approx(t * min(1, line["step"] / 2))
    cfg = prune_settings(pruned, pruned, pruned)
    assert [line["lr_factor"] for line in lines] == [lr_factor(step, cfg) for step in range(6)]
    assert lr_factor(0, cfg) == 0.5 and lr_factor(1, cfg) == lr_factor(2, cfg) == 1 and lr_factor(6, cfg) == cfg.min_lr_ratio


@pytest.mark.parametrize("modules, target", [
    (("layer",), dict(target_n_layers=3)), (("head_layer", "mlp"), dict(target_n_layers=3)),
    (("hidden",), dict(target_hidden_size=20)), (("intermediate",), dict(target_intermediate_size=30)),
    (("kv_head",), dict(target_n_heads=2, target_n_kv_heads=1)),
    (("query_head",), dict(target_n_heads=2, target_n_kv_heads=2)),
])
def test_any_subset_of_masks_trains(tmp_path, data_dir, source, modules, target):
    changes = SAME_SIZE | target | dict(pruning_modules=modules, max_steps=2)
    prune.main(prune_settings(data_dir, tmp_path / "out", source, **changes))
    last = train_lines(tmp_path / "out")[-1]
    assert {k.removeprefix("phi/") for k in last if k.startswith("phi/")} == set(modules)
    assert all(line["loss"] is not None and line["skipped"] == 0 for line in train_lines(tmp_path / "out"))
    masks = load_file(tmp_path / "out" / "step_0000002" / "masks.safetensors")
    assert masks.keys() == {f"{part}.{m}" for m in modules for part in ("log_alpha", "lambda_", "phi")}


def test_metrics_hold_what_they_promise(pruned):
    sets = ("hidden", "layer", "intermediate", "kv_head", "query_head")
    train = {"step", "loss", "loss/lagrangian", "expected_params", "expected_prunable_params", "lr_factor", "skipped",
             "tokens_per_second", "mfu", *(f"grad_norm/{group}" for group in ("weights", "log_alpha", "multipliers")),
             *(f"{kind}/{m}" for m in sets for kind in ("sparsity", "target_sparsity", "lambda", "phi"))}
    evaluation = {"step", "eval_loss", *(f"{kind}/{d}" for d in DOMAINS
                                         for kind in ("eval_loss", "eval_bits_per_byte", "domain_weight"))}
    lines = read_metrics(pruned)
    assert [(x["step"], "loss" in x) for x in lines] == [
        (0, False), (1, True), (2, True), (3, True), (3, False), (4, True), (5, True), (6, True), (6, False)]
    for line in lines:
        assert line.keys() == (train if "loss" in line else evaluation)
        assert all(isinstance(v, (int, float)) for k, v in line.items() if k != "mfu"), line
        if "loss" not in line:
            assert line["eval_loss"] == pytest.approx(sum(line[f"eval_loss/{d}"] for d in DOMAINS) / 3)
            assert sum(line[f"domain_weight/{d}"] for d in DOMAINS) == pytest.approx(1)
            for d in DOMAINS:  # four bytes a token here
                assert line[f"eval_bits_per_byte/{d}"] == pytest.approx(line[f"eval_loss/{d}"] / math.log(2) / 4)
    assert lines[1]["tokens_per_second"] > 0 and lines[1]["skipped"] == 0
    assert sorted(p.name for p in (pruned / "masks").iterdir()) == [f"step_{s:07d}.safetensors" for s in (0, 3, 6)]
    assert (pruned / "masks" / "step_0000006.safetensors").read_bytes() == (
        pruned / "step_0000006" / "masks.safetensors").read_bytes()
    assert lines[1]["expected_params"] > lines[-2]["expected_params"]


def test_a_line_holds_means_over_its_steps(tmp_path, data_dir, source):
    for name, interval in (("each", 1), ("third", 3)):
        pretrain.main(pretrain_settings(data_dir, tmp_path / name, source, log_interval=interval))
    each, third = train_lines(tmp_path / "each"), train_lines(tmp_path / "third")
    assert [x["step"] for x in third] == [3, 6]
    for i, line in enumerate(third):
        for name in ("loss", "grad_norm/weights"):
            assert line[name] == pytest.approx(sum(x[name] for x in each[3 * i:3 * i + 3]) / 3, rel=1e-5)


# ---- domains


def test_without_reference_losses_the_sources_own_are_kept(pruned):
    first = eval_lines(pruned)[0]
    assert first["step"] == 0
    for step in ("step_0000003", "step_0000006"):
        state = json.loads((pruned / step / "state.json").read_text())
        assert state["reference_loss"] == {d: first[f"eval_loss/{d}"] for d in DOMAINS}


@pytest.mark.parametrize("stage", STAGES)
def test_a_domain_without_evaluation_tokens_keeps_its_weight(tmp_path, source, stage, capsys):
    data_dir = write_data_dir(tmp_path / "data", dict.fromkeys(DOMAINS, 5000))
    write_tokens(data_dir, "play", "eval", [])
    main, make = STAGES[stage]
    reference = {"code": 1.0, "play": 1.0, "wiki": 3.0}
    main(make(data_dir, tmp_path / "out", source, update="doremi", reference_loss=reference,
              domain_weights={"code": 0.4, "play": 0.35, "wiki": 0.25}))
    lines = eval_lines(tmp_path / "out")
    assert [x["eval_loss/play"] for x in lines] == [None] * 3 and [x["domain_weight/play"] for x in lines] == [0.35] * 3
    assert lines[-1]["domain_weight/code"] > 0.5 and lines[-1]["eval_loss"] is not None
    assert lines[-1]["eval_bits_per_byte/play"] is None
    said = capsys.readouterr().out  # each has 700 held-out tokens but this one, and 5 sequences are asked for
    assert "play n/a n/a 0.350, wiki" in said and "note: fewer held-out sequences than eval_sequences = 5: play 0\n" in said


def test_a_used_up_domain_is_announced_or_stops_the_run(tmp_path, source, capsys):
    data_dir = write_data_dir(tmp_path / "data", {"big": 20_000, "small": 32 * 10 + 1})
    cfg = pretrain_settings(data_dir, tmp_path / "wrap", source)  # 24 of 48 sequences from a domain of 10
    pretrain.main(cfg)
    out = capsys.readouterr().out
    small = json.loads((tmp_path / "wrap" / "step_0000006" / "state.json").read_text())["cursors"]["small"]
    assert small > 10 and out.count("warning: domain small is used up") == (small - 1) // 10
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("small")] == ["2.40"]  # the budget said so
    assert "note: domain small has tokens for 1 of 2.40 epochs at its weight of 0.5000" in out
    error = dataclasses.replace(cfg, out_dir=str(tmp_path / "error"), on_exhausted="error")
    with pytest.raises(UserError, match=r"domain small has tokens for 1 of 2\.40 epochs .* and on_exhausted = error"):
        pretrain.main(error)
    assert not (tmp_path / "error" / "metrics.jsonl").exists()
    # a run that sees this only when its weights have moved stops before the step, with all done up to then on the disk
    moving = dataclasses.replace(error, domain_weights={"big": 0.85, "small": 0.15}, update="doremi", max_steps=7,
                                 reference_loss={"big": 9.0, "small": 0.0}, eval_interval=1, save_interval=100)
    with pytest.raises(UserError, match="domain small is used up and on_exhausted = error"):
        pretrain.main(moving)
    folder, = (tmp_path / "error").glob("step_*")
    used = json.loads((folder / "state.json").read_text())["cursors"]["small"]
    assert 5 <= used <= 10
    pretrain.main(dataclasses.replace(moving, on_exhausted="wrap", resume=True))


# ---- runs that go wrong


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused(tmp_path, data_dir, source, stage, value):
    shutil.copytree(source, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, tmp_path / "source" / "model.safetensors")
    main, make = STAGES[stage]
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        main(make(data_dir, tmp_path / "out", tmp_path / "source"))
    assert not list((tmp_path / "out").glob("step_*")) and not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_step_without_finite_gradient_changes_nothing_and_the_next_one_works():
    generator = torch.Generator().manual_seed(0)
    weights, masks = (torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(2))
    optimizer = make_optimizer([dict(name="weights", params=[weights], lr=0.1, weight_decay=0.1),
                                dict(name="log_alpha", params=[masks], lr=1.0, maximize=True)])

    def step(value: float):
        weights.grad, masks.grad = torch.ones(3, 4), torch.ones(3, 4)
        masks.grad[1, 1] = value
        found = clip_and_step(optimizer, 1.0, 1.0)
        return torch.stack([found["grad_norm/weights"], found["grad_norm/log_alpha"]]), found["skipped"]

    def everything():
        return [weights.detach().clone(), masks.detach().clone()] + [
            v.clone() for p in (weights, masks) for v in optimizer.state[p].values()]

    norms, skipped = step(1.0)
    assert not skipped and torch.allclose(norms, torch.full((2,), 12**0.5))
    before = everything()
    for bad in (float("nan"), float("inf"), -float("inf")):
        norms, skipped = step(bad)  # one group's gradient holds both back
        assert skipped == 1 and not norms[1].isfinite()
        assert all(torch.equal(a, b) for a, b in zip(everything(), before)) and weights.grad is None
    assert not step(1.0)[1]
    assert all(not torch.equal(a, b) for a, b in zip(everything(), before))


def test_each_group_is_clipped_by_its_own_norm():
    """Seen in Adam's first moment: after one step it is 0.1 of the clipped gradient."""
    a, b = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(9))
    optimizer = make_optimizer([dict(name="weights", params=[a], lr=0.1), dict(name="log_alpha", params=[b], lr=0.1)])
    a.grad, b.grad = torch.full((4,), 0.1), torch.full((9,), 1000.0)
    found = clip_and_step(optimizer, 1.0, 1.0)
    torch.testing.assert_close(torch.stack([found["grad_norm/weights"], found["grad_norm/log_alpha"]]),
                               torch.tensor([0.2, 3000.0]))
    torch.testing.assert_close(optimizer.state[a]["exp_avg"], torch.full((4,), 0.01))  # not shrunk by b's
    torch.testing.assert_close(optimizer.state[b]["exp_avg"], torch.full((9,), 0.1 / 3))


def spoil(monkeypatch, module, steps, accum: int = 4):
    """Make the loss of these steps NaN, in one of their micro-batches."""
    wrap, calls = module.wrap, []

    def spoiled(model, *args):
        inner = wrap(model, *args)

        def forward(*batch):
            calls.append(1)
            bad = (len(calls) - 1) // accum in steps and len(calls) % accum == 0
            return inner(*batch) * (float("nan") if bad else 1.0)
        return forward

    monkeypatch.setattr(module, "wrap", spoiled)


@pytest.mark.parametrize("stage", STAGES)
def test_skipped_steps_are_counted_and_leave_all_as_it_was(tmp_path, data_dir, source, stage, monkeypatch):
    main, make = STAGES[stage]
    spoil(monkeypatch, sys.modules[stage], steps={3, 4, 5})
    main(make(data_dir, tmp_path / "out", source, max_skipped=4, update="constant"))
    a, b = tmp_path / "out" / "step_0000003", tmp_path / "out" / "step_0000006"
    for name in ["model.safetensors", "optimizer.safetensors"] + ["masks.safetensors"] * (stage == "prune"):
        one, two = load_file(a / name), load_file(b / name)
        assert all(torch.equal(one[n], two[n]) for n in one), name
    assert [x["skipped"] for x in train_lines(tmp_path / "out")] == [0, 0, 0, 1, 2, 3]
    assert [x["loss"] is None for x in train_lines(tmp_path / "out")] == [False] * 3 + [True] * 3
    assert json.loads((b / "state.json").read_text())["skipped"] == 3


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path, data_dir, source, stage, monkeypatch, capsys):
    spoil(monkeypatch, sys.modules[stage], steps={1, 3, 4, 5})  # one alone does no harm
    settings = STAGES[stage][1](data_dir, tmp_path / "out", source, max_skipped=3, max_steps=9)
    line = refusal(stage, flags(settings), monkeypatch, capsys)
    assert line.startswith("the gradient was not finite in 3 steps in a row, up to step 6")
    a, b = (load_file(tmp_path / "out" / step / "model.safetensors") for step in ("step_0000003", "step_0000006"))
    assert all(torch.equal(a[name], b[name]) for name in a)  # skipped steps change nothing, so the last one is good too


def test_fresh_weights_from_a_shape(tmp_path, data_dir):
    shape = dataclasses.asdict(tiny_config())
    for name in "ab":
        pretrain.main(pretrain_settings(data_dir, tmp_path / name, "", shape=shape, max_steps=30, learning_rate=1e-2))
    same_files(tmp_path / "a" / "step_0000030", tmp_path / "b" / "step_0000030")
    losses = [x["loss"] for x in train_lines(tmp_path / "a")]
    assert losses[0] == pytest.approx(4.16, abs=0.05) and losses[-1] < losses[0] - 0.5  # ln 64, and it learns


def test_options_of_cost_give_the_same_losses(tmp_path, data_dir, source):
    prune.main(prune_settings(data_dir, tmp_path / "plain", source, max_steps=3))
    for kind in ("none", "full"):
        prune.main(prune_settings(data_dir, tmp_path / kind, source, max_steps=3, checkpointing=kind))
        assert without_speed(tmp_path / "plain") == without_speed(tmp_path / kind)


def test_the_source_model_is_evaluated_without_masks_first(tmp_path, source, data_dir, pruned):
    """Step 0 shows the source as it is, and both stages agree on it."""
    pretrain.main(pretrain_settings(data_dir, tmp_path / "out", source, max_steps=2))
    assert eval_lines(tmp_path / "out")[0] == eval_lines(pruned)[0]
