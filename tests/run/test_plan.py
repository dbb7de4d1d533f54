"""What a run is said to take, against what it takes; and what is refused before the first step."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from functools import partial

import pytest
import torch
from conftest import ROOT, TARGET, flags, pretrain_settings, prune_settings, run_script, tiny_config

import pretrain
import prune
from l0 import L0, mask_sets
from model import Transformer
from run import cost, plan
from run.cost import FITS, MACHINES, Counter, Parts, Work, is_compiled, operations, per_device, run_seconds, step_cost
from run.plan import checkpoint_bytes, checkpoints
from run.processes import make_optimizer
from run.settings import UserError
from tools.bench import BenchSettings
from tools.gpu_check import SIZES, planned_bytes

# Two steps of a model of 25 M parameters; prints the peak of its resident memory over what it had before, and the plan's.
MEASURE = """
import dataclasses, sys
import torch
from l0 import L0, mask_sets
from model import ModelConfig, Transformer, init_weights
from pretrain import PretrainSettings
from run.cost import Parts, per_device
from run.processes import clip_and_step, make_optimizer

masked, accum, T = (int(x) for x in sys.argv[2:])
checkpointing = sys.argv[1]
shape = ModelConfig(vocab_size=16000, hidden_size=384, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=64,
                    intermediate_size=1024)
target = dataclasses.replace(shape, hidden_size=192, n_layers=4, n_heads=3, n_kv_heads=3, intermediate_size=500)
sets = mask_sets(shape, target) if masked else {}
cfg = PretrainSettings(data_dir="-", out_dir="-", init_from="-", update="constant", device="cpu", seq_len=T,
                       micro_batch_size=4, global_batch_size=4 * accum)

def status(name):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

torch.mm(torch.ones(300, 300), torch.ones(300, 300))  # what the libraries take
before = status("VmRSS")
model, masks = Transformer(shape, checkpointing=checkpointing), L0(sets)
init_weights(model, 0)
optimizer = make_optimizer([dict(name="weights", params=list(model.parameters()), lr=1e-4),
                            *masks.parameter_groups(mask_lr=1.0, multiplier_lr=1.0)])
tokens = torch.randint(16000, (4, T))
for step in range(2):
    for micro_step in range(accum):
        model(tokens, tokens, masks.sample(0, step, micro_step)).backward()
    if sets:
        masks.lagrangian(step, warmup=1).backward()
    clip_and_step(optimizer, 1.0, 1.0)
measured = status("VmHWM") - before
print(measured, per_device(shape, sets, cfg, Parts(Transformer, L0), 1, checkpointing=checkpointing)[0]["peak"])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("checkpointing, masked, accum, T", [
    ("none", 0, 2, 256), ("selective", 1, 1, 512), ("full", 1, 1, 1024)])
def test_the_planned_peak_is_the_measured_one(checkpointing, masked, accum, T):
    # malloc gives every larger block back at once: the plan counts what lives, not what an allocator keeps for later
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", MEASURE, checkpointing, *map(str, (masked, accum, T))], cwd=ROOT,
                          env=environment, capture_output=True, text=True, check=True)
    measured, planned = map(float, done.stdout.split())
    print(f"measured {measured / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB: {measured / planned:.3f}")
    assert planned == pytest.approx(measured, rel=0.15)


LLAMA_7B = dict(vocab_size=32000, hidden_size=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128,
                intermediate_size=11008)


