"""Runs that are killed, stopped, starved of disk, damaged or left by a rank: what is on the disk stays good, and the run
that goes on is the run that was never stopped, bit for bit.  Each fault here is the real one."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (ROOT, STAGES, STEERED, at_draw, flags, flip, pretrain_settings, prune_settings, same_files, text_like,
                      train_lines, without_speed, write_tokens)
from safetensors.torch import load_file

import pretrain
import prune
from run.settings import Interrupted, UserError
from run.weights import all_checkpoints, damage, step_of

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(stage: str, settings, *torchrun: str) -> subprocess.Popen:
    """The stage in a process of its own, or under torchrun with these options."""
    launcher = ["-m", "torch.distributed.run", "--standalone", *torchrun] if torchrun else []
    return subprocess.Popen([sys.executable, *launcher, f"{stage}.py", *flags(settings)], cwd=ROOT, env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_lines(out_dir: Path, n: int, process: subprocess.Popen) -> None:
    """Until metrics.jsonl has n lines."""
    path = out_dir / "metrics.jsonl"
    for _ in range(6000):
        if path.exists() and path.read_text().count("\n") >= n:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{path} never had {n} lines")


def assert_same_run(a: Path, b: Path) -> None:
    assert without_speed(a) == without_speed(b)
    same_files(all_checkpoints(a)[-1], all_checkpoints(b)[-1])


# ---- stopped and resumed


@pytest.mark.parametrize("stage", STAGES)
def test_resume_after_any_step_is_bit_identical(tmp_path, data_dir, source, stage, monkeypatch):
    """Stopped by SIGTERM in each step in turn, between the lines of metrics.jsonl and between checkpoints too."""
    main, make = STAGES[stage]
    changes = dict(max_steps=7, eval_interval=4, save_interval=100, log_interval=3, **STEERED)
    main(make(data_dir, tmp_path / "whole", source, **changes))
    cfg = make(data_dir, tmp_path / "parts", source, **changes)
    for step in range(1, 7):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"SIGTERM after step {step}"):
            at_draw(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
            main(cfg)
        cfg = dataclasses.replace(cfg, resume=True)
    main(cfg)
    assert [p.name for p in all_checkpoints(tmp_path / "parts")] == [f"step_{step:07d}" for step in range(1, 8)]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("stage, number", [("prune", signal.SIGTERM), ("pretrain", signal.SIGUSR1),
                                           ("prune", signal.SIGINT)])
def test_a_signal_saves_and_asks_to_be_queued_again(tmp_path, data_dir, source, stage, number):
    main, make = STAGES[stage]
    changes = dict(max_steps=100, eval_interval=50, save_interval=1000, log_interval=7)
    cfg = make(data_dir, tmp_path / "parts", source, **changes)
    process = start(stage, cfg)
    wait_for_lines(tmp_path / "parts", 3, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    folder, = all_checkpoints(tmp_path / "parts")
    step = step_of(folder)
    assert process.returncode == 75 and 14 <= step < 100
    said = "\nCtrl-C: the run ends this step and saves; once more stops it at once\n" if number == signal.SIGINT else ""
    assert err == said + f"{stage}.py: stopped by {number.name} after step {step}; go on with --resume\n"
    main(dataclasses.replace(cfg, resume=True))
    main(make(data_dir, tmp_path / "whole", source, **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_ctrl_c_twice_stops_at_once_and_resume_says_that_it_begins(tmp_path, data_dir, source, monkeypatch, capfd):
    cfg = prune_settings(data_dir, tmp_path / "out", source, save_interval=100)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # as one: a terminal and a launcher may both send it
        time.sleep(0.6)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="at once, nothing saved; --resume"):
        at_draw(patch, 3, twice)
        prune.main(cfg)
    assert not all_checkpoints(tmp_path / "out")
    assert capfd.readouterr().err.count("once more stops it at once") == 1
    prune.main(dataclasses.replace(cfg, resume=True))
    assert f"no checkpoint in {tmp_path / 'out'} yet: the run begins" in capfd.readouterr().out
    prune.main(dataclasses.replace(cfg, resume=True, max_steps=8))
    assert "going on from " in capfd.readouterr().out


def test_a_signal_under_torchrun_stops_all_ranks_at_one_step(tmp_path, data_dir, source):
    cfg = prune_settings(data_dir, tmp_path / "out", source, max_steps=300, eval_interval=100, save_interval=1000)
    process = start("prune", cfg, "--nproc_per_node=2", "--signals-to-handle=SIGTERM,SIGUSR1", "--shutdown-timeout=60")
    wait_for_lines(tmp_path / "out", 4, process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    folder, = all_checkpoints(tmp_path / "out")
    step = step_of(folder)
    assert damage(folder) == "" and 3 <= step < 300
    said = [line for line in err.splitlines() if line.startswith("prune.py: ")]
    assert said == [f"prune.py: stopped by SIGUSR1 after step {step}; go on with --resume"]
    assert process.returncode != 0 and "Traceback" not in err.split("torch/distributed")[0]
    end = dict(max_steps=step + 5, resume=True)
    prune.main(dataclasses.replace(cfg, **end))  # one process goes on
    assert [x["step"] for x in train_lines(tmp_path / "out")] == list(range(1, step + 6))


@pytest.mark.slow
def test_kills(tmp_path, data_dir, source):
    """SIGKILL, half of them the moment that a checkpoint is being written, the others anywhere and after a new checkpoint.

    Eight times, to be quick; KILLS=20 in the environment for more.
    """
    kills = int(os.environ.get("KILLS", 8))
    changes = dict(max_steps=40 * kills, eval_interval=20, save_interval=3, keep_last=3, log_interval=2, **STEERED)
    cfg = prune_settings(data_dir, tmp_path / "parts", source, resume=True, **changes)
    rng, during_save, steps = random.Random(0), 0, set()
    for kill in range(kills):
        for left in (tmp_path / "parts").glob("*.tmp"):
            left.rename(left.with_suffix(f".left{kill}"))
        before, process = all_checkpoints(tmp_path / "parts")[-1:], start("prune", cfg)
        if kill % 4 == 0:  # however long a start takes here, some get on
            while all_checkpoints(tmp_path / "parts")[-1:] == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
        elif kill % 2:
            while not list((tmp_path / "parts").glob("*.tmp")) and process.poll() is None:
                time.sleep(0.0001)  # a busy wait would take the run's own time
            time.sleep(rng.choice((0, 0, 0, 0.001)))
        else:
            time.sleep(rng.uniform(1, 8))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over too early"
        during_save += bool(list((tmp_path / "parts").glob("*.tmp")))
        folders = all_checkpoints(tmp_path / "parts")
        assert all(damage(p) == "" for p in folders)
        steps.add(folders[-1].name if folders else "")
    assert during_save >= 1 and len(steps) > kills // 4, (during_save, steps)
    prune.main(cfg)
    prune.main(prune_settings(data_dir, tmp_path / "whole", source, **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*.tmp")) and len(all_checkpoints(tmp_path / "parts")) == 3
    print(f"{during_save} of {kills} kills during a save; checkpoints left: {sorted(steps)}")


# ---- the disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, data_dir, source, stage, small_disk, monkeypatch):
    main, make = STAGES[stage]
    cfg = make(data_dir, small_disk / "out", source)

    def fill():
        with pytest.raises(OSError, match="No space left"), (small_disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1000))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        at_draw(patch, 4, fill)
        main(cfg)
    folder, = all_checkpoints(small_disk / "out")
    assert folder.name == "step_0000003" and damage(folder) == "" and not list((small_disk / "out").glob("*.tmp"))
    with pytest.raises(UserError, match=r" 0\.0 MB free, and a checkpoint takes 0\.4 MB"):  # told before the first step
        main(dataclasses.replace(cfg, resume=True))
    (small_disk / "filler").unlink()
    main(dataclasses.replace(cfg, resume=True))
    main(make(data_dir, tmp_path / "whole", source))
    assert_same_run(tmp_path / "whole", small_disk / "out")


DAMAGES = {"flipped": flip, "cut": lambda p: p.write_bytes(p.read_bytes()[:-9]), "gone": Path.unlink,
           "empty": lambda p: p.write_bytes(b"")}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "masks.safetensors", "target_config.json",
                                  "state.json", "manifest.json", "assets/tokenizer.json"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, data_dir, source, pruned, file, kind, capsys):
    shutil.copytree(pruned, tmp_path / "out")
    DAMAGES[kind](tmp_path / "out" / "step_0000006" / file)
    prune.main(prune_settings(data_dir, tmp_path / "out", source, resume=True))
    err = capsys.readouterr().err
    assert err.startswith(f"WARNING: {tmp_path / 'out' / 'step_0000006'} is damaged (") and file.split("/")[-1] in err
    assert_same_run(pruned, tmp_path / "out")
    assert (tmp_path / "out" / "step_0000006.damaged").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path, data_dir, source, pruned):
    shutil.copytree(pruned, tmp_path / "out")
    for folder in all_checkpoints(tmp_path / "out"):
        flip(folder / "optimizer.safetensors")
    cfg = prune_settings(data_dir, tmp_path / "out", source, resume=True)
    for _ in range(2):  # nor when a scheduler tries again
        with pytest.raises(UserError, match=r"no checkpoint in .* is whole: step_0000006: optimizer\.safetensors differs"):
            prune.main(cfg)
    for folder in all_checkpoints(tmp_path / "out"):
        folder.rename(folder.with_suffix(".damaged"))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        prune.main(cfg)
    assert without_speed(tmp_path / "out") == without_speed(pruned)


@pytest.mark.parametrize("change, said", [
    (dict(seed=5), "begun with seed = 1234, not 5"), (dict(global_batch_size=16), "global_batch_size = 8, not 16"),
    (dict(target_hidden_size=16), "target_hidden_size = 20, not 16"),
    (dict(data_dir="other"), "other training tokens of play")])
def test_what_a_resumed_run_must_keep(tmp_path, data_dir, source, pruned, change, said):
    shutil.copytree(pruned, tmp_path / "out")
    if "data_dir" in change:
        change = dict(data_dir=str(shutil.copytree(data_dir, tmp_path / "other")))
        write_tokens(tmp_path / "other", "play", "train", text_like(20_000, seed=99))
    cfg = prune_settings(data_dir, tmp_path / "out", source, resume=True, max_steps=9)
    with pytest.raises(UserError, match=said):
        prune.main(dataclasses.replace(cfg, **change))
    prune.main(dataclasses.replace(cfg, learning_rate=1e-4, micro_batch_size=4, eval_interval=2))  # these it need not


def test_two_runs_do_not_share_a_folder(tmp_path, data_dir, source):
    cfg = pretrain_settings(data_dir, tmp_path / "out", source, max_steps=1000, save_interval=5)
    process = start("pretrain", cfg)
    wait_for_lines(tmp_path / "out", 3, process)
    with pytest.raises(UserError, match="another process trains in"):
        pretrain.main(dataclasses.replace(cfg, resume=True))
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    lines = train_lines(tmp_path / "out")
    assert [x["step"] for x in lines] == list(range(1, len(lines) + 1))


def test_a_checkpoint_may_be_a_link_to_another_disk(tmp_path, data_dir, source):
    cfg = pretrain_settings(data_dir, tmp_path / "out", source, keep_last=2)
    pretrain.main(cfg)
    shutil.move(tmp_path / "out" / "step_0000003", tmp_path / "elsewhere")
    (tmp_path / "out" / "step_0000003").symlink_to(tmp_path / "elsewhere")
    pretrain.main(dataclasses.replace(cfg, resume=True, max_steps=9))
    assert [p.name for p in all_checkpoints(tmp_path / "out")] == ["step_0000006", "step_0000009"]
    assert damage(tmp_path / "elsewhere") == ""  # what lies elsewhere is not ours to delete


def test_a_flipped_bit_in_the_tokens_is_found(tmp_path, data_dir, source):
    shutil.copytree(data_dir, tmp_path / "data")
    flip(tmp_path / "data" / "play" / "train.bin")
    cfg = pretrain_settings(tmp_path / "data", tmp_path / "out", source)
    with pytest.raises(UserError, match=r"play/train\.bin differs from the checksum in its index"):
        pretrain.main(cfg)
    pretrain.main(dataclasses.replace(cfg, verify_data=False))


def test_old_checkpoints_go(tmp_path, data_dir, source):
    cfg = pretrain_settings(data_dir, tmp_path / "out", source, max_steps=11, save_interval=2, keep_last=2, keep_every=4)
    pretrain.main(cfg)
    assert [step_of(p) for p in all_checkpoints(tmp_path / "out")] == [4, 8, 10, 11]
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith("step")) == [
        ".lock", "config.json", "metrics.jsonl"]


# ---- a rank that leaves


def ranks(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun started, by rank."""
    found = []
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found += [(int(v[5:]), int(pid)) for v in environment if v.startswith(b"RANK=")]
    return [pid for _, pid in sorted(found)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_again_after_a_rank_was_killed(tmp_path, data_dir, source, rank):
    changes = dict(max_steps=60, eval_interval=20, save_interval=5)
    cfg = pretrain_settings(data_dir, tmp_path / "parts", source, resume=True, **changes)
    process = start("pretrain", cfg, "--nproc_per_node=2", "--max-restarts=1")
    wait_for_lines(tmp_path / "parts", 12, process)
    os.kill(ranks(process)[rank], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    pretrain.main(pretrain_settings(data_dir, tmp_path / "whole", source, **changes))
    whole, parts = (train_lines(tmp_path / name) for name in ("whole", "parts"))
    assert [x["step"] for x in parts] == list(range(1, 61))
    assert [x["loss"] for x in parts] == pytest.approx([x["loss"] for x in whole], rel=1e-5)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_within_the_timeout(tmp_path, data_dir, source):
    cfg = pretrain_settings(data_dir, tmp_path / "out", source, max_steps=500, save_interval=5, timeout_minutes=0.1)
    process = start("pretrain", cfg, "--nproc_per_node=2", "--shutdown-timeout=5")
    wait_for_lines(tmp_path / "out", 12, process)
    os.kill(ranks(process)[1], signal.SIGSTOP)
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert "another process died, or did not answer within timeout_minutes" in err, err[-3000:]
    assert all(damage(p) == "" for p in all_checkpoints(tmp_path / "out"))


# ---- not a number


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_are_no_numbers_are_never_saved(tmp_path, data_dir, source, stage, monkeypatch):
    """A bit of memory flips in step 4: from then on no gradient is finite."""
    main, make = STAGES[stage]
    build, models = sys.modules[stage].build, []

    def building(*args):
        models.append(built := build(*args))
        return built

    def spoil():
        with torch.no_grad():
            models[0][0].model["layers"][1].mlp.up_proj.weight[3, 5] = float("nan")

    monkeypatch.setattr(sys.modules[stage], "build", building)
    at_draw(monkeypatch, 4, spoil)
    cfg = make(data_dir, tmp_path / "out", source, max_skipped=2, max_steps=20, eval_interval=50)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN .* so step 6 is not saved"):
        main(cfg)
    assert [p.name for p in all_checkpoints(tmp_path / "out")] == ["step_0000003"]
    assert [x["skipped"] for x in train_lines(tmp_path / "out")] == [0, 0, 0, 0, 1, 2]
    monkeypatch.undo()
    main(dataclasses.replace(cfg, resume=True, max_steps=6))
    weights = load_file(tmp_path / "out" / "step_0000006" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())
    assert json.loads((tmp_path / "out" / "step_0000006" / "state.json").read_text())["skipped"] == 0
