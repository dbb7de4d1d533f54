"""A run that learns from a teacher: what must be the same however it is cut or split, what it costs, what is refused."""

import dataclasses
import json
import shutil

import pytest
from conftest import (STAGES, flags, pretrain_settings, random_model, refusal, run_script, same_files, tiny_config,
                      train_lines, without_speed, write_model)

from model import Transformer
from run.cost import Parts, operations, per_device, run_seconds, step_cost, teacher_cost

SHAPE = tiny_config(hidden_size=40, n_layers=2, head_dim=10, intermediate_size=32)


def teacher_folder(folder, seed: int = 7, **changes) -> str:
    """Of another shape than the model that learns."""
    folder.mkdir()
    shape = dataclasses.replace(SHAPE, **changes)
    write_model(folder, dict(random_model(shape, seed=seed).named_parameters()), shape, [])
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return teacher_folder(tmp_path_factory.mktemp("models") / "teacher")


@pytest.mark.parametrize("stage", STAGES)
def test_a_taught_run_resumes_to_the_bit_and_keeps_its_teacher(tmp_path, data_dir, source, teacher, stage, monkeypatch,
                                                               capsys):
    main, make = STAGES[stage]
    whole = make(data_dir, tmp_path / "whole", source, teacher=teacher, kd_weight=0.4)
    main(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "step_0000006")
    resumed = dataclasses.replace(whole, out_dir=str(tmp_path / "resumed"), resume=True)
    other = teacher_folder(tmp_path / "other", seed=8)
    for changes in (dict(teacher=other), dict(teacher="", kd_weight=1.0), dict(kd_weight=0.5)):
        odd = "; ".join(f"{name} = {getattr(whole, name)!r}, not {value!r}" for name, value in changes.items())
        line = refusal(stage, flags(dataclasses.replace(resumed, **changes)), monkeypatch, capsys)
        assert f"was begun with {odd}; a resumed run must keep that" in line
    main(resumed)
    same_files(tmp_path / "whole" / "step_0000006", tmp_path / "resumed" / "step_0000006")
    assert without_speed(tmp_path / "whole") == without_speed(tmp_path / "resumed")
    for line in train_lines(tmp_path / "whole"):
        assert line["loss"] == pytest.approx(0.6 * line["loss/ce"] + 0.4 * line["loss/kl"], rel=1e-6)