def test_the_plan_of_the_7b_run_needs_its_config_alone(tmp_path):
    (tmp_path / "model_config.json").write_text(tiny_config(**LLAMA_7B, context_length=4096).to_json())
    done = run_script("prune.py", "configs/7b_to_1.3b.py", f"--init_from={tmp_path}", "--plan=8", "--data_dir=nowhere",
                      "--compile=off")
    assert done.returncode == 0, done.stderr
    assert re.search(r"parameters +6,738,415,616; masks hidden \(4096,\)", done.stdout)
    assert re.search(r"tokens a step +131,072 = 8 devices x 2 micro-steps x 2 sequences x 4096", done.stdout)
    assert " of 32 sequences: warmup_steps = 320, lagrangian_warmup_steps = 640, micro_batch_size = 2\n" in done.stdout
    assert re.search(r"forward only 118,988,800 in 65 evaluations of 7 domains", done.stdout)
    rows = {found[1]: found[2].split() for line in done.stdout.splitlines()
            if (found := re.fullmatch(r"  (\w+(?: \w+)?) +([\d.]+(?: +[\d.]+){2,3})", line))}
    rows = {name: [float(x) for x in cells] for name, cells in rows.items()}
    assert rows["weights"] == rows["gradients"] == [3.37] * 3 and rows["optimizer"] == [6.74] * 3  # 4, 4, 8 bytes / 8
    assert rows["peak"][0] > FITS * 80 > rows["peak"][1] > 40 > rows["peak"][2]  # 80 GB need checkpointing
    for i in range(len(MACHINES)):  # what is named is all there is; messages hide behind products here
        parts = [rows[name][i] for name in ("products", "all else", "update", "evaluations", "checkpoints")]
        assert sum(parts) == pytest.approx(rows["in all"][i], abs=0.05) and rows["messages"][i] > 0
    assert rows["products"][0] == pytest.approx(4.29e10 * 419_430_400 / (8 * 0.6 * 312e12) / 3600, abs=0.01)
    fits = next(line for line in done.stdout.splitlines() if "fastest that fits" in line)
    assert re.search(r"1, none +1, none +2, none +4, none", fits)
    assert re.search(r"disk +242\.6 GB: checkpoints of 80\.9 GB, at most 3 at once", done.stdout)


@pytest.mark.parametrize(("size", "masked", "sequences", "measured"), [  # GB, docs/gpu.md
    ("1.3B", False, 4, 45.6), ("1.3B", True, 4, 45.7), ("370M", False, 8, 32.3), ("370M", True, 8, 32.4),
    ("1.3B", False, 8, 72.2)])
def test_a_compiled_step_is_planned_as_it_was_measured_on_a_gpu(size, masked, sequences, measured):
    cfg = BenchSettings(steps="masked" if masked else "dense", device="cuda", seq_len=4096, memory=False,
                        **SIZES[size] | {"micro_batch_size": sequences})
    assert is_compiled(cfg.train_settings(masked))
    assert planned_bytes(cfg) / 1e9 == pytest.approx(measured, rel=0.04)


