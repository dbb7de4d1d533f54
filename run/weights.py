"""Model folders, and the safetensors files in them.  Apart from checkpoint.py because every stage reads and writes them,
also those that train nothing.

A model folder holds model.safetensors, model_config.json and assets/ (files carried along unread: the tokenizer, the
source's Hugging Face config).  A checkpoint out_dir/step_0000400/ (checkpoint.py) is one too, with more beside it and a
manifest.json.  Tensors are read and written one at a time, and nothing is pickled.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from run.settings import UserError, check, lfs_pointer

WRITE_BYTES = 1 << 18  # at once: a write of a whole tensor takes up to twice the time (measured on ext4, Linux 6.18)
DTYPE_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_model_config(folder: str | Path, config_class: type, name: str = "model_config.json"):
    """The ModelConfig of a model folder, or a prune.py checkpoint's "target_config.json".  Raises UserError."""
    path = Path(folder) / name
    check(os.path.isdir(folder), f"model folder {folder} " + ("is a file" if os.path.exists(folder) else "does not exist"))
    if not path.is_file():
        theirs, hint = Path(folder) / "config.json", "convert.py makes one from a Hugging Face checkpoint"
        if theirs.is_file() and '"model_type"' in theirs.read_text(errors="replace"):
            hint = f"it is a Hugging Face folder; convert it first: convert.py --from_hf={folder} --out_dir=..."
        raise UserError(f"{folder} has no {name}, so it is none of our model folders; {hint}")
    try:
        return config_class.from_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def newest_in(folder: str | Path) -> Path:
    """A model folder as it is; of a run's folder the newest checkpoint, which rank 0 says."""
    is_run = os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "model_config.json"))
    newest = latest_checkpoint(folder) if is_run else None
    if newest is not None and int(os.environ.get("RANK", 0)) == 0:
        print(f"{folder} is a run's folder: taking its newest checkpoint, {newest.name}", flush=True)
    return newest or Path(folder)


def at_newest(settings):
    """TrainSettings whose model folders are `newest_in` those that were given."""
    given = {name: path for name in ("init_from", "teacher") if (path := getattr(settings, name))}
    return dataclasses.replace(settings, **{name: str(newest_in(path)) for name, path in given.items()})


def sha256(path: Path) -> str:
    """Of a file's bytes as the disk has them, not the page cache, where the system can be asked for that."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        drop_cache(file.fileno())
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def drop_cache(handle: int) -> None:
    """Have a file's next reads come from the disk, where the system can be asked for that."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file.  Raises UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise no_safetensors(path, error) from None


def no_safetensors(path: Path, error: Exception) -> UserError:
    head = b""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(64)
    return UserError(f"{path}: {lfs_pointer(head)}" if lfs_pointer(head) else
                     f"{path} cannot be read as safetensors: {error}")


def check_names(where: str | Path, got: Set[str], want: Set[str]) -> None:
    """Raises UserError unless a file holds exactly the tensors that it should."""
    missing, unexpected = sorted(want - got), sorted(got - want)
    check(not missing and not unexpected, f"{where}: missing tensors {missing[:3]} ({len(missing)}), "
          f"unexpected tensors {unexpected[:3]} ({len(unexpected)})")


def tensor_reader(path: Path, shapes: dict[str, tuple[int, ...]]) -> Callable[[str], Tensor]:
    """What reads one tensor of a safetensors file by its name.  Names and shapes must be exactly `shapes`."""
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
    except (SafetensorError, OSError) as error:
        raise no_safetensors(path, error) from None
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


def is_finite(tensor: Tensor) -> bool:
    """Without the copy that isfinite() of the whole tensor would make."""
    return all(v.isfinite() for v in tensor.aminmax())


def check_finite(tensor: Tensor, path: Path, name: str) -> None:
    check(is_finite(tensor), f"{path}: {name} holds NaN or infinite values")


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


