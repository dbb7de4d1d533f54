"""What a step costs, counted and not run: memory, products, the bytes that all else moves; and seconds on a GPU on paper.

The real training step runs on torch's fake tensors, which have shapes and no memory, and every operation is seen.  So the
figures follow model.py, whatever becomes of it.  Every layer costs the same, so a step of two layers and one of three tell
that of all.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from run.metrics import PEAK_FLOPS
from run.processes import clip_and_step, make_optimizer
from run.settings import TrainSettings


@dataclass(frozen=True)
class Machine:
    """A GPU by its data sheet."""

    memory: float  # bytes
    bandwidth: float  # bytes a second of its memory
    inside: float  # bytes a second and direction to the others of its node (NVLink)
    between: float = 50e9  # bytes a second and direction to other nodes: one InfiniBand port a GPU (NDR 400)


MACHINES = {"A100": Machine(80e9, 2.04e12, 300e9, 25e9),  # HDR 200
            "H100": Machine(80e9, 3.35e12, 450e9), "H200": Machine(141e9, 4.8e12, 450e9),
            "B200": Machine(180e9, 8e12, 900e9)}
# Assumed: the share of these rates that a run reaches, the GPUs of a node, and what its disk takes, bytes a second.
PRODUCTS, TRAFFIC, LINKS, NODE, DISK = 0.6, 0.8, 0.75, 8, 2e9
COUNTED_WHOLE = 3  # a model of more layers is counted from two and three
FITS = 0.85  # of a memory: the rest is the context's, and what the allocator loses


@dataclass(frozen=True)
class Parts:
    """What a stage trains, and what from."""

    model: Callable[..., nn.Module]  # model.Transformer
    masks: Callable[..., nn.Module] | None = None  # l0.L0, of a stage that has masks
    teacher: object | None = None  # the shape of a frozen model to learn from
    frozen: bool = False  # the masks alone are trained


@dataclass(frozen=True)
class Work:
    """What operations do."""

    flops: float = 0.0  # of products and causal attention, half of whose scores count
    traffic: float = 0.0  # bytes read and written by all other operations, each by itself
    fused: float = 0.0  # the same if all that lies between two products were one kernel: what a compiler has at best

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.traffic + other.traffic, self.fused + other.fused)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.traffic * times, self.fused * times)


def product_flops(name: str, inputs: list[Tensor]) -> float:
    """Operations of a product or of causal attention; 0 for what is neither.  name: aten's, as `mm.default`."""
    name = name.split(".")[0]
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        a, b = inputs[1:3] if "add" in name else inputs[:2]
        return 2.0 * a.numel() * b.shape[-1]
    if "scaled_dot_product" in name or "flash_attn" in name:
        q = inputs[1] if "backward" in name else inputs[0]  # (B, H, T, h); flash-attn's (B, T, H, h) has as many numbers
        T = max(q.shape[1:3]) if "flash_attn" in name else q.shape[2]
        return 2.0 * q.numel() * T * (2 if "backward" in name else 1)  # two products, halved; four backward
    return 0.0


