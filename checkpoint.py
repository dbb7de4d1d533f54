"""Files that are whole or not there: model folders, and the checkpoints of a run.  Apart from runtime.py because every
stage reads and writes them, also those that train nothing.

A model folder holds model.safetensors, model_config.json and assets/ (files carried along unread: the tokenizer, the
source's Hugging Face config).  A checkpoint out_dir/step_0000400/ is a model folder with masks.safetensors (of prune.py),
optimizer.safetensors and state.json beside it, so whatever reads a model folder reads a checkpoint, and manifest.json with
the size and SHA-256 of each file.  Nothing in it depends on the number of ranks, and nothing is pickled.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import struct
import sys
import typing
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from data import RunData, sha256
from runtime import Processes, RunState
from settings import TrainSettings, UserError, by_domain, check, check_same_domains, conform, read_json, user_errors
from tokenizer import load_tokenizer

FIXED = ("seed", "seq_len", "split", "count", "pruning_modules", "domain_weights", "reference_loss")  # through a resume
DTYPE_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_model_config(folder: str | Path, config_class: type, name: str = "model_config.json"):
    """The ModelConfig of a model folder, or a prune.py checkpoint's "target_config.json".  Raises UserError."""
    path = Path(folder) / name
    check(os.path.isdir(folder), f"model folder {folder} " + ("is a file" if os.path.exists(folder) else "does not exist"))
    if not path.is_file():
        newest, theirs = latest_checkpoint(folder), Path(folder) / "config.json"
        hint = "convert.py makes one from a Hugging Face checkpoint"
        if newest is not None:
            hint = f"it is a run's; did you mean {newest}?"
        elif theirs.is_file() and '"model_type"' in theirs.read_text(errors="replace"):
            hint = f"it is a Hugging Face folder; convert it first: convert.py --from_hf={folder} --out_dir=..."
        raise UserError(f"{folder} has no {name}, so it is none of our model folders; {hint}")
    try:
        return config_class.from_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file.  Raises UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


def check_names(where: str | Path, got: Set[str], want: Set[str]) -> None:
    """Raises UserError unless a file holds exactly the tensors that it should."""
    missing, unexpected = sorted(want - got), sorted(got - want)
    check(not missing and not unexpected, f"{where}: missing tensors {missing[:3]} ({len(missing)}), "
          f"unexpected tensors {unexpected[:3]} ({len(unexpected)})")


def read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, one at a time: (name, tensor).  Names and shapes must be exactly `shapes`."""
    check(path.is_file(), f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            check_names(path, set(file.keys()), shapes.keys())
            for name in shapes:
                part = file.get_slice(name)
                shape, code = tuple(part.get_shape()), part.get_dtype()
                check(shape == tuple(shapes[name]), f"{path}: {name} has shape {shape}, not {tuple(shapes[name])}")
                check(code in DTYPE_CODES.values(), f"{path}: {name} holds {code} numbers, not "
                      f"{', '.join(DTYPE_CODES.values())}")
            for name in shapes:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Copy model.safetensors of a folder (or a file) into the model's parameters, whatever their device and dtype.

    Returns the model.  Raises UserError on a missing, unexpected, misshapen or non-finite tensor.
    """
    path = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    parameters = dict(model.named_parameters())
    for name, tensor in read_tensors(path, {n: tuple(p.shape) for n, p in parameters.items()}):
        check(all(v.isfinite() for v in tensor.aminmax()), f"{path}: {name} holds NaN or infinite values")
        parameters[name].copy_(part_of(tensor, parameters[name]))
    return model