def header(shapes: dict[str, torch.Size], dtypes: dict[str, torch.dtype]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What a safetensors file begins with, and from where to where in the file each tensor's bytes lie.

    The format is a length, a JSON header and the bytes (https://github.com/huggingface/safetensors#format).
    """
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        entries[name] = {"dtype": DTYPE_CODES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers lie aligned
    begin = struct.pack("<Q", len(text)) + text
    return begin, {n: tuple(len(begin) + at for at in entries[n]["data_offsets"]) for n in shapes}


def pieces(tensor: Tensor) -> Iterator[np.ndarray]:
    """The bytes of a contiguous tensor of the CPU, WRITE_BYTES at a time."""
    for part in tensor.flatten().view(torch.uint8).split(WRITE_BYTES):
        yield part.numpy()


def write_tensors(path: Path, shapes: dict[str, torch.Size], dtypes: dict[str, torch.dtype],
                  load: Callable[[str], Tensor]) -> None:
    """A safetensors file of load(name) for each name, one tensor in memory at a time, where save_file wants all at once."""
    with path.open("wb") as file:
        file.write(header(shapes, dtypes)[0])
        for name in shapes:
            for piece in pieces(load(name).detach().to("cpu", dtypes[name]).contiguous()):
                file.write(piece)


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`; of a sharded one the part that this rank keeps, without communication."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: fill the yielded one; it is synced, then renamed to `path`.

    Raises UserError if `path` exists or cannot be written; on any error nothing is left behind.
    """
    path = Path(path)
    check(not path.exists(), f"{path} exists already; remove it or choose another name")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with written(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for each in [*temporary.rglob("*"), temporary]:
                fsync(each)
            os.rename(temporary, path)
            fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_assets(folder: Path, config, assets: list[Path]) -> None:
    """A model folder without its weights.  assets: folders of files to carry along unread; of one name the first counts."""
    (folder / "model_config.json").write_text(config.to_json())
    for source in reversed([a for a in assets if a.is_dir()]):
        shutil.copytree(source, folder / "assets", dirs_exist_ok=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: more of them wait for each other over the pages of a mapped file, and take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- what a checkpoint has besides: its place, and its manifest


def all_checkpoints(out_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first.  A folder whose name has not been committed is none."""
    return sorted((p for p in Path(out_dir).glob("step_*") if re.fullmatch(r"step_\d{7,}", p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def let_go(steps: list[int], keep_last: int, keep_every: int) -> list[int]:
    """Of a run's checkpoints, oldest first, those to delete: all but the newest keep_last (0: none goes) and every multiple
    of keep_every (0: no step is one).
    """
    return [s for s in steps[:-keep_last] if not keep_every or s % keep_every] if keep_last else []


def latest_checkpoint(out_dir: str | Path) -> Path | None:
    """The checkpoint with the highest step, damaged or not, or None."""
    return next(reversed(all_checkpoints(out_dir)), None)


def tensor_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """From where to where in a safetensors file each tensor's bytes lie, and its header's as "".  Raises ValueError."""
    with path.open("rb") as file:
        length, = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > path.stat().st_size:
            raise ValueError("no header")
        entries = json.loads(file.read(length))
    at = {n: [8 + length + x for x in e["data_offsets"]] for n, e in entries.items() if n != "__metadata__"}
    return {"": (0, 8 + length)} | {name: (start, end) for name, (start, end) in at.items()}


def checksums(path: Path, ranges: dict[str, tuple[int, int]]) -> dict[str, str]:
    """SHA-256 of each of these ranges of a file, as `sha256` reads it; in threads, which hash side by side."""
    with path.open("rb", buffering=0) as file:
        drop_cache(file.fileno())

        def digest(span: tuple[int, int]) -> str:
            found, (at, end) = hashlib.sha256(), span
            while block := os.pread(file.fileno(), min(1 << 22, end - at), at):
                found.update(block)
                at += len(block)
            return found.hexdigest()

        with ThreadPoolExecutor(4) as pool:
            return dict(zip(ranges, pool.map(digest, ranges.values())))


def write_manifest(folder: Path, tensors: dict[str, dict[str, str]]) -> None:
    """manifest.json: size and SHA-256 of every file in it.  tensors: of a safetensors file `checksums` of its header, named
    "", and of each tensor, instead of the file's, which several processes could not find together.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        found = {"tensors": dict(sorted(tensors[name].items()))} if name in tensors else {"sha256": sha256(path)}
        files[name] = {"bytes": path.stat().st_size} | found
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "files": files}, indent=1) + "\n")


def damage(folder: Path, *, unread: tuple[str, ...] = ()) -> str:
    """What is wrong with a checkpoint by its manifest: a file missing, of another size or checksum; "" if nothing is.

    unread: files that do not matter.  Raises UserError if the disk does not answer: that is no damage.
    """
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name, want in files.items():
            if name in unread:
                continue
            path, differs = folder / name, f"{name} differs from its checksum in manifest.json"
            if (size := path.stat().st_size) != want["bytes"]:
                return f"{name} has {size} bytes, not the {want['bytes']} of manifest.json"
            if "tensors" not in want:  # a small file, or of a checkpoint written before tensors had checksums of their own
                if sha256(path) != want["sha256"]:
                    return differs
                continue
            try:
                ranges = tensor_ranges(path)
            except (ValueError, KeyError, TypeError, AttributeError):
                return differs
            if ranges.keys() != want["tensors"].keys():
                return differs
            if wrong := [n for n, found in checksums(path, ranges).items() if found != want["tensors"][n]]:
                return f"{differs} ({wrong[0] or 'header'})"
        return ""
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is damaged: {type(error).__name__} {error}"


@contextmanager
def verified(folder: str | Path) -> Iterator[None]:
    """Hold a checkpoint against its manifest, in a thread, while its weights are used; any other folder is not looked at.

    Raises UserError at the end if it is damaged.
    """
    if not folder or not (Path(folder) / "manifest.json").exists():
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(damage, Path(folder), unread=("optimizer.safetensors",))
        yield
        wrong = verdict.result()
    check(wrong == "", f"{folder} is damaged: {wrong}; take an earlier checkpoint, or remove manifest.json if you changed "
          "it yourself")
