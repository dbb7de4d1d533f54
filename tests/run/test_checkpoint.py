"""A save by several processes: each writes what it keeps, no message carries a weight, and the files are those of one."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, prune_settings, random_model, same_files, tiny_config
from safetensors.torch import load_file

import prune
from l0 import L0, mask_sets
from run import checkpoint, weights
from run.checkpoint import save_checkpoint
from run.processes import Processes, RunState, make_optimizer
from run.settings import UserError
from run.weights import damage

# One step on made-up gradients, then a save: python -c SAVE PARALLEL OUT_DIR [HIDDEN_SIZE [ROUNDS]].  Prints what messages
# of all kinds carried in the save: the bytes of each, and the seconds of the fastest save.
SAVE = """
import dataclasses, json, shutil, sys, time
import torch
sys.path.insert(0, "tests")
from conftest import prune_settings, random_model, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from l0 import L0, mask_sets
from model import Transformer
from run.checkpoint import save_checkpoint
from run.processes import RunState, make_optimizer, shard, start_processes
from run.weights import part_of

parallel, out_dir = sys.argv[1:3]
hidden, rounds = (int(x) for x in sys.argv[3:5]) if len(sys.argv) > 3 else (32, 1)
shape = tiny_config(hidden_size=hidden, intermediate_size=hidden * 3 + 1, vocab_size=101, n_layers=4)
cfg = prune_settings("data", out_dir, "source", parallel=parallel, micro_batch_size=1, global_batch_size=6)
target = dataclasses.replace(shape, hidden_size=16, n_layers=2)
processes = start_processes(cfg)
whole = random_model(shape)
with torch.device("meta"):
    model = Transformer(shape)
model = shard(model, cfg, processes).to_empty(device="cpu")
masks = L0(mask_sets(shape, target))
optimizer = make_optimizer([dict(params=list(model.parameters()), lr=0.1), dict(params=list(masks.parameters()), lr=0.1)])
with torch.no_grad():
    for (name, p), q in zip(model.named_parameters(), whole.parameters()):
        p.copy_(part_of(q.detach(), p))
        p.grad = part_of(torch.sin(q.detach()), p)
    for p in masks.parameters():
        p.grad = torch.cos(p)
optimizer.step()
sent = []

class Messages(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            sent.append(sum(t.numel() * t.itemsize for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)))
        return func(*args, **(kwargs or {}))

seconds = []
for i in range(rounds):
    state = RunState(step=7, domain_weights={"a": 1.0}, cursors={"a": 3}, reference_loss={})
    torch.distributed.barrier() if processes.world > 1 else None
    began = time.perf_counter()
    with Messages():
        save_checkpoint(cfg, state, processes, model=model, model_config=shape, optimizer=optimizer, assets=[], masks=masks,
                        target=target)
    seconds.append(time.perf_counter() - began)
    if processes.rank == 0 and i + 1 < rounds:
        shutil.rmtree(out_dir)
if processes.rank == 0:
    print(json.dumps([sent, min(seconds)]))
if processes.world > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def save(parallel: str, out_dir, *sizes: int, processes: int = 1) -> tuple[list[int], float]:
    script = out_dir.parent / "save.py"
    script.write_text(SAVE)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *launcher, str(script), parallel, str(out_dir), *map(str, sizes)], cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sent, seconds = json.loads(done.stdout.splitlines()[-1])
    return sent, seconds


@pytest.mark.parametrize("parallel, processes", [("fsdp", 2), ("fsdp", 3), ("ddp", 2)])
def test_a_save_moves_no_weight_and_does_not_depend_on_the_number_of_ranks(tmp_path, parallel, processes):
    """Rows of 32, 97 and 101 do not divide by 2 or 3, and a layer has more than one tensor for each rank."""
    save("ddp", tmp_path / "one")
    sent, _ = save(parallel, tmp_path / "several", processes=processes)
    same_files(tmp_path / "one" / "step_0000007", tmp_path / "several" / "step_0000007")
    folder = tmp_path / "several" / "step_0000007"
    assert damage(folder) == ""
    tensors = load_file(folder / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) * 12 > 250_000
    assert 0 < sum(sent) < 120_000, sent  # what was agreed on and the checksums: 64 characters and a name for each tensor
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert manifest["model.safetensors"]["tensors"].keys() == tensors.keys() | {""}
    assert "sha256" in manifest["state.json"] and "sha256" not in manifest["model.safetensors"]