def write_tensors(path: Path, shapes: dict[str, torch.Size], dtypes: dict[str, torch.dtype],
                  load: Callable[[str], Tensor]) -> str:
    """A safetensors file of load(name) for each name, one tensor in memory at a time, where save_file wants all at once.

    The format is a length, a JSON header and the bytes (https://github.com/huggingface/safetensors#format).  Returns the
    SHA-256 of what was written, to hold against what the disk gives back.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": DTYPE_CODES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers lie aligned
    start = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(start)
    with path.open("wb") as file:
        file.write(start)
        for name in shapes:
            tensor = load(name).detach().to("cpu", dtypes[name]).contiguous()
            numbers = tensor.flatten().view(torch.uint8).numpy()
            digest.update(numbers)
            file.write(numbers)
    return digest.hexdigest()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP shards, gathered from every rank, which all must call this; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`; of a sharded one the part that this rank keeps, without communication."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: fill the yielded one; it is synced, then renamed to `path`.

    Raises UserError if `path` exists or cannot be written; on any error nothing is left behind.
    """
    path = Path(path)
    check(not path.exists(), f"{path} exists already; remove it or choose another name")
    temporary = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for each in [*temporary.rglob("*"), temporary]:
            fsync(each)
        os.rename(temporary, path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_model(folder: Path, tensors: dict[str, Tensor], config, assets: list[Path]) -> None:
    """Fill a folder of `new_folder` as a model folder: model.safetensors, model_config.json and assets/."""
    tensors = dict(sorted(tensors.items()))
    shapes, dtypes = ({name: getattr(t, kind) for name, t in tensors.items()} for kind in ("shape", "dtype"))
    write_tensors(folder / "model.safetensors", shapes, dtypes, tensors.__getitem__)
    write_assets(folder, config, assets)


def write_assets(folder: Path, config, assets: list[Path]) -> None:
    """A model folder without its weights.  assets: folders of files to carry along unread; of one name the first counts."""
    (folder / "model_config.json").write_text(config.to_json())
    for source in reversed([a for a in assets if a.is_dir()]):
        shutil.copytree(source, folder / "assets", dirs_exist_ok=True)


# ---- checkpoints of a run


def parameter_names(model: nn.Module, masks: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Every trained parameter under the name it has in optimizer.safetensors."""
    names = dict(model.named_parameters())
    return names if masks is None else names | {f"masks.{name}": p for name, p in masks.named_parameters()}


def save_checkpoint(cfg: TrainSettings, state: RunState, processes: Processes, *, model: nn.Module, model_config,
                    optimizer: torch.optim.Optimizer, assets: list[Path], masks: nn.Module | None = None,
                    target=None) -> None:
    """Write out_dir/step_*, whole or not at all, then delete what keep_last and keep_every let go.

    Every rank calls it and gets the same UserError; rank 0 writes.  optimizer.safetensors holds `<parameter>.<exp_avg |
    exp_avg_sq | step>`; masks.safetensors the state of l0.L0, and target_config.json the shape that its counts lead to.
    """
    if isinstance(model, FSDPModule):
        model.reshard()  # an evaluation leaves the root's parameters gathered, which are not those of the optimizer
    weights = dict(sorted(model.named_parameters()))
    moments = dict(sorted((f"{name}.{key}", value) for name, p in parameter_names(model, masks).items()
                          for key, value in optimizer.state[p].items()))
    gathered = (whole(t) for t in [*weights.values(), *moments.values()])  # one by one, in one order on every rank

    def next_weight(name: str) -> Tensor:
        tensor = next(gathered)
        check(all(v.isfinite() for v in tensor.aminmax()), f"{name} holds NaN or infinite values, so step {state.step} is "
              f"not saved; earlier checkpoints in {cfg.out_dir} stay")
        return tensor

    def write() -> None:
        try:
            with new_folder(Path(cfg.out_dir) / f"step_{state.step:07d}") as folder:
                digests = {}
                for name, like, load in (("model.safetensors", weights, next_weight),
                                         ("optimizer.safetensors", moments, lambda _: next(gathered))):
                    shapes, dtypes = ({n: getattr(t, kind) for n, t in like.items()} for kind in ("shape", "dtype"))
                    digests[name] = write_tensors(folder / name, shapes, dtypes, load)
                write_assets(folder, model_config, assets)
                if masks is not None:
                    save_file(masks.state_dict(), folder / "masks.safetensors")
                    (folder / "target_config.json").write_text(target.to_json())
                (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")
                write_manifest(folder, digests)
            delete_old(Path(cfg.out_dir), cfg.keep_last, cfg.keep_every)
        finally:
            for _ in gathered:  # the others have no end before the last one
                pass

    if processes.rank:
        for _ in gathered:
            pass
    processes.on_main(write)


def write_manifest(folder: Path, digests: dict[str, str]) -> None:
    """manifest.json: size and SHA-256 of every file in it.  digests: of files whose bytes were hashed as they were written.

    Raises UserError unless the disk gives back the same.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fsync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": digests.get(name) or sha256(path)}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n")
    wrong = damage(folder)
    check(wrong == "", f"{folder}: {wrong}, right after it was written: the disk or the memory is faulty")


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint by its manifest: a file missing, of another size or checksum; "" if nothing is."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name, want in files.items():
            size = (folder / name).stat().st_size
            if size != want["bytes"]:
                return f"{name} has {size} bytes, not the {want['bytes']} of manifest.json"
            if sha256(folder / name) != want["sha256"]:
                return f"{name} differs from its checksum in manifest.json"
        unknown = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json", *files}
        return f"manifest.json does not know {sorted(unknown)[0]}" if unknown else ""
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is damaged: {type(error).__name__} {error}"


def check_whole(folder: str | Path) -> None:
    """Raises UserError if `folder` is a checkpoint and damaged."""
    if folder and (Path(folder) / "manifest.json").exists():
        wrong = damage(Path(folder))
        check(wrong == "", f"{folder} is damaged: {wrong}; take an earlier checkpoint, or remove manifest.json "
              "if you changed it yourself")


def save_masks(out_dir: str | Path, masks: nn.Module, step: int) -> None:
    """out_dir/masks/step_*.safetensors: the parameters of l0.L0 alone, small enough to keep those of each evaluation."""
    path = Path(out_dir) / "masks" / f"step_{step:07d}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(masks.state_dict(), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from None


def all_checkpoints(out_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first.  A folder whose name has not been committed is none."""
    found = [(int(p.name[5:]), p) for p in Path(out_dir).glob("step_*") if re.fullmatch(r"step_\d{7,}", p.name)]
    return [path for _, path in sorted(found)]


def latest_checkpoint(out_dir: str | Path) -> Path | None:
    """The checkpoint with the highest step, damaged or not, or None."""
    return next(reversed(all_checkpoints(out_dir)), None)


def newest_whole(out_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, None if there is none at all.

    A damaged one is named on stderr and put aside as *.damaged.  Raises UserError if all are damaged.
    """
    folders = all_checkpoints(out_dir)
    for folder in reversed(folders):
        wrong = damage(folder)
        if not wrong:
            return folder
        aside = next(p for i in itertools.count() if not (p := folder.with_name(f"{folder.name}.damaged{i or ''}")).exists())
        os.rename(folder, aside)
        print(f"WARNING: {folder} is damaged ({wrong}); it is now {aside.name}, and the checkpoint before it is used",
              file=sys.stderr, flush=True)
    check(not folders, f"every checkpoint in {out_dir} is damaged; copy one back from elsewhere, or start over in another "
          "out_dir")
    return None


def delete_old(out_dir: Path, keep_last: int, keep_every: int) -> None:
    """Delete all checkpoints but the newest keep_last (0: all stay) and those whose step divides by keep_every."""
    for folder in all_checkpoints(out_dir)[:-keep_last] if keep_last else []:
        if not keep_every or int(folder.name[5:]) % keep_every:
            os.rename(folder, gone := folder.with_name(folder.name + ".tmp"))  # half a checkpoint must not look like one
            shutil.rmtree(gone)


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


def start_run(cfg: TrainSettings, data: RunData) -> tuple[RunState, Path | None, list[Path]]:
    """Make out_dir, or find where to go on: (state, checkpoint folder or None for a fresh start, assets to carry along).

    For rank 0 (`Processes.on_main`).  Raises UserError.
    """
    out_dir = Path(cfg.out_dir)
    with user_errors():
        check_whole(cfg.init_from)
        assets = carried_assets(cfg, data)
        latest = latest_checkpoint(out_dir)
        check(cfg.resume or latest is None, f"{out_dir} holds a run already ({latest and latest.name}); go on with "
              "--resume, or choose another out_dir")
        folder = newest_whole(out_dir)
        if folder is not None:
            state = resumed_state(cfg, data, folder)
        else:
            check(cfg.resume or not (out_dir / "metrics.jsonl").exists(), f"{out_dir} holds the metrics of a run without a "
                  "checkpoint; start it over with --resume, or choose another out_dir")
            state = fresh_state(cfg, data)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for left in out_dir.glob("step_*.tmp"):  # of a process that was killed
            shutil.rmtree(left)
    except OSError as error:
        raise UserError(f"cannot write {out_dir}: {error.strerror}") from None
    return state, folder, assets


def fresh_state(cfg: TrainSettings, data: RunData) -> RunState:
    """Before the first step.  Raises UserError or ValueError."""
    domains = data.domains
    weights = by_domain("domain_weights", cfg.domain_weights) or {d: 1 / len(domains) for d in domains}
    reference = by_domain("reference_loss", cfg.reference_loss)
    if reference:  # a domain without evaluation tokens needs none, and a run's own file has none for it
        measured = {s.domain for s in data.eval if s.n_windows} | reference.keys()
        check_same_domains("reference_loss", reference, {d: w for d, w in weights.items() if d in measured})
    return RunState(0, weights, dict.fromkeys(domains, 0), reference)


def resumed_state(cfg: TrainSettings, data: RunData, folder: Path) -> RunState:
    """As a checkpoint holds it.  Raises UserError if the run is to go on with other settings than can be changed."""
    state = read_state(folder)
    check(sorted(state.domain_weights) == sorted(data.domains), f"{folder} was trained on the domains "
          f"{', '.join(state.domain_weights)}, not on {', '.join(data.domains)}")
    before, now = read_json(folder.parent / "config.json"), json.loads(json.dumps(dataclasses.asdict(cfg)))
    check(isinstance(before, dict), f"{folder.parent / 'config.json'} is not a JSON object; it must hold the run's settings")
    odd = [n for n in now if (n in FIXED or n.startswith("target_")) and now[n] != before.get(n)]
    check(not odd, f"{folder.parent} was begun with other {', '.join(odd)} (see config.json); a resumed run must keep them")
    check(state.step <= cfg.max_steps, f"{folder} is past max_steps = {cfg.max_steps} already")
    return state


def carried_assets(cfg: TrainSettings, data: RunData) -> list[Path]:
    """Folders whose files go into every checkpoint.  Raises UserError if the model has another tokenizer than the data."""
    assets = [data.tokenizer_dir]
    if cfg.init_from:
        own = Path(cfg.init_from) / "assets"
        if any(own.glob("*token*")):
            check(load_tokenizer(own).fingerprint == data.train[0].tokenizer, f"{cfg.data_dir} was made with another "
                  f"tokenizer than the one in {own}; run prepare.py --tokenizer={own}")
            assets = []
        assets = [own, *assets]
    return assets


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