@pytest.mark.parametrize("stage, parallel", [("prune", "fsdp"), ("pretrain", "ddp")])
def test_two_processes_learn_from_a_teacher_what_one_does(tmp_path, data_dir, source, teacher, stage, parallel):
    main, make = STAGES[stage]
    one, two = (make(data_dir, tmp_path / name, source, teacher=teacher, parallel=parallel) for name in ("one", "two"))
    main(one)
    done = run_script(f"{stage}.py", *flags(two), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(without_speed(tmp_path / "one"), without_speed(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys() and ("eval_loss" in a or "loss/kl" in a)
        for name in (n for n in a if "loss" in n):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), (a["step"], name)


def test_a_teacher_that_weighs_nothing_changes_nothing(tmp_path, data_dir, source, teacher):
    for name, changes in {"without": {}, "nothing": dict(teacher=teacher, kd_weight=0.0)}.items():
        pretrain_main, make = STAGES["pretrain"]
        pretrain_main(make(data_dir, tmp_path / name, source, **changes))
    same_files(tmp_path / "without" / "step_0000006", tmp_path / "nothing" / "step_0000006")
    assert without_speed(tmp_path / "without") == without_speed(tmp_path / "nothing")


def test_what_a_teacher_would_weigh_binds_no_run_without_one(tmp_path, data_dir, source):
    """The default was another once."""
    main, make = STAGES["pretrain"]
    main(make(data_dir, tmp_path / "out", source, max_steps=4, save_interval=2))
    shutil.rmtree(tmp_path / "out" / "step_0000004")
    begun = tmp_path / "out" / "config.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"kd_weight": 0.5}))
    main(make(data_dir, tmp_path / "out", source, max_steps=4, save_interval=2, resume=True))
    assert (tmp_path / "out" / "step_0000004").is_dir()


def test_a_run_teaches_with_its_newest_checkpoint(tmp_path, data_dir, source, teacher, pruned, monkeypatch, capsys):
    main, make = STAGES["pretrain"]
    shutil.copytree(source, tmp_path / "run" / "step_0000003")
    shutil.copytree(teacher, tmp_path / "run" / "step_0000006")
    for name, path in (("a", tmp_path / "run"), ("b", tmp_path / "run" / "step_0000006")):
        main(make(data_dir, tmp_path / name, source, teacher=str(path), max_steps=2))
    assert without_speed(tmp_path / "a") == without_speed(tmp_path / "b") and "loss/kl" in train_lines(tmp_path / "a")[0]
    line = refusal("pretrain", flags(make(data_dir, tmp_path / "out", source, teacher=str(pruned))), monkeypatch, capsys)
    assert line.startswith(f"teacher = {pruned}/step_0000006 holds masks") and "compact.py" in line


@pytest.mark.parametrize("stage", STAGES)
def test_what_cannot_teach_is_refused(tmp_path, data_dir, source, stage, monkeypatch, capsys):
    make = STAGES[stage][1]
    given = {"small": dict(vocab_size=60), "short": dict(context_length=16)}
    folders = {name: teacher_folder(tmp_path / name, **changes) for name, changes in given.items()}
    damaged = teacher_folder(tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text('{"format": 1, "files": {"x": {"bytes": 1, "sha256": "0"}}}')
    for folder, words in ((folders["small"], "has a vocabulary of 60 tokens, not the 64 of the model that is to learn"),
                          (folders["short"], "seq_len = 32 is longer than the context of teacher = "),
                          (damaged, f"{damaged} is damaged: "), ("nowhere", "model folder nowhere does not exist")):
        line = refusal(stage, flags(make(data_dir, tmp_path / "out", source, teacher=folder)), monkeypatch, capsys)
        assert words in line and not list((tmp_path / "out").glob("step_*"))
    with pytest.raises(ValueError, match=r"kd_weight = 1\.5 must be between 0 and 1"):
        make(data_dir, tmp_path / "out", source, kd_weight=1.5)
    with pytest.raises(ValueError, match=r"kd_weight = 0\.5 without a teacher; give one, or leave kd_weight out"):
        make(data_dir, tmp_path / "out", source, kd_weight=0.5)


# ---- what it costs


def test_the_plan_counts_the_teacher(source):
    shape, seq_len = tiny_config(), 64
    parts = Parts(Transformer, teacher=SHAPE)
    cfg = pretrain_settings("data", "out", source, seq_len=seq_len, dtype="bfloat16", parallel="fsdp")
    alone, taught = (per_device(shape, {}, cfg, each, 1, checkpointing="none") for each in (Parts(Transformer), parts))
    tokens = cfg.micro_batch_size * seq_len
    assert (taught[1].micro_step.flops - alone[1].micro_step.flops == pytest.approx(
        SHAPE.train_flops_per_token(seq_len) / 3 * tokens))
    assert taught[1].micro_step.flops == pytest.approx(operations(shape, {}, cfg, parts) * tokens)
    assert taught[0]["teacher"] == 2 * SHAPE.n_params() and taught[1].evaluation == alone[1].evaluation
    assert taught[0]["peak"] >= alone[0]["peak"] + taught[0]["teacher"]
    rest = SHAPE.vocab_size * SHAPE.hidden_size * 2
    sharded = per_device(shape, {}, cfg, parts, 4, checkpointing="none")
    assert sharded[0]["teacher"] == pytest.approx(2 * (SHAPE.n_params() / 4 + 2 * (SHAPE.n_params() - rest) / 2 + rest))
    a, b = (run_seconds(shape, cfg, sharded[1], 4, "H100", domains=1, checkpoint_bytes=1, parts=each)
            for each in (Parts(Transformer), parts))
    assert b["messages"] > a["messages"] and b["products"] == a["products"]


def test_a_deep_teacher_is_counted_from_two_layers_and_three(source, monkeypatch):
    cfg, deep = pretrain_settings("data", "out", source), dataclasses.replace(SHAPE, n_layers=7)
    found = []
    for whole in (3, 100):
        monkeypatch.setattr("run.cost.COUNTED_WHOLE", whole)
        found.append(teacher_cost(deep, cfg, Parts(Transformer, teacher=deep), True))
    (work, most), (want, want_most) = found
    assert work.flops == pytest.approx(want.flops) and work.traffic == pytest.approx(want.traffic)
    assert most == pytest.approx(want_most, rel=0.01)


def test_a_plan_and_the_first_lines_of_a_run_tell_of_the_teacher(tmp_path, data_dir, source, teacher, capsys):
    main, make = STAGES["pretrain"]
    main(make(data_dir, tmp_path / "out", source, teacher=teacher, plan=1))
    out = capsys.readouterr().out
    assert f"; teacher {SHAPE.n_params():,}" in out and "\n  teacher  " in out
    main(make(data_dir, tmp_path / "out", source, teacher=teacher, max_steps=1, warmup_steps=1))
    flops = (tiny_config().train_flops_per_token(32) + SHAPE.train_flops_per_token(32) / 3) * 8 * 32
    assert f"256 tokens, {flops:.2g} operations" in capsys.readouterr().out


def test_the_loss_keeps_no_logits_of_the_teacher(source):
    """Three tensors of a chunk are a third as long, so the peak of a step is that of a step without it, or less."""
    cfg, shape = pretrain_settings("data", "out", source, seq_len=2048), tiny_config(vocab_size=32000, n_layers=1)
    taught = dataclasses.replace(SHAPE, vocab_size=32000)
    alone, beside = (step_cost(shape, {}, cfg, parts, half=True, checkpointing="full", gradients_stay=False)
                     for parts in (Parts(Transformer), Parts(Transformer, teacher=taught)))
    assert beside.peak < 1.1 * alone.peak
