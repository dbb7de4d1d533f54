"""Settings of every stage: a frozen dataclass, filled from its defaults, Python files and flags, and checked.

    python prune.py configs/x.py --learning_rate=3e-4 --resume

A user's mistake becomes one line on stderr and exit status 2: what, its value, what was expected, what to do.
"""

import ast
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import runpy
import signal
import sys
import time
import types
import typing
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


FilePath = typing.Annotated[str, "path"]  # a setting of this type names a file or folder: its ~ is expanded


class UserError(Exception):
    """Something the user can mend.  The message: what, its value, what was expected, what to do.  One line."""

    status = 2  # of the process


class Interrupted(UserError):
    """A signal stopped a run: a scheduler that sees this status may queue it again, to go on where it was."""

    status = 75  # EX_TEMPFAIL of sysexits.h


def check(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def lfs_pointer(head: bytes) -> str:
    """What is wrong with a file that begins so, if it only stands for one that Git LFS keeps; else ""."""
    pointer = head.startswith(b"version https://git-lfs.github.com/spec/")
    return "it is a pointer of Git LFS, not the file itself; run `git lfs pull` where it was cloned" if pointer else ""


@contextmanager
def user_errors():
    """Turn the ValueErrors of model, l0 and data, which name file or value already, into UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def setting_docs(cls: type) -> dict[str, str]:
    """The comment behind each field of a settings dataclass, its bases' included: the text of --help."""
    docs = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if found := re.match(r"    (\w+): [^#]*#\s*(.*)", line):
                docs[found[1]] = found[2]
    return docs


def describe(annotation) -> str:
    """An annotation as a user would say it: `int`, `float or None`, `"clipped" or "signed"`, `dict of str to float`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(json.dumps(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is dict:
        return f"dict of {describe(args[0])} to {describe(args[1])}"
    if origin is tuple:
        return f"tuple of {describe(args[0])}"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def conform(value, annotation):
    """`value` as the annotated type.  int -> float and list -> tuple are the only conversions.  Raises TypeError."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
    elif origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return conform(value, option)
            except TypeError:
                continue
    elif origin is dict and isinstance(value, dict):
        return {conform(k, args[0]): conform(v, args[1]) for k, v in value.items()}
    elif origin is tuple and isinstance(value, (list, tuple)):
        return tuple(conform(v, args[0]) for v in value)
    elif annotation is object:
        return value
    elif annotation is float and type(value) in (int, float) and not 1e308 < abs(value) < math.inf:  # an int may be too long
        return float(value)
    elif origin is None and type(value) is annotation and (annotation is not str or "\0" not in value):  # no path has one
        return value
    elif annotation is type(None) and value is None:
        return value
    raise TypeError


def parse_flag(text: str, annotation):
    """The value of `--name=text`: a Python literal, or the text itself where the setting may be a string.

    A text that starts as a dict does is no string where the setting may be a dict.  Raises TypeError.
    """
    try:
        return conform(ast.literal_eval(text), annotation)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if text.lstrip().startswith("{") and "dict" in describe(annotation):
            raise TypeError from None
        return conform(text, annotation)


def expanded(name: str, path: str) -> str:
    """A path with the home folder for its ~: bash expands none behind "=".  Raises UserError."""
    found = os.path.expanduser(path)
    check(not found.startswith("~"), f"{name} = {path}: there is no user of that name; write ./{path} if it is a folder's")
    return found


def written(name: str, annotation) -> str:
    """How a setting that is a dict or a tuple is written as a flag; "" for any other."""
    kind = describe(annotation)
    example = """{"a": 1, "b": 2}""" if "dict" in kind else """["a", "b"]""" if "tuple" in kind else ""
    return f"; write --{name}='{example}'" if example else ""


def read_config_file(path: str) -> dict[str, object]:
    """The names that a Python config file assigns, but those starting with an underscore.  Raises UserError."""
    check(path.endswith(".py"), f"argument {path!r} is neither a config file (.py) nor a setting, --name=value")
    check(os.path.isfile(path), f"config file {path} does not exist")
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise UserError(f"config file {path} does not run: {type(error).__name__}: {error}") from None
    return {k: v for k, v in values.items() if not k.startswith("_") and not inspect.ismodule(v)}


def parse_args(cls: type, argv: list[str]):
    """Settings from `FILE.py ... --name=value ...`: defaults, then files left to right, then flags.

    cls: a frozen dataclass whose fields are annotated and whose __post_init__ raises ValueError on a bad value.  Where it
    names a setting in `positional`, that takes every argument that is neither a flag nor a .py file.
    Returns an instance.  Raises UserError: unknown name (with the nearest known one), wrong type, bad value.
    """
    hints, docs = typing.get_type_hints(cls), setting_docs(cls)
    paths = {n for n, t in typing.get_type_hints(cls, include_extras=True).items() if FilePath in (t, *typing.get_args(t))}
    names, positional, bare_arguments = [f.name for f in dataclasses.fields(cls)], getattr(cls, "positional", ""), []
    if {"--help", "-h"} & set(argv):
        print(inspect.getmodule(cls).__doc__.strip() + "\n\nsettings: " + f"{positional.upper()} " * bool(positional)
              + "FILE.py ... --name=value ...")
        for f in dataclasses.fields(cls):
            default = "required" if f.default is dataclasses.MISSING else repr(f.default)
            print(f"  --{f.name}={default}  ({describe(hints[f.name])})\n        {docs.get(f.name, '')}")
        sys.exit(0)

    def known(name: str, where: str) -> None:
        near = difflib.get_close_matches(name, names, n=1)
        check(name in hints, f"unknown setting {name} in {where}"
              + (f"; did you mean {near[0]}?" if near else "; --help lists the settings"))

    values = {}
    flags = [a for a in argv if a.startswith("-")]
    for before, path in zip(["", *argv], argv):
        if path.startswith("-"):
            continue
        bare = before.removeprefix("--")
        taken = path.endswith(".py") or bool(positional)
        if before.startswith("--") and "=" not in before and (hints.get(bare) is not bool or not taken):
            known(bare, f"the flag {before}")
            raise UserError(f"flag {before} and {path!r} are two arguments; write {before}={path}")
        if positional and not path.endswith(".py"):
            bare_arguments.append(path)
            continue
        for name, value in read_config_file(path).items():
            known(name, path)
            try:
                values[name] = conform(value, hints[name])
            except TypeError:
                raise UserError(f"{name} = {value!r} in {path} is not {describe(hints[name])}") from None
    for flag in flags:
        name, equals, text = flag.removeprefix("--").partition("=")
        known(name, f"the flag {flag}")
        check(bool(equals) or hints[name] is bool, f"flag {flag} has no value; write {flag}=...")
        try:
            values[name] = parse_flag(text, hints[name]) if equals else True
        except TypeError:
            raise UserError(f"{name} = {text!r} is not {describe(hints[name])}{written(name, hints[name])}") from None
    if bare_arguments:
        several = describe(hints[positional]).startswith("tuple")
        check(several or len(bare_arguments) == 1, f"{positional} is one argument, not {' '.join(bare_arguments)}")
        values[positional] = tuple(bare_arguments) if several else bare_arguments[0]
    if missing := [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]:
        raise UserError(f"no value for {', '.join(missing)}: {docs.get(missing[0], '')}; give "
                        + (missing[0].upper() if missing[0] == positional else f"--{missing[0]}=..."))
    values |= {n: expanded(n, v) for n, v in values.items() if n in paths and isinstance(v, str)}
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from None


def run_stage(main: Callable, cls: type) -> None:
    """`main(settings)` from the command line.  A user's error is one line on stderr and exit status 2, or its own.

    torch is looked up, not imported, for the sake of stages that need none: prepare.py starts a process for each core.
    Under torchrun the first rank to exit has the others killed, so rank 0 speaks first: the others wait a moment, and
    speak only if rank 0 had nothing to say.
    """
    def in_process_group() -> bool:
        dist = sys.modules.get("torch.distributed")
        return dist is not None and dist.is_initialized()

    try:
        main(parse_args(cls, sys.argv[1:]))
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # else a folder that is closed to us, a name that is too long, a full disk
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, to end this rank now
        rank = int(os.environ.get("RANK", 0))
        if rank and not isinstance(error, Interrupted):
            time.sleep(5)
        if rank == 0 or not isinstance(error, Interrupted):
            print(f"{Path(sys.argv[0]).name}: " + f"rank {rank}: " * bool(rank) + " ".join(message.split()),
                  file=sys.stderr, flush=True)
        status = getattr(error, "status", 2)
        os._exit(status) if in_process_group() else sys.exit(status)  # a process group's threads can hang a clean exit
    except RuntimeError as error:
        if not in_process_group() or not any(name in str(error).lower() for name in ("gloo", "nccl")):
            raise
        print(f"{Path(sys.argv[0]).name}: rank {os.environ['RANK']}: another process died, or did not answer within "
              f"timeout_minutes: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(1)
    except KeyboardInterrupt as interrupt:
        print(f"{Path(sys.argv[0]).name}: {interrupt or 'stopped'}", file=sys.stderr, flush=True)
        os._exit(130) if in_process_group() else sys.exit(130)
    if in_process_group():
        sys.modules["torch.distributed"].barrier()  # together: a rank that leaves early breaks the others' connections
        sys.modules["torch.distributed"].destroy_process_group()


# ---- settings that both training stages share


@dataclass(frozen=True)
class TrainSettings:
    """What prune.py and pretrain.py have in common; each adds its own and sets other defaults."""

    data_dir: FilePath  # folder that prepare.py wrote
    out_dir: FilePath  # folder of this run: config.json, metrics.jsonl, step_*/
    split: str = "train"  # which of prepare.py's splits to train on
    verify_data: bool = True  # hold the token files against their checksums before the first step: a second or two a GB
    init_from: FilePath = ""  # model folder to start from: convert.py's, compact.py's, a step_* folder, or a run's newest
    teacher: FilePath = ""  # model folder, as init_from, of a frozen model to learn from beside the tokens; "": none
    kd_weight: float = 1.0  # w in the loss with a teacher, (1 - w) cross-entropy + w KL(teacher || model)
    resume: bool = False  # go on from the newest checkpoint in out_dir (from the start if there is none)

    domain_weights: dict[str, float] | FilePath = ""  # first share of each domain, sum 1, or a JSON file; "": equal
    reference_loss: dict[str, float] | FilePath = ""  # loss to reach, nats a token, of each domain, or a JSON file of it
    update: typing.Literal["doremi", "constant"] = "doremi"  # steer the shares by the losses, or keep them
    excess: typing.Literal["clipped", "signed"] = "clipped"  # loss above the reference: max(l - r, 0), or l - r
    min_weight: float = 0.0  # no domain's share falls below this
    on_exhausted: typing.Literal["wrap", "error"] = "wrap"  # a domain used up: new order and a warning, or stop

    seq_len: int = 4096  # tokens a sequence
    global_batch_size: int = 32  # sequences a step, over all ranks
    micro_batch_size: int | None = None  # sequences a forward pass of one rank; None: 4 (pretrain.py: 16), fewer to fit
    max_steps: int = 3200  # optimizer steps
    learning_rate: float = 1e-4  # peak, of the weights
    warmup_steps: int | None = None  # linear warm-up of every learning rate; None: 10% of max_steps (pretrain.py: 3%)
    min_lr_ratio: float = 0.1  # cosine down to this share of the peak
    weight_decay: float = 0.0  # of the weights; masks and multipliers never decay
    grad_clip: float = 1.0  # gradient norm, each parameter group by itself
    seed: int = 1234  # of data order, mask noise and fresh weights

    eval_interval: int = 50  # steps between evaluations; one comes before the first step
    eval_sequences: int = 500  # held-out sequences a domain, the same ones each time
    eval_between: int = 0  # so many of them at evaluations between the first and the last, in turn; 0: all
    eval_batch_size: int = 0  # sequences a forward pass of one rank in an evaluation; 0: micro_batch_size
    save_interval: int = 3200  # steps between checkpoints; the last step is always saved
    keep_last: int = 0  # delete all but so many of the newest checkpoints; 0: keep all
    keep_every: int = 0  # but never those of steps that divide by this; 0: no such step
    log_interval: int = 1  # steps between lines of metrics.jsonl
    max_skipped: int = 20  # skipped steps in a row, for a gradient that is not finite, that stop the run at a log line
    timeout_minutes: float = 10.0  # a process that waits longer than this for another one in a step ends the run
    logger: typing.Literal["none", "tensorboard", "wandb"] = "none"  # a second place for the metrics

    device: typing.Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    parallel: typing.Literal["ddp", "fsdp"] = "ddp"  # a copy of all on each device, or all sharded over them (FSDP2)
    dtype: typing.Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: bfloat16 from sm_80, else float32
    attention: typing.Literal["sdpa", "flash_attn"] = "sdpa"  # torch's own, or the flash-attn package (cuda, bfloat16)
    compile: typing.Literal["auto", "on", "off"] = "auto"  # torch.compile each layer; auto: on CUDA
    # what of a layer is computed again in the backward pass: nothing; all but products and attention, which costs little
    checkpointing: typing.Literal["none", "selective", "full"] = "selective"  # none, selective, or full: a third more time
    plan: int = 0  # say what the run will take on so many devices, without taking it, and stop

    shares = {"warmup_steps": 0.1}  # of max_steps: settings that are a number of steps, where none is given
    most_at_once = 4  # micro_batch_size where none is given

    def __post_init__(self):
        self.fill()
        positive = ("seq_len", "global_batch_size", "micro_batch_size", "max_steps", "eval_interval", "eval_sequences",
                    "save_interval", "log_interval", "learning_rate", "grad_clip", "max_skipped", "timeout_minutes")
        for name in positive:
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)} must be above 0")
        for name in (*self.shares, "weight_decay", "seed", "min_weight", "keep_last", "keep_every", "plan", "eval_between",
                     "eval_batch_size"):
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)} must not be negative")
        for name in ("learning_rate", "grad_clip", "weight_decay", "timeout_minutes"):
            require(math.isfinite(getattr(self, name)), f"{name} = {getattr(self, name)} must be finite")
        require(0 <= self.kd_weight <= 1, f"kd_weight = {self.kd_weight} must be between 0 and 1")
        require(self.teacher != "" or self.kd_weight == 1.0, f"kd_weight = {self.kd_weight} without a teacher; give one, or "
                "leave kd_weight out")
        for name in self.shares:
            require(getattr(self, name) <= self.max_steps, f"{name} = {getattr(self, name)} would not end within "
                    f"max_steps = {self.max_steps}; lower it, raise max_steps, or in a new run leave it out, "
                    f"for {self.shares[name]:.0%} of max_steps")
        require(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio = {self.min_lr_ratio} must be between 0 and 1")
        require(self.global_batch_size % self.micro_batch_size == 0,
                f"global_batch_size = {self.global_batch_size} does not divide by micro_batch_size = "
                f"{self.micro_batch_size}; choose a multiple, or leave micro_batch_size out")
        for name in ("domain_weights", "reference_loss"):
            if isinstance(values := getattr(self, name), dict):
                check_by_domain(name, values)
        if isinstance(self.domain_weights, dict):
            check_min_weight(self.min_weight, len(self.domain_weights))
            if isinstance(self.reference_loss, dict):
                check_same_domains("reference_loss", self.reference_loss, self.domain_weights)

    def fill(self) -> None:
        """What was not given (None): as a resumed run has it, else a share of max_steps, and a micro-batch that fits."""
        own = self.global_batch_size // max(1, self.plan or int(os.environ.get("WORLD_SIZE", 1)))  # sequences a rank
        began = began_with(self.out_dir) if self.resume else {}
        micro = began.get("micro_batch_size")
        fits = type(micro) is int and micro > 0 and own % micro == 0
        steps = {name: began.get(name) for name in self.shares}
        found = {name: steps[name] if type(steps[name]) is int else round(share * self.max_steps)
                 for name, share in self.shares.items()}
        found["micro_batch_size"] = micro if fits else max(n for n in range(1, self.most_at_once + 1) if own % n == 0)
        for name, value in found.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def rows_of_evaluation(self) -> int:
        return self.eval_batch_size or self.micro_batch_size

    @property
    def sequences_between(self) -> int:
        """Sequences a domain of an evaluation that is neither the first nor the last."""
        return min(self.eval_between or self.eval_sequences, self.eval_sequences)


def began_with(out_dir: str) -> dict[str, object]:
    """The settings of the run whose checkpoints are in out_dir; none if there are no checkpoints.  Raises UserError."""
    path = Path(out_dir) / "config.json"
    if not any(re.fullmatch(r"step_\d+", p.name) for p in path.parent.glob("step_*")):
        return {}
    found = read_json(path)
    check(isinstance(found, dict), f"{path} is not a JSON object; it must hold the run's settings")
    return found


def require(condition: bool, message: str) -> None:
    """ValueError(message) unless the condition holds; for __post_init__, where parse_args makes it a user error."""
    if not condition:
        raise ValueError(message)


def check_by_domain(name: str, values: dict[str, float]) -> None:
    """domain_weights must be shares that sum to 1, reference_loss finite losses.  Raises ValueError."""
    for domain, value in values.items():
        require(math.isfinite(value) and value >= 0, f"{name} of {domain} = {value} must be finite and not negative")
    total = sum(values.values())
    require(name != "domain_weights" or abs(total - 1) < 1e-3,
            f"domain_weights sum to {total:.6g}, not 1: {values}; scale them")


def check_min_weight(min_weight: float, n_domains: int) -> None:
    """Raises ValueError unless all domains can have so large a share."""
    require(min_weight * n_domains < 1, f"min_weight = {min_weight} times {n_domains} domains must stay below 1")


def check_same_domains(name: str, values: dict[str, float], weights: dict[str, float]) -> None:
    """Raises ValueError unless both name the same domains."""
    if odd := sorted(values.keys() ^ weights.keys()):
        near = difflib.get_close_matches(odd[0], (values | weights).keys() - set(odd[:1]), n=1)
        sides = {name: values.keys() - weights.keys(),
                 "domain_weights (if not given, data_dir)": weights.keys() - values.keys()}
        raise ValueError(f"{name} and domain_weights name different domains: "
                         + "; ".join(f"only {side} has {', '.join(sorted(names))}" for side, names in sides.items() if names)
                         + (f"; is {odd[0]} meant to be {near[0]}?" if near else ""))


def by_domain(name: str, value: dict[str, float] | str) -> dict[str, float]:
    """A setting that is a dict, or the path of a JSON file of one, or "" for an empty one.  Raises UserError."""
    if value == "":
        return {}
    with user_errors():
        try:
            values = conform(read_json(Path(value)) if isinstance(value, str) else value, dict[str, float])
        except TypeError:
            raise ValueError(f"{name} = {value}: the file must map domains to numbers") from None
        check_by_domain(name, values)
        return values


def hub_snapshot(folder: str | Path) -> Path:
    """A Hugging Face folder as it is; of a Hub cache's models--OWNER--NAME the only snapshot, which is said.  UserError."""
    found = sorted(p for p in Path(folder).glob("snapshots/*") if p.is_dir())
    if not found or os.path.isfile(os.path.join(folder, "config.json")):
        return Path(folder)
    check(len(found) == 1, f"{folder} is a Hub cache's folder of {len(found)} snapshots; give one of "
          f"{', '.join(map(str, found))}")
    print(f"{folder} is a Hub cache's folder: taking its snapshot {found[0].name}", flush=True)
    return found[0]


def export_config(folder: str | Path, *names: str) -> dict:
    """config.json of an export, which has whole numbers of these names.  Raises UserError."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    check(isinstance(values, dict) and all(type(values.get(name)) is int for name in names), f"{path} lacks a whole number "
          f"{' or '.join(names)}; use an export of convert.py --to_hf")
    return values


def read_json(path: Path):
    """Raises UserError if the file is not there or not JSON."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