def size(tensor: Tensor) -> int:
    """Bytes of a tensor, those of an expanded one once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def key_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Counter(TorchDispatchMode):
    """Counts the storages that live, whatever tensors operations return, and what the operations do, phase by phase."""

    def __init__(self):
        super().__init__()
        self.now, self.seen, self.phase = 0, set(), None
        self.peak: dict[str, int] = {}  # by phase, the most bytes alive
        self.work: dict[str, Work] = {}
        self.region, self.made, self.read, self.written = 0, {}, {}, set()  # see `fuse`

    def enter(self, phase: str) -> None:
        if phase not in self.peak:
            self.phase, self.peak[phase], self.work[phase] = phase, self.now, Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_iter(result) if isinstance(t, Tensor)]
        if outputs or func._schema.is_mutable:
            if self.phase is not None:
                self.work[self.phase] += self.count(func, args, kwargs or {}, outputs)
            for tensor in outputs:
                key, n = key_of(tensor), tensor.untyped_storage().nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += n
                    weakref.finalize(tensor.untyped_storage(), self.freed, key, n)
            if self.phase is not None:
                self.peak[self.phase] = max(self.peak[self.phase], self.now)
        return result

    def freed(self, key: int, n: int) -> None:
        self.now -= n
        for known in (self.seen, self.written):
            known.discard(key)
        for known in (self.made, self.read):
            known.pop(key, None)

    def count(self, func, args: tuple, kwargs: dict, outputs: list[Tensor]) -> Work:
        def tensors(*values) -> list[Tensor]:
            return [t for t in tree_iter(values) if isinstance(t, Tensor)]

        inputs, schema = tensors(*args, *(v for k, v in kwargs.items() if k != "out")), func._schema
        if flops := product_flops(func.__name__, inputs):
            moved = self.fuse(inputs, [], product=True)
            for tensor in (*outputs, *tensors(kwargs.get("out"))):
                self.made.pop(key_of(tensor), None)
            self.region += 1
            self.read.clear()
            return Work(flops, 0.0, moved)
        if schema.is_mutable:
            given = dict(zip((a.name for a in schema.arguments), args)) | kwargs
            outputs = tensors(*(given[a.name] for a in schema.arguments if a.is_write and a.name in given))
        else:
            there = set(map(key_of, inputs))
            outputs = [t for t in outputs if key_of(t) not in there]  # a view moves nothing
        if not outputs or func.__name__.startswith(("empty", "new_empty")):
            return Work()
        return Work(0.0, sum(map(size, (*inputs, *outputs))), self.fuse(inputs, outputs))

    def fuse(self, inputs: list[Tensor], outputs: list[Tensor], *, product: bool = False) -> float:
        """Bytes of an operation within one kernel from a product to the next: what comes from before is read once, and what
        is made here is written only if something later reads it, or a product.  A product's own bytes do not count.
        """
        moved = 0.0
        for tensor in inputs:
            key, whole = key_of(tensor), tensor.untyped_storage().nbytes()
            if self.made.get(key) == self.region and not product:
                continue
            if key in self.made and key not in self.written:
                self.written.add(key)
                moved += whole
            if not product:
                before = self.read.get(key, 0)
                self.read[key] = min(whole, before + size(tensor))  # its halves are read one by one
                moved += self.read[key] - before
        for tensor in outputs:
            self.made[key_of(tensor)] = self.region
            self.written.discard(key_of(tensor))
        return moved


@dataclass(frozen=True)
class StepCost:
    """One micro-batch of one device, where nothing is sharded: bytes, and what is done."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # alive at the end of a forward pass, for the backward pass
    peak: float  # of all, at any moment of a step
    evaluation_peak: float  # the same of an evaluation
    micro_step: Work  # forward and backward
    update: Work  # clipping, and the optimizer's step
    evaluation: Work  # a forward pass without gradient


def step_cost(shape, sets: dict, cfg: TrainSettings, parts: Parts, *, half: bool, checkpointing: str, gradients_stay: bool,
              dtype: torch.dtype = torch.float32) -> StepCost:
    """Count a training step.  shape: model.ModelConfig.  sets: l0.mask_sets, or {}.

    half: bf16 autocast.  gradients_stay: they are there before the forward pass, as in accumulation and in DDP's buckets.
    dtype: of the weights.
    """
    L = shape.n_layers
    n = (2, 3) if L > COUNTED_WHOLE else (L, L)
    found = [counted_step(dataclasses.replace(shape, n_layers=k), sets, cfg, parts, half, checkpointing, gradients_stay,
                          dtype) for k in n]

    def at_all_layers(values: tuple) -> float:
        two, three = values
        return two + (L - 2) * (three - two) if L > COUNTED_WHOLE else two

    numbers, peaks, works = (list(kind) for kind in zip(*found))
    # Between the ends, a layer's peak lies between theirs: each has one layer's gradients more and activations less.
    ends = [("forward",) * 2, ("loss",) * 2, tuple(f"layer {k - 1}" for k in n), ("layer 0",) * 2, ("embedding",) * 2,
            ("optimizer",) * 2]
    peak = max(at_all_layers([p[name] for p, name in zip(peaks, names)]) for names in ends
               if all(name in p for p, name in zip(peaks, names)))  # no gradient comes to an embedding that is frozen

    def work(kinds: Callable[[str], bool]) -> Work:
        sums = [sum((w for phase, w in each.items() if kinds(phase)), Work()) for each in works]
        return Work(*(at_all_layers([getattr(s, f.name) for s in sums]) for f in dataclasses.fields(Work)))

    return StepCost(*(at_all_layers([each[i] for each in numbers]) for i in range(4)), peak,
                    at_all_layers([p["evaluation"] for p in peaks]),
                    work(lambda phase: phase not in ("optimizer", "evaluation")), work("optimizer".__eq__),
                    work("evaluation".__eq__))


