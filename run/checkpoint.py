"""The checkpoints of a run: saved, found again, checked, thrown away.

out_dir/step_0000400/ is a model folder (weights.py) with masks.safetensors (of prune.py), optimizer.safetensors and
state.json beside it, so whatever reads a model folder reads a checkpoint, and manifest.json with the size and SHA-256 of
each small file and each tensor.  Nothing in it depends on the number of ranks, and nothing is pickled.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import typing
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from run.processes import Processes, RunState
from run.settings import (TrainSettings, UserError, began_with, by_domain, check, check_same_domains, conform, read_json,
                          user_errors)
from run.tokenizer import holds_tokenizer, load_tokenizer
from run.weights import (all_checkpoints, checksums, damage, drop_cache, header, is_finite, latest_checkpoint, let_go,
                         new_folder, part_of, pieces, read_tensors, step_of, verified, write_assets, write_manifest, written)

# Settings that a resumed run must keep, as it must its target_* and its tokens.
FIXED = ("seed", "seq_len", "split", "global_batch_size", "shape", "count", "pruning_modules", "domain_weights",
         "reference_loss", "start_sparsity", "lagrangian_warmup_steps", "relaxation", "init_scores", "freeze_weights",
         "teacher", "kd_weight")


def own_rows(tensor: Tensor, own: bool) -> tuple[Tensor, int] | None:
    """What this rank writes of a tensor, and from which of its bytes on: of a sharded one the rows that it keeps, which are
    one range of bytes; of any other, which every rank has, all if it is its own.  None for nothing.
    """
    if not isinstance(tensor, DTensor):
        return (tensor, 0) if own else None
    assert tensor.placements == (Shard(0),), f"a tensor is sharded as {tensor.placements}, not by rows"
    rows, mesh = tensor.to_local(), tensor.device_mesh
    first = min(len(tensor), mesh.get_local_rank() * math.ceil(len(tensor) / mesh.size()))  # as torch.chunk cuts
    return (rows, first * math.prod(tensor.shape[1:]) * tensor.dtype.itemsize) if len(rows) else None


def write_own(path: Path, tensors: dict[str, Tensor], ranges: dict[str, tuple[int, int]], processes: Processes,
              look: Callable[[str, Tensor], None] | None) -> None:
    """This rank's part of a safetensors file whose header is there, read back from the disk when all is written.

    look(name, rows) sees it first, on the CPU.  Raises UserError.
    """
    own = [(name, *part) for name, tensor in tensors.items()
           if (part := own_rows(tensor, owner(ranges[name], ranges, processes.world) == processes.rank))]
    with written(path), path.open("r+b", buffering=0) as file:
        handle = file.fileno()
        for back in (False, True):
            for name, rows, offset in own:
                rows, at = rows.detach().to("cpu").contiguous(), ranges[name][0] + offset
                if look is not None and not back:
                    look(name, rows)
                for piece in pieces(rows):
                    if back:
                        there = np.frombuffer(os.pread(handle, len(piece), at), np.uint8)
                        check(np.array_equal(there, piece), f"{path}: {name} is not what was written a moment ago: the disk "
                              "or the memory is faulty")
                    else:
                        put(handle, piece, at)
                    at += len(piece)
            os.fsync(handle)
            drop_cache(handle)


def put(handle: int, piece: np.ndarray, at: int) -> None:
    """All of it: a disk that fills up takes a part first, and says so when asked again."""
    while len(piece):
        done = os.pwrite(handle, piece, at)
        piece, at = piece[done:], at + done


def owner(span: tuple[int, int], ranges: dict[str, tuple[int, int]], world: int) -> int:
    """The rank that sees to a tensor's bytes as a whole: each has about as many, of tensors that follow each other."""
    return min(world - 1, span[0] * world // max(end for _, end in ranges.values()))


def parameter_names(model: nn.Module, masks: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Every trained parameter under the name it has in optimizer.safetensors."""
    names = dict(model.named_parameters())
    if masks is not None:
        names |= {f"masks.{name}": p for name, p in masks.named_parameters()}
    return {name: p for name, p in names.items() if p.requires_grad}


def save_checkpoint(cfg: TrainSettings, state: RunState, processes: Processes, *, model: nn.Module, model_config,
                    optimizer: torch.optim.Optimizer, assets: list[Path], masks: nn.Module | None = None,
                    target=None) -> None:
    """Write out_dir/step_*, whole or not at all, then delete what keep_last and keep_every let go.

    Every rank calls it and gets the same UserError.  Rank 0 writes what is small; of the tensors each rank writes what it
    keeps, and no rank sends any.  optimizer.safetensors holds `<parameter>.<exp_avg | exp_avg_sq | step>`;
    masks.safetensors the state of l0.L0, and target_config.json the shape that its counts lead to.
    """
    if isinstance(model, FSDPModule):
        model.reshard()  # an evaluation leaves the root's parameters gathered, which are not those of the optimizer
    moments = {f"{name}.{key}": value for name, p in parameter_names(model, masks).items()
               for key, value in optimizer.state[p].items()}
    files = {"model.safetensors": dict(sorted(model.named_parameters())),
             "optimizer.safetensors": dict(sorted(moments.items()))}
    heads = {file: header(*({n: getattr(t, kind) for n, t in tensors.items()} for kind in ("shape", "dtype")))
             for file, tensors in files.items()}

    place = Path(cfg.out_dir) / f"step_{state.step:07d}"

    def finite(name: str, rows: Tensor) -> None:
        check(is_finite(rows), f"{name} holds NaN or infinite values, so step {state.step} is not saved; earlier "
              f"checkpoints in {cfg.out_dir} stay")

    def begin() -> Path:
        folder = stack.enter_context(new_folder(place))
        with written(place):
            for file, (start, ranges) in heads.items():
                (folder / file).write_bytes(start)
                os.truncate(folder / file, max(end for _, end in ranges.values()))
            write_assets(folder, model_config, assets)
            if masks is not None:
                save_file(masks.state_dict(), folder / "masks.safetensors")
                (folder / "target_config.json").write_text(target.to_json())
            (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")
        return folder

    def write_all() -> None:
        for file, tensors in files.items():
            write_own(folder / file, tensors, heads[file][1], processes, finite if file == "model.safetensors" else None)

    def own_checksums() -> dict[str, dict[str, str]]:
        with written(place):
            return {file: checksums(folder / file, {name: span for name, span in ({"": (0, len(start))} | ranges).items()
                                                    if owner(span, ranges, processes.world) == processes.rank})
                    for file, (start, ranges) in heads.items()}

    def commit() -> None:
        with written(place):
            write_manifest(folder, {file: dict(pair for one in found for pair in one[file].items()) for file in files})
        stack.close()
        delete_old(Path(cfg.out_dir), cfg.keep_last, cfg.keep_every)

    with ExitStack() as stack:  # of rank 0: the folder, until it is whole
        folder = processes.on_main(begin)
        processes.everywhere(write_all)
        found = processes.everywhere(own_checksums)
        processes.on_main(commit)


def save_masks(out_dir: str | Path, masks: nn.Module, step: int) -> None:
    """out_dir/masks/step_*.safetensors: the parameters of l0.L0 alone, small enough to keep those of each evaluation."""
    path = Path(out_dir) / "masks" / f"step_{step:07d}.safetensors"
    with written(path):
        path.parent.mkdir(exist_ok=True)
        save_file(masks.state_dict(), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def newest_whole(out_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, None if there was never one.

    Damaged ones that are newer are named on stderr and put aside as *.damaged.  Raises UserError if all are damaged.
    """
    damaged = []
    for folder in reversed(all_checkpoints(out_dir)):
        if wrong := damage(folder):
            damaged.append((folder, wrong))
            continue
        for bad, wrong in damaged:
            aside, n = bad.with_name(f"{bad.name}.damaged"), 1
            while aside.exists():
                aside, n = bad.with_name(f"{bad.name}.damaged{n}"), n + 1
            os.rename(bad, aside)
            print(f"WARNING: {bad} is damaged ({wrong}); it is now {aside.name}, and {folder.name} is used", file=sys.stderr,
                  flush=True)
        return folder
    found = "; ".join(f"{folder.name}: {wrong}" for folder, wrong in damaged[:3]) or "only *.damaged are left"
    check(not damaged and not any(out_dir.glob("step_*.damaged*")), f"no checkpoint in {out_dir} is whole: {found}; mend or "
          "copy one back, or begin in another out_dir")
    return None


def delete_old(out_dir: Path, keep_last: int, keep_every: int) -> None:
    """Delete the checkpoints that `let_go` names.  A failure is a warning: the run has just been saved."""
    folders = {step_of(folder): folder for folder in all_checkpoints(out_dir)}
    for step in let_go(list(folders), keep_last, keep_every):
        folder = folders[step]
        gone = folder.with_name(folder.name + ".tmp")  # half a checkpoint must not look like one
        try:
            os.rename(folder, gone)
            remove(gone)
        except OSError as error:
            print(f"warning: cannot delete {folder}: {error.strerror or error}", file=sys.stderr, flush=True)


def remove(folder: Path) -> None:
    """A folder, or a link to one that lies elsewhere."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter], folder: Path) -> None:
    """Put the saved moments back, on each parameter's device.  names: `parameter_names`.  Raises UserError."""
    state = {"exp_avg": None, "exp_avg_sq": None, "step": ()}
    shapes = {f"{name}.{key}": tuple(p.shape) if shape is None else shape
              for name, p in names.items() for key, shape in state.items()}
    for full_name, tensor in read_tensors(folder / "optimizer.safetensors", shapes):
        name, key = full_name.rsplit(".", 1)
        p = names[name]
        optimizer.state[p][key] = tensor.to(p.device) if key == "step" else part_of(tensor, p)


def start_run(cfg: TrainSettings, data) -> tuple[RunState, Path | None, list[Path]]:
    """Make out_dir, or find where to go on: (state, checkpoint folder or None for a fresh start, assets to carry along).

    For rank 0 (`Processes.on_main`).  Raises UserError.
    """
    out_dir = Path(cfg.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock(out_dir)
        for left in out_dir.glob("step_*.tmp"):  # of a process that was killed
            remove(left)
    except OSError as error:
        raise UserError(f"cannot write {out_dir}: {error.strerror or error}") from None
    with user_errors():
        assets = carried_assets(cfg, data)
        latest = latest_checkpoint(out_dir)
        check(cfg.resume or latest is None, f"{out_dir} holds a run already ({latest and latest.name}); go on with "
              "--resume, or choose another out_dir")
        folder = newest_whole(out_dir)
        check(folder is not None or cfg.resume or not (out_dir / "metrics.jsonl").exists(), f"{out_dir} holds the metrics "
              "of a run without a checkpoint; start it over with --resume, or choose another out_dir")
        with verified(cfg.teacher):
            if folder is not None:
                state = resumed_state(cfg, data, folder)
            else:
                with verified(cfg.init_from):
                    state = fresh_state(cfg, data)
    return state, folder, assets


def lock(out_dir: Path) -> None:
    """Raises UserError if another process trains in this folder.  The lock ends with this process."""
    global lock_file
    lock_file = (out_dir / ".lock").open("w")
    try:
        fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process trains in {out_dir}; wait for it, or choose another out_dir") from None
    except OSError as error:  # a file system without locks
        print(f"note: {out_dir} cannot be locked ({error.strerror}): see that no second run writes there", flush=True)


def fresh_state(cfg: TrainSettings, data) -> RunState:
    """Before the first step.  Raises UserError or ValueError."""
    domains = data.domains
    weights = by_domain("domain_weights", cfg.domain_weights) or {d: 1 / len(domains) for d in domains}
    reference = by_domain("reference_loss", cfg.reference_loss)
    if reference:  # a domain without evaluation tokens needs none, and a run's own file has none for it
        measured = {s.domain for s in data.eval if s.n_windows} | reference.keys()
        check_same_domains("reference_loss", reference, {d: w for d, w in weights.items() if d in measured})
    return RunState(0, weights, dict.fromkeys(domains, 0), reference, tokens=fingerprints(data))


def fingerprints(data) -> dict[str, str]:
    """What tells each domain's training tokens from others: a hash of their files' checksums."""
    return {s.domain: hashlib.sha256("".join(want for _, want in s.checksums).encode()).hexdigest() for s in data.train}


def resumed_state(cfg: TrainSettings, data, folder: Path) -> RunState:
    """As a checkpoint holds it.  Raises UserError if the run is to go on with other settings than can be changed."""
    state = read_state(folder)
    other = "or begin a run in another out_dir" + f", --init_from={folder}" * (not (folder / "masks.safetensors").exists())
    check(sorted(state.domain_weights) == sorted(data.domains), f"{folder} was trained on the domains "
          f"{', '.join(state.domain_weights)}, not on {', '.join(data.domains)}; give domain_weights and data_dir as they "
          f"were, {other}")
    before, now = began_with(cfg.out_dir), json.loads(json.dumps(dataclasses.asdict(cfg)))
    before = {f.name: f.default for f in dataclasses.fields(cfg)} | before  # a setting that is newer than the run
    if not before["teacher"] and not now["teacher"]:  # what it weighs weighs nothing
        before["kd_weight"] = now["kd_weight"]
    odd = [f"{n} = {before[n]!r}, not {now[n]!r}" for n in now
           if (n in FIXED or n.startswith("target_")) and now[n] != before[n]]
    check(not odd, f"{folder.parent} was begun with {'; '.join(odd)}; a resumed run must "
          f"keep that: give it as it was, {other}")
    tokens = fingerprints(data)
    changed = [d for d, was in state.tokens.items() if tokens[d] != was]
    check(not changed, f"{folder.parent} was begun with other training tokens of {', '.join(changed)} than {cfg.data_dir} "
          f"has; give the data_dir that it began with, {other}")
    check(state.step <= cfg.max_steps, f"{folder} is past max_steps = {cfg.max_steps} already")
    return state


def carried_assets(cfg: TrainSettings, data) -> list[Path]:
    """Folders whose files go into every checkpoint.  Raises UserError if the model has another tokenizer than the data."""
    own = [Path(folder) / "assets" for folder in (cfg.init_from, cfg.teacher)]
    for folder in own:
        check(not holds_tokenizer(folder) or load_tokenizer(folder).fingerprint == data.train[0].tokenizer,
              f"{cfg.data_dir} was made with another tokenizer than the one in {folder}; run prepare.py "
              f"--tokenizer={folder}")
    if not cfg.init_from:
        return [data.tokenizer_dir]
    return [own[0], *([] if holds_tokenizer(own[0]) else [data.tokenizer_dir])]


def read_state(folder: Path) -> RunState:
    """state.json of a checkpoint.  Raises UserError."""
    values, hints = read_json(folder / "state.json"), typing.get_type_hints(RunState)
    try:
        state = RunState(**{name: conform(value, hints[name]) for name, value in values.items()})
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{folder / 'state.json'} is not a state of this version: {values}") from None
    check(state.cursors.keys() == state.domain_weights.keys() and state.step >= 0 <= min(state.cursors.values(), default=0),
          f"{folder / 'state.json'}: cursors and domain_weights do not fit together: {values}")
    return state