def test_sharding_divides_what_is_sharded(data_dir, source):
    cfg = pretrain_settings(data_dir, "out", source, parallel="fsdp", seq_len=16)
    shape = tiny_config(hidden_size=256, intermediate_size=1024)
    one, two, four = (per_device(shape, {}, cfg, Parts(Transformer), n, checkpointing="none")[0] for n in (1, 2, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert one[name] == pytest.approx(2 * two[name], rel=1e-3) == pytest.approx(4 * four[name], rel=1e-3)
    assert one["gathered"] == 0 < two["gathered"] == four["gathered"] and two["activations"] == four["activations"]
    assert one["peak"] > two["peak"] > four["peak"]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("T, stay", [(16, False), (256, True)])
def test_two_layers_and_three_tell_of_all(source, checkpointing, T, stay, monkeypatch):
    """By turns activations and gradients are most of the memory."""
    shape = tiny_config(hidden_size=128, intermediate_size=512, n_heads=4, n_kv_heads=2, head_dim=32, n_layers=6,
                        vocab_size=300)
    sets = mask_sets(shape, dataclasses.replace(shape, hidden_size=64, n_layers=4, intermediate_size=100))
    cfg = prune_settings("data", "out", source, seq_len=T)
    found = []
    for known in (1000, 3):  # up to so many layers all are counted
        monkeypatch.setattr(cost, "COUNTED_WHOLE", known)
        found.append(dataclasses.asdict(step_cost(shape, sets, cfg, Parts(Transformer, L0), half=True, gradients_stay=stay,
                                                  checkpointing=checkpointing)))
    for name, value in found[0].items():
        for a, b in zip(*([f[name].values() if isinstance(value, dict) else [f[name]] for f in found])):
            assert b == pytest.approx(a, rel=0.005), (name, found)


@pytest.mark.parametrize("relaxation", ["sample", "topk"])
def test_a_plan_of_masks_alone_has_no_gradients_or_moments_of_weights(source, relaxation):
    """What is left of a step's products: all forward, gradients of inputs, and of the three weights that masks scale."""
    shape, T = tiny_config(), 64
    sets = mask_sets(shape, dataclasses.replace(shape, hidden_size=16, intermediate_size=20))
    changes = dict(relaxation=relaxation, init_scores="x" if relaxation == "topk" else "", seq_len=T, device="cuda")
    found = []
    for cfg in (prune_settings("data", "out", source, freeze_weights=f, **changes) for f in (False, True)):
        parts = Parts(Transformer, partial(prune.make_masks, cfg), frozen=cfg.freeze_weights)
        one, step = per_device(shape, sets, cfg, parts, 1, checkpointing="none")
        two, _ = per_device(shape, sets, dataclasses.replace(cfg, parallel="fsdp"), parts, 2, checkpointing="none")
        seconds = run_seconds(shape, cfg, step, 2, "H100", domains=1, checkpoint_bytes=1, parts=parts)
        found.append((one, two, step, seconds, operations(shape, sets, cfg, parts)))
    (one, two, step, seconds, _), (one_alone, two_alone, step_alone, seconds_alone, flops) = found
    masks, n = 4 * sum(p.numel() for p in parts.masks(sets).parameters()), 4 * shape.n_params()
    for each in (one_alone, two_alone):
        assert each["gradients"] == 0 and each["optimizer"] <= 5 * masks  # masks, gradients, moments, steps
    assert one["gradients"] == n <= one["optimizer"] / 2 and one_alone["weights"] == one["weights"] == n
    assert one["peak"] - one_alone["peak"] >= 2.5 * n and two_alone["peak"] < two["peak"]
    d, q, f, L = shape.hidden_size, shape.n_heads * shape.head_dim, shape.intermediate_size, shape.n_layers
    matrices = L * (2 * (shape.n_heads + shape.n_kv_heads) * shape.head_dim * d + 3 * d * f) + shape.vocab_size * d
    saved = 2 * (matrices - L * (q * d + 2 * f * d))
    assert flops == pytest.approx(shape.train_flops_per_token(T) - saved)
    taught = operations(shape, sets, cfg, dataclasses.replace(parts, teacher=shape))
    assert taught - flops == pytest.approx(shape.train_flops_per_token(T) / 3)
    assert step_alone.update.traffic < 0.1 * step.update.traffic and step_alone.evaluation == step.evaluation
    assert seconds_alone["messages"] == 0 < seconds["messages"]
    assert checkpoint_bytes(shape, sets, frozen=True) < checkpoint_bytes(shape, sets) / 2


def test_what_operations_move_is_counted(monkeypatch):
    """By hand: a product between element-wise operations, views, writes in place, and the optimizer's 7 numbers a weight."""
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    with Counter() as counter:
        counter.enter("x")
        c = (a * 2 + 1).T.contiguous().T @ b  # 512 bytes: read, written; read, written; transposed and back: read, written
        c.mul_(3.0).add_(1.0)  # 128 bytes, twice read and written
    assert counter.work["x"] == Work(2 * 8 * 16 * 4, 6 * 512 + 4 * 128, 2 * 512 + 128)
    optimizer = make_optimizer([dict(params=[p := torch.nn.Parameter(torch.ones(1000, 1000))], lr=1.0)])
    p.grad = torch.ones(1000, 1000)
    optimizer.step()
    with Counter() as counter:
        counter.enter("y")
        optimizer.step()
    assert counter.work["y"].traffic == pytest.approx(4 * 7e6, rel=0.2) and counter.work["y"].flops == 0


def test_products_are_those_of_the_formula(source):
    shape, cfg = tiny_config(), prune_settings("data", "out", source, seq_len=64)
    each = {kind: step_cost(shape, {}, cfg, Parts(Transformer), half=True, checkpointing=kind, gradients_stay=False)
            for kind in ("none", "selective", "full")}
    formula = shape.train_flops_per_token(64) * 64 * 2
    head, down = 6 * 64 * 32 * 64 * 2, 2 * 4 * 48 * 32 * 64 * 2  # of four layers, whose last output nothing needs again
    assert each["none"].micro_step.flops == each["selective"].micro_step.flops == pytest.approx(formula)
    assert each["full"].micro_step.flops == pytest.approx(formula + (formula - head) / 3 - down)
    assert each["none"].evaluation.flops == pytest.approx(formula / 3)
    assert each["none"].micro_step.fused < each["none"].micro_step.traffic < each["selective"].micro_step.traffic


def test_more_work_takes_longer(source):
    """Seconds of each part follow what it depends on, and nothing else."""
    shape, parts = tiny_config(n_layers=4, hidden_size=64), Parts(Transformer)
    cfg = pretrain_settings("data", "out", source, parallel="fsdp", device="cuda", max_steps=1000, eval_interval=100,
                            save_interval=500, global_batch_size=32)
    _, step = per_device(shape, {}, cfg, parts, 8, checkpointing="none")

    def seconds(devices=8, **changes):
        return run_seconds(shape, dataclasses.replace(cfg, **changes), step, devices, "A100", domains=3,
                           checkpoint_bytes=10**9, parts=parts)

    base = seconds()
    assert base["checkpoints"] == 2 and base["in all"] <= sum(base.values()) - base["in all"]
    twice = seconds(max_steps=2000)
    assert all(twice[name] == pytest.approx(2 * base[name])
               for name in ("products", "all else", "messages", "update", "checkpoints"))
    eager = seconds(compile="off")
    assert base == seconds(compile="on") and base["all else"] < eager["all else"] and base["products"] == eager["products"]
    assert seconds(devices=16)["messages"] > 5 * base["messages"]  # between nodes
    assert seconds(eval_sequences=50)["evaluations"] == pytest.approx(base["evaluations"] * 10, rel=0.2)
    few = seconds(eval_between=1)
    assert few["evaluations"] < base["evaluations"] and few["products"] == base["products"]


def test_a_plan_writes_nothing_and_refuses_what_does_not_divide(tmp_path, source, capsys):
    cfg = prune_settings("nowhere", tmp_path / "out", source, plan=2)
    prune.main(cfg)
    assert "masks hidden (32,); masks layer (4,)" in capsys.readouterr().out and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="global_batch_size = 8 does not divide by micro_batch_size x plan = 2 x 3"):
        prune.main(dataclasses.replace(cfg, plan=3))


@pytest.mark.parametrize("changes, first, there, most", [
    (dict(max_steps=10, save_interval=3), 0, [], 4), (dict(max_steps=10, save_interval=3, keep_last=2), 0, [], 3),
    (dict(max_steps=10, save_interval=5), 10, [5, 10], 2), (dict(max_steps=7, save_interval=100, keep_last=3), 0, [], 1),
    (dict(max_steps=9, save_interval=2, keep_last=1, keep_every=4), 0, [], 3),  # 4, 8 and 9, after 4, 6 and 8
    (dict(max_steps=40, save_interval=3, keep_last=1), 6, [6], 2), (dict(max_steps=9, save_interval=3), 3, [3], 3)])
def test_checkpoints_are_counted_as_they_come_and_go(source, changes, first, there, most):
    assert checkpoints(pretrain_settings("data", "out", source, **changes), first, there) == most


def test_the_size_of_a_checkpoint(pruned):
    target = dataclasses.replace(tiny_config(), **{k.removeprefix("target_"): v for k, v in TARGET.items()})
    planned = checkpoint_bytes(tiny_config(), mask_sets(tiny_config(), target))
    real = sum((pruned / "step_0000006" / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer", "masks"))
    headers = 160 * 4 * len(list(Transformer(tiny_config()).parameters()))  # JSON, some 150 bytes a tensor
    assert planned <= real <= planned + headers


# ---- before the first step


def test_a_disk_without_room_is_told_first(tmp_path, data_dir, source, monkeypatch, capsys):
    cfg = pretrain_settings(data_dir, tmp_path / "out", source, save_interval=1)
    one = checkpoint_bytes(tiny_config(), {})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage(0, 0, one - 1))
    with pytest.raises(UserError, match=r"has 0\.4 MB free, and a checkpoint takes 0\.4 MB; make room"):
        pretrain.main(cfg)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage(0, 0, 3 * one))
    pretrain.main(cfg)
    assert "warning: 6 more checkpoints of 0.4 MB will not fit into the 1.3 MB free" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    pretrain.main(dataclasses.replace(cfg, keep_last=2))
    assert "will not fit" not in capsys.readouterr().out


def test_a_run_that_had_room_may_go_on(tmp_path, data_dir, source, monkeypatch):
    """Of room for 2.5 checkpoints one takes 1: the next needs 1 more, since the old one goes then."""
    cfg = pretrain_settings(data_dir, tmp_path / "out", source, keep_last=1)
    one, usage = checkpoint_bytes(tiny_config(), {}), namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage",
                        lambda path: usage(0, 0, (2.5 - len(list((tmp_path / "out").glob("step*")))) * one))
    pretrain.main(cfg)
    pretrain.main(dataclasses.replace(cfg, max_steps=12, resume=True))