def counted_step(shape, sets: dict, cfg: TrainSettings, parts: Parts, half: bool, checkpointing: str, gradients_stay: bool,
                 dtype: torch.dtype) -> tuple[tuple[int, int, int, int], dict[str, int], dict[str, Work]]:
    """(bytes of weights, gradients, optimizer, activations; most bytes by phase; work by phase) of all layers of a shape."""
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
        model = made_in(dtype, parts.model, shape, checkpointing)
        model.requires_grad_(not parts.frozen)
        weights, masks = counter.now, parts.masks(sets) if sets else None
        own = [p for p in model.parameters() if p.requires_grad]
        trained = [*own, *(p for p in (masks.parameters() if masks else ()) if p.requires_grad)]
        gradients = weights if own else 0
        optimizer = make_optimizer([dict(name="weights", params=own, lr=1.0)]
                                   + (masks.parameter_groups(mask_lr=1.0, multiplier_lr=1.0) if masks else []))
        for again in range(1 + gradients_stay):
            for p in trained:
                p.grad = torch.zeros_like(p)
            if not again:
                clip_and_step(optimizer, 1.0, 1.0)  # makes the optimizer's state
        held = counter.now
        optimizer_bytes = held - weights - gradients * gradients_stay

        def enter_at(module: nn.Module, phase: str) -> None:  # when the gradient of its output is there
            def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
                if output.requires_grad:
                    output.register_hook(lambda _: counter.enter(phase))
            module.register_forward_hook(hook)

        for i, layer in enumerate(model.model["layers"]):
            enter_at(layer, f"layer {i}")
        enter_at(model.model["embed_tokens"], "embedding")
        def tokens_of(rows: int) -> Tensor:
            return torch.zeros(rows, cfg.seq_len, dtype=torch.int64)

        counter.enter("evaluation")
        with torch.no_grad(), autocast:
            tokens = tokens_of(cfg.rows_of_evaluation)
            model(tokens, tokens, masks.deterministic() if masks else None, reduction="none")
        tokens, teacher = tokens_of(cfg.micro_batch_size), parts.teacher
        counter.enter("forward")
        with autocast:
            z = masks.sample(0, 0, 0) if masks else None
            if teacher is None:
                loss = model(tokens, tokens, z)
            else:  # its head has no bytes here: they are its weights'
                x = torch.zeros(*tokens.shape, teacher.hidden_size, dtype=compute_dtype(half))
                loss = model(tokens, tokens, z, teacher=(x, x.new_zeros(()).expand(teacher.vocab_size, x.shape[-1])),
                             kd_weight=cfg.kd_weight)["loss"]
                del x
        activations = counter.now - held
        counter.enter("loss")
        loss.backward()
        if masks:
            masks.finish_gradients_(1, warmup=1)
        del loss
        counter.enter("optimizer")
        clip_and_step(optimizer, 1.0, 1.0)
        return (weights, gradients, optimizer_bytes, activations), counter.peak, counter.work


def compute_dtype(half: bool) -> torch.dtype:
    return torch.bfloat16 if half else torch.float32


def made_in(dtype: torch.dtype, model: Callable[..., nn.Module], shape, checkpointing: str) -> nn.Module:
    """A model whose weights are of that dtype from the start, as fake ones must be."""
    torch.set_default_dtype(dtype)
    try:
        return model(shape, checkpointing=checkpointing)
    finally:
        torch.set_default_dtype(torch.float32)


def teacher_cost(teacher, cfg: TrainSettings, parts: Parts, half: bool) -> tuple[Work, int]:
    """(What the teacher does of a micro-batch but for its head's product; the most bytes alive then beside its weights.)"""
    L, found = teacher.n_layers, []
    for k in (2, 3) if L > COUNTED_WHOLE else (L, L):
        with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter, torch.no_grad():
            model = made_in(compute_dtype(half), parts.model, dataclasses.replace(teacher, n_layers=k), "none")
            before = counter.now
            counter.enter("teacher")
            model.body(torch.zeros(cfg.micro_batch_size, cfg.seq_len, dtype=torch.int64))
            found.append((counter.work["teacher"], counter.peak["teacher"] - before))
    (two, least), (three, most) = found
    return two + (three + two * -1.0) * max(0, L - 2 if L > COUNTED_WHOLE else 0), max(least, most)