def test_the_bytes_of_messages_do_not_grow_with_the_model(tmp_path):
    small, _ = save("fsdp", tmp_path / "small", 32, 1, processes=2)
    large, _ = save("fsdp", tmp_path / "large", 256, 1, processes=2)
    size = (tmp_path / "large" / "step_0000007" / "optimizer.safetensors").stat().st_size
    assert size > 10_000_000 and sum(large) < sum(small) + 2000


@pytest.fixture
def saving(tmp_path):
    """Save a small model after a step, to tmp_path/out."""
    shape, cfg = tiny_config(), prune_settings("data", tmp_path / "out", "source")
    model, masks = random_model(shape), L0(mask_sets(shape, dataclasses.replace(shape, hidden_size=16)))
    optimizer = make_optimizer([dict(params=[*model.parameters(), *masks.parameters()], lr=0.1)])
    for p in [*model.parameters(), *masks.parameters()]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state, alone = RunState(3, {"a": 1.0}, {"a": 0}, {}), Processes(0, 1, torch.device("cpu"), torch.float32)
    (tmp_path / "out").mkdir()
    return lambda: save_checkpoint(cfg, state, alone, model=model, model_config=shape, optimizer=optimizer, assets=[],
                                   masks=masks, target=shape)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_what_the_disk_gives_back_is_compared(tmp_path, saving, file, monkeypatch):
    plain = checkpoint.drop_cache

    def flipping(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(file):
            byte, = os.pread(handle, 1, at := os.fstat(handle).st_size // 2)
            os.pwrite(handle, bytes([byte ^ 1]), at)
        plain(handle)

    monkeypatch.setattr(checkpoint, "drop_cache", flipping)
    with pytest.raises(UserError, match=rf"{file}: .* is not what was written a moment ago: the disk or"):
        saving()
    assert not list((tmp_path / "out").iterdir())


def test_a_write_that_takes_a_part_goes_on_with_the_rest(tmp_path, saving, monkeypatch):
    saving()
    (tmp_path / "out" / "step_0000003").rename(tmp_path / "plain")
    plain = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, piece, at: plain(handle, piece[:100], at))
    saving()
    same_files(tmp_path / "plain", tmp_path / "out" / "step_0000003")


def test_the_damaged_tensor_is_named(tmp_path, saving):
    saving()
    folder = tmp_path / "out" / "step_0000003"
    path = folder / "optimizer.safetensors"
    name = "model.layers.2.mlp.up_proj.weight.exp_avg"
    content, (start, _) = bytearray(path.read_bytes()), weights.tensor_ranges(path)[name]
    content[start + 5] ^= 8
    path.write_bytes(content)
    assert damage(folder) == f"optimizer.safetensors differs from its checksum in manifest.json ({name})"
    content[start + 5] ^= 8
    content[20] ^= 1  # a name in the header
    path.write_bytes(content)
    assert damage(folder).startswith("optimizer.safetensors differs from its checksum in manifest.json")


def test_a_checkpoint_of_an_earlier_version_is_read_and_checked(tmp_path, data_dir, source, pruned):
    """Whose manifest has one SHA-256 for each file."""
    shutil.copytree(pruned, tmp_path / "out")
    for folder in (tmp_path / "out").glob("step_*"):
        files = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": weights.sha256(p)}
                 for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"}
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    prune.main(prune_settings(data_dir, tmp_path / "out", source, resume=True, max_steps=7))
    assert damage(tmp_path / "out" / "step_0000006") == "" == damage(tmp_path / "out" / "step_0000007")
    (tmp_path / "out" / "step_0000006" / "optimizer.safetensors").write_bytes(b"x")
    assert "optimizer.safetensors has 1 bytes" in damage(tmp_path / "out" / "step_0000006")