def test_one_line_says_what_the_run_comes_to(tmp_path, data_dir, source, capsys):
    pretrain.main(pretrain_settings(data_dir, tmp_path / "out", source, save_interval=2))
    operations = tiny_config().train_flops_per_token(32) * 6 * 8 * 32
    assert re.search(r"^steps 0 to 6 of 256 tokens on 1 x cpu \(alone, float32\): 1,536 tokens, "
                     rf"{operations:.2g} operations, 3 more checkpoints of 0\.4 MB, [\d,.]+ GB free$".replace("+0", r"\+0"),
                     capsys.readouterr().out, re.M)


def test_what_follows_from_other_settings_and_what_is_left_out_is_said(tmp_path, data_dir, source, capsys):
    none = dict.fromkeys(("warmup_steps", "lagrangian_warmup_steps", "micro_batch_size"))
    prune.main(prune_settings(data_dir, tmp_path / "out", source, max_steps=5, **none,
                              domain_weights={"code": 0.5, "wiki": 0.5}))
    said = capsys.readouterr().out
    assert "of 5 steps of 8 sequences: warmup_steps = 0, lagrangian_warmup_steps = 1, micro_batch_size = 4\n" in said
    assert f"note: domain_weights leaves out what {data_dir} has too: play\n" in said


def test_a_run_that_prunes_nothing_is_refused(tmp_path, data_dir, source):
    with pytest.raises(UserError, match=r"nothing to prune: .*--pruning_modules='\(\)'"):
        prune.main(prune_settings(data_dir, tmp_path / "out", source, **dict.fromkeys(TARGET)))


def test_the_end_says_how_far_each_sparsity_is(tmp_path, data_dir, source, capsys):
    prune.main(prune_settings(data_dir, tmp_path / "out", source, max_steps=2))
    assert re.search(r"^hidden: expected sparsity 0\.0\d+, the target's 0\.3750; 0 near-dead", capsys.readouterr().out, re.M)


def test_plan_is_a_flag_of_both_stages(source):
    done = run_script("pretrain.py", *flags(pretrain_settings("nowhere", "nowhere", source, plan=1)))
    assert done.returncode == 0 and "GB on each device" in done.stdout, done.stderr