def with_teacher(bytes_of: dict[str, float], m: StepCost, cfg: TrainSettings, parts: Parts,
                 devices: int) -> tuple[dict[str, float], StepCost]:
    """What `of_student` found, and a teacher beside it: its weights (sharded: its share, and what is gathered), its work."""
    shape, half = parts.teacher, is_half(cfg)
    n = numbers = shape.n_params()
    if cfg.parallel == "fsdp" and devices > 1:
        layer, rest = layer_and_rest(shape)
        numbers = n / devices + 2 * layer + rest
    work, activations = teacher_cost(shape, cfg, parts, half)
    held = sum(bytes_of[name] for name in ("weights", "gradients", "optimizer"))
    weights = numbers * (2 if half else 4)
    peak = max(bytes_of.pop("peak"), held + activations) + weights
    return bytes_of | {"teacher": weights, "peak": peak}, dataclasses.replace(m, micro_step=m.micro_step + work)


def is_half(cfg: TrainSettings) -> bool:
    """Whether a run on GPUs computes in bf16."""
    return cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and cfg.device in ("auto", "cuda"))


def is_compiled(cfg: TrainSettings) -> bool:
    """Whether a run on GPUs compiles its layers."""
    return cfg.compile == "on" or (cfg.compile == "auto" and cfg.device in ("auto", "cuda"))


def as_compiled(m: StepCost, shape, cfg: TrainSettings, half: bool) -> StepCost:
    """A step with selective checkpointing, if its layers are compiled: by its own choice the compiler keeps one more row of
    d and one of f for each token and layer.  Found at 1.3B and 370M (docs/gpu.md); right with twice the sequences, too.
    """
    kept = cfg.micro_batch_size * cfg.seq_len * shape.n_layers * (shape.hidden_size + shape.intermediate_size) * (
        2 if half else 4)
    return dataclasses.replace(m, activations=m.activations + kept, peak=m.peak + kept)


def per_device(shape, sets: dict, cfg: TrainSettings, parts: Parts, devices: int, *,
               checkpointing: str) -> tuple[dict[str, float], StepCost]:
    """Bytes on each device: weights, gradients, optimizer, gathered (by FSDP, of the others), activations, and the peak of
    training and evaluation.  And the step that they are counted from.
    """
    bytes_of, m = of_student(shape, sets, cfg, parts, devices, checkpointing)
    return with_teacher(bytes_of, m, cfg, parts, devices) if parts.teacher else (bytes_of, m)


def layer_and_rest(shape) -> tuple[float, float]:
    """Parameters of a layer, and of the embedding and the head together."""
    rest = shape.vocab_size * shape.hidden_size * (2 - shape.tie_embeddings)
    return (shape.n_params() - rest) / shape.n_layers, rest


def of_student(shape, sets: dict, cfg: TrainSettings, parts: Parts, devices: int,
               checkpointing: str) -> tuple[dict[str, float], StepCost]:
    """`per_device` but for the teacher."""
    half, sharded = is_half(cfg), cfg.parallel == "fsdp" and devices > 1
    compiled = is_compiled(cfg) and checkpointing != "full"  # none is then what selective is: see compile_layers
    m = step_cost(shape, sets, cfg, parts, half=half, checkpointing="selective" if compiled else checkpointing,
                  gradients_stay=devices > 1 or cfg.global_batch_size > cfg.micro_batch_size,
                  dtype=compute_dtype(half) if sharded else torch.float32)
    if compiled:
        m = as_compiled(m, shape, cfg, half)
    if not sharded:
        return {"weights": m.weights, "gradients": m.gradients, "optimizer": m.optimizer, "gathered": 0,
                "activations": m.activations, "peak": max(m.peak, m.evaluation_peak)}, m
    # FSDP: weights come whole in the dtype of autocast, two layers (one computing, one on its way) with embedding and head;
    # one gradient is whole in fp32.  What a step of one device needs beside weights, gradients and state is not shared.
    layer, rest = layer_and_rest(shape)
    share, trained = 4 * shape.n_params() / devices, not parts.frozen
    fixed = {"weights": share, "gradients": share * trained, "optimizer": 2 * share * trained,
             "gathered": (2 * layer + rest) * (2 if half else 4) + 4 * max(layer, rest) * trained}
    not_shared = max(m.peak, m.evaluation_peak) - m.weights - m.gradients - m.optimizer
    return fixed | {"activations": m.activations, "peak": sum(fixed.values()) + not_shared}, m


