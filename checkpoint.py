"""Files that are whole or not there: model folders, and the checkpoints of a run.  Apart from runtime.py because every
stage reads and writes them, also those that train nothing.

A model folder holds model.safetensors, model_config.json and assets/ (files carried along unread: the tokenizer, the
source's Hugging Face config).  A checkpoint out_dir/step_0000400/ is a model folder with masks.safetensors (of prune.py),
optimizer.safetensors and state.json beside it, so whatever reads a model folder reads a checkpoint.  Nothing in it
depends on the number of ranks, and nothing is pickled.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from data import RunData
from runtime import RunState
from settings import TrainSettings, UserError, by_domain, check, check_same_domains, read_json
from tokenizer import load_tokenizer

WRITE_BYTES = 1 << 18  # at once: a write of a whole tensor takes up to twice the time (measured on ext4, Linux 6.18)
DTYPE_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_model_config(folder: str | Path, config_class: type, name: str = "model_config.json"):
    """The ModelConfig of a model folder, or a prune.py checkpoint's "target_config.json".  Raises UserError."""
    path = Path(folder) / name
    check(Path(folder).is_dir(), f"model folder {folder} does not exist")
    check(path.is_file(), f"{folder} has no {name}, so it is none of our model folders; "
          "convert.py makes one from a Hugging Face checkpoint")
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