def operations(shape, sets: dict, cfg: TrainSettings, parts: Parts) -> float:
    """Of products and attention a token: those of the formula, and a forward pass of the teacher; if only masks are trained
    those of a step that is counted, since of frozen weights only the masked ones take a gradient.
    """
    if parts.frozen:
        _, step = per_device(shape, sets, cfg, parts, 1, checkpointing="none")
        return step.micro_step.flops / (cfg.micro_batch_size * cfg.seq_len)
    teacher = parts.teacher.train_flops_per_token(cfg.seq_len) / 3 if parts.teacher else 0.0
    return shape.train_flops_per_token(cfg.seq_len) + teacher


def evaluations(cfg: TrainSettings) -> tuple[int, int]:
    """(how many evaluations a run has, held-out sequences of all of them a domain)."""
    n = math.ceil(cfg.max_steps / cfg.eval_interval) + 1
    return n, min(n, 2) * cfg.eval_sequences + max(0, n - 2) * cfg.sequences_between


def run_seconds(shape, cfg: TrainSettings, cost: StepCost, devices: int, gpu: str, *, domains: int,
                checkpoint_bytes: int, parts: Parts) -> dict[str, float]:
    """Seconds of a whole run by what takes them, on paper.  gpu: a key of MACHINES.

    "in all" counts of the messages only those that last longer than the computation that hides them.
    """
    machine, n, steps = MACHINES[gpu], shape.n_params(), cfg.max_steps
    micro_steps = steps * cfg.global_batch_size / (cfg.micro_batch_size * devices)
    sharded, number = cfg.parallel == "fsdp" and devices > 1, 2 if is_half(cfg) else 4
    link = LINKS * (machine.inside if devices <= NODE else machine.between)
    sent = (devices - 1) / devices * n / link  # seconds of one byte of each parameter

    def seconds(work: Work) -> tuple[float, float]:
        moved = work.fused if is_compiled(cfg) else work.traffic
        peak = PEAK_FLOPS[gpu] * (1.0 if is_half(cfg) else 0.5)  # fp32 as TF32 at best
        return work.flops / (PRODUCTS * peak), moved / (TRAFFIC * machine.bandwidth)

    products, traffic = (micro_steps * s for s in seconds(cost.micro_step))
    # FSDP gathers for the forward and again for the backward pass, and scatters fp32 gradients; DDP all-reduces those once
    scattered = 0 if parts.frozen else 4
    messages = micro_steps * sent * (2 * number + scattered) if sharded else steps * sent * 2 * scattered
    if parts.teacher is not None and sharded:
        messages += micro_steps * sent * number * parts.teacher.n_params() / n
    update = steps * cost.update.traffic / (TRAFFIC * machine.bandwidth) / (devices if sharded else 1)  # never compiled
    batches = math.ceil(domains * evaluations(cfg)[1] / (cfg.rows_of_evaluation * devices))
    evaluation = batches * max(sum(seconds(cost.evaluation)), sent * number * sharded)
    saves = math.ceil(steps / cfg.save_interval)
    found = {"products": products, "all else": traffic, "messages": messages, "update": update, "evaluations": evaluation,
             "checkpoints": saves * 2 * checkpoint_bytes / DISK}  # written and read back
    return found | {"in all": sum(found.values()) - min(messages, products + traffic)}


def candidates(shape, sets: dict, cfg: TrainSettings, parts: Parts, devices: int,
               kinds: tuple[str, ...]) -> Iterator[tuple[TrainSettings, float, StepCost]]:
    """Settings that could be the fastest that fit: (with their micro_batch_size and checkpointing, peak bytes, step)."""
    most = cfg.global_batch_size // devices
    for kind in kinds:
        for micro in sorted((m for m in range(1, most + 1) if most % m == 0), reverse=True):
            each = dataclasses.replace(cfg, micro_batch_size=micro, checkpointing=kind)
            bytes_of, cost = per_device(shape, sets, each, parts, devices, checkpointing=kind)
            yield each, bytes_of["peak"], cost
            if bytes_of["peak"] <= FITS * min(m.memory for m in MACHINES.values()):
                break  # a smaller one is slower