def tensor_reader(path: Path, shapes: dict[str, tuple[int, ...]]) -> Callable[[str], Tensor]:
    """What reads one tensor of a safetensors file by its name.  Names and shapes must be exactly `shapes`."""
    check(path.is_file(), f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            got = set(file.keys())
            missing, unexpected = sorted(shapes.keys() - got), sorted(got - shapes.keys())
            check(not missing and not unexpected, f"{path}: missing tensors {missing[:3]} ({len(missing)}), "
                  f"unexpected tensors {unexpected[:3]} ({len(unexpected)})")
            for name in shapes:
                shape = tuple(file.get_slice(name).get_shape())
                check(shape == tuple(shapes[name]), f"{path}: {name} has shape {shape}, not {tuple(shapes[name])}")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
    return functools.partial(read_tensor, path)


def read_tensor(path: Path, name: str) -> Tensor:
    """The file is opened anew: what was read of a mapped one counts as this process's memory until it closes."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, one at a time: (name, tensor).  Names and shapes must be exactly `shapes`."""
    read = tensor_reader(path, shapes)
    for name in shapes:
        yield name, read(name)


def check_finite(tensor: Tensor, path: Path, name: str) -> None:
    finite = all(v.isfinite() for v in tensor.aminmax())  # no copy, as isfinite() of the tensor would make
    check(finite, f"{path}: {name} holds NaN or infinite values")


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Copy model.safetensors of a folder (or a file) into the model's parameters, whatever their device and dtype.

    Returns the model.  Raises UserError on a missing, unexpected, misshapen or non-finite tensor.
    """
    path = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    parameters = dict(model.named_parameters())
    for name, tensor in read_tensors(path, {n: tuple(p.shape) for n, p in parameters.items()}):
        check_finite(tensor, path, name)
        parameters[name].copy_(part_of(tensor, parameters[name]))
    return model


def write_tensors(path: Path, shapes: dict[str, torch.Size], dtypes: dict[str, torch.dtype],
                  load: Callable[[str], Tensor]) -> None:
    """A safetensors file of load(name) for each name, one tensor in memory at a time, where save_file wants all at once.

    The format is a length, a JSON header and the bytes (https://github.com/huggingface/safetensors#format).
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": DTYPE_CODES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers lie aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            tensor = load(name).detach().to("cpu", dtypes[name]).contiguous()
            for part in tensor.flatten().view(torch.uint8).split(WRITE_BYTES):
                file.write(part.numpy())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP shards, gathered from every rank, which all must call this; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_whole(path: Path | None, tensors: dict[str, Tensor]) -> None:
    """`write_tensors` of tensors that may be sharded.  Every rank calls it, those that do not write with None."""
    tensors = dict(sorted(tensors.items()))  # in one order on every rank, and after a resume
    if path is not None:
        shapes, dtypes = ({name: getattr(t, kind) for name, t in tensors.items()} for kind in ("shape", "dtype"))
        write_tensors(path, shapes, dtypes, lambda name: whole(tensors[name]))
        return
    for tensor in tensors.values():
        whole(tensor)


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
    """Fill a folder of `new_folder` as a model folder: model.safetensors, model_config.json and assets/.

    assets: folders of files to carry along unread; of two files of one name the first folder's counts.
    """
    write_whole(folder / "model.safetensors", tensors)
    write_config(folder, config, assets)


def write_config(folder: Path, config, assets: list[Path]) -> None:
    """What `write_model` writes beside the weights."""
    (folder / "model_config.json").write_text(config.to_json())
    for source in reversed([a for a in assets if a.is_dir()]):
        shutil.copytree(source, folder / "assets", dirs_exist_ok=True)


# ---- checkpoints of a run


def parameter_names(model: nn.Module, masks: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Every trained parameter under the name it has in optimizer.safetensors."""
    names = dict(model.named_parameters())
    return names if masks is None else names | {f"masks.{name}": p for name, p in masks.named_parameters()}


def save_checkpoint(out_dir: str | Path, state: RunState, *, model: nn.Module, model_config, is_main: bool,
                    optimizer: torch.optim.Optimizer, assets: list[Path], masks: nn.Module | None = None,
                    target=None) -> None:
    """Write out_dir/step_*, whole or not at all.  Every rank calls it; the one with is_main writes.  Raises UserError.

    optimizer.safetensors holds `<parameter>.<exp_avg | exp_avg_sq | step>`; masks.safetensors the state of l0.L0, and
    target_config.json the shape that its counts lead to.
    """
    if isinstance(model, FSDPModule):
        model.reshard()  # an evaluation leaves the root's parameters gathered, which are not those of the optimizer
    weights = dict(model.named_parameters())
    moments = {f"{name}.{key}": value for name, p in parameter_names(model, masks).items()
               for key, value in optimizer.state[p].items()}
    if not is_main:
        write_whole(None, weights)
        write_whole(None, moments)
        return
    with new_folder(Path(out_dir) / f"step_{state.step:07d}") as temporary:
        write_model(temporary, weights, model_config, assets)
        write_whole(temporary / "optimizer.safetensors", moments)
        if masks is not None:
            save_file(masks.state_dict(), temporary / "masks.safetensors")
            (temporary / "target_config.json").write_text(target.to_json())
        (temporary / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")


def save_masks(out_dir: str | Path, masks: nn.Module, step: int) -> None:
    """out_dir/masks/step_*.safetensors: the parameters of l0.L0 alone, small enough to keep those of each evaluation."""
    path = Path(out_dir) / "masks" / f"step_{step:07d}.safetensors"
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(masks.state_dict(), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from None


def latest_checkpoint(out_dir: str | Path) -> Path | None:
    """The checkpoint with the highest step, or None.  A folder whose name has not been committed is none."""
    return max(Path(out_dir).glob("step_???????"), default=None)


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


def start_run(cfg: TrainSettings, data: RunData, *, is_main: bool) -> tuple[RunState, Path | None, list[Path]]:
    """Make out_dir, or find where to go on: (state, checkpoint folder or None for a fresh start, assets to carry along).

    is_main: this rank writes config.json, the settings as resolved.  Raises UserError or ValueError.
    """
    out_dir, domains = Path(cfg.out_dir), data.domains
    folder = latest_checkpoint(out_dir)
    if folder is None:
        check(cfg.resume or not (out_dir / "metrics.jsonl").exists(), f"{out_dir} holds the metrics of a run without a "
              "checkpoint; start it over with --resume, or choose another out_dir")
        weights = by_domain("domain_weights", cfg.domain_weights) or {d: 1 / len(domains) for d in domains}
        reference = by_domain("reference_loss", cfg.reference_loss)
        if reference:  # a domain without evaluation tokens needs none, and a run's own file has none for it
            measured = {s.domain for s in data.eval if s.n_windows} | reference.keys()
            check_same_domains("reference_loss", reference, {d: w for d, w in weights.items() if d in measured})
        state = RunState(0, weights, dict.fromkeys(domains, 0), reference)
    else:
        check(cfg.resume, f"{out_dir} holds a run already ({folder.name}); go on with --resume, or choose another out_dir")
        state = read_state(folder)
        check(sorted(state.domain_weights) == sorted(domains), f"{folder} was trained on the domains "
              f"{', '.join(state.domain_weights)}, not on {', '.join(domains)}")
        before, now = read_json(out_dir / "config.json"), dataclasses.asdict(cfg)
        fixed = [n for n in now if n in ("seed", "seq_len", "split", "count", "pruning_modules") or n.startswith("target_")]
        odd = [n for n in fixed if json.dumps(now[n]) != json.dumps(before.get(n))]
        check(not odd, f"{out_dir} was begun with other {', '.join(odd)} (see config.json); a resumed run must keep them")
        check(state.step <= cfg.max_steps, f"{folder} is past max_steps = {cfg.max_steps} already")
    assets = [data.tokenizer_dir]
    if cfg.init_from:
        own = Path(cfg.init_from) / "assets"
        if any(own.glob("*token*")):
            check(load_tokenizer(own).fingerprint == data.train[0].tokenizer, f"{cfg.data_dir} was made with another "
                  f"tokenizer than the one in {own}; run prepare.py --tokenizer={own}")
            assets = []
        assets = [own, *assets]
    if is_main:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            (out_dir / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {out_dir}: {error.strerror}") from None
    return state, folder, assets


def read_state(folder: Path) -> RunState:
    """state.json of a checkpoint.  Raises UserError."""
    try:
        return RunState(**read_json(folder / "state.json"))
    except TypeError as error:
        raise UserError(f"{folder / 'state.json'} is not a state of this version: {error}") from None
