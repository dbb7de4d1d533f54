"""The training steps that tools/bench.py times: the stages' own, that of transformers, and the bare matrix products.

cfg is its BenchSettings throughout.  Every step tells a stopwatch when each of its phases ends.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pretrain
import prune
from data import Sampler, open_domains
from l0 import L0, mask_sets
from model import Transformer
from run.processes import Processes, clip_and_step, compiles, lr_factor, make_optimizer, wrap


class Stopwatch:
    """Seconds between marks, by what ends there; on CUDA by events, so that nothing waits within a step."""

    def __init__(self, device: torch.device, clock: str = "wall"):
        self.cuda, self.now = device.type == "cuda", time.perf_counter if clock == "wall" else time.process_time

    def start(self) -> None:
        self.marks = []
        self.mark("")

    def mark(self, what: str) -> None:
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = self.now()
        self.marks.append((what, now))

    def seconds(self) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize()
        found = {}
        for (_, before), (what, now) in zip(self.marks, self.marks[1:]):
            found[what] = found.get(what, 0) + (before.elapsed_time(now) / 1000 if self.cuda else now - before)
        return found


SHARES, FROM_THE_START = {"a": 0.5, "b": 0.5}, {"a": 0, "b": 0}  # domain weights and cursors
Step = Callable[[int], None]  # one training step; its argument is the number of the step


def stage_step(cfg, processes: Processes, sampler: Sampler, watch: Stopwatch, *, masked: bool) -> Step:
    """train_step of prune.py, towards half of each dimension, or of pretrain.py, on torch's own fresh weights."""
    shape, settings = cfg.shape, cfg.train_settings(masked)
    with processes.device:  # a GPU draws them a hundred times faster than the CPU
        model = Transformer(shape, attention=cfg.attention, checkpointing=cfg.checkpointing)
    groups, masks = [dict(name="weights", params=list(model.parameters()), lr=settings.learning_rate)], []
    if masked:
        halves = {name: max(1, getattr(shape, name) // 2)
                  for name in ("hidden_size", "n_layers", "n_heads", "n_kv_heads", "intermediate_size")}
        masks = [L0(mask_sets(shape, dataclasses.replace(shape, **halves))).to(processes.device)]
        groups += masks[0].parameter_groups(mask_lr=1.0, multiplier_lr=1.0)
    optimizer = make_optimizer(groups)
    optimizer.register_step_pre_hook(lambda *_: watch.mark("clip"))
    wrapped, train_step = wrap(model, settings, processes), prune.train_step if masked else pretrain.train_step

    def step(i: int) -> None:
        batch = sampler.draw(i, SHARES, FROM_THE_START)
        train_step(settings, processes, wrapped, *masks, optimizer, sampler, batch, i, watch.mark)

    return step


def hf_step(cfg, processes: Processes, sampler: Sampler, watch: Stopwatch) -> Step:
    """The dense step with transformers' model instead of ours; all else is the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings, shape = cfg.train_settings(), cfg.shape
    with processes.device:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_kv_heads, head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size, max_position_embeddings=shape.context_length, use_cache=False,
            tie_word_embeddings=False, attn_implementation="sdpa"))
    if cfg.checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiles(settings, processes.device):
        for layer in model.model.layers:  # one by one, as ours: the whole model in one graph compiles for minutes
            layer.compile(dynamic=False)
    optimizer = make_optimizer([dict(name="weights", params=list(model.parameters()), lr=settings.learning_rate)])
    optimizer.register_step_pre_hook(lambda *_: watch.mark("clip"))

    def step(i: int) -> None:
        batch = sampler.draw(i, SHARES, FROM_THE_START)
        tokens, targets = sampler.load(batch, slice(None), processes.device)
        watch.mark("data")
        with processes.autocast():
            loss = model(tokens, labels=targets, shift_labels=targets).loss
        watch.mark("forward")
        loss.backward()
        watch.mark("backward")
        clip_and_step(optimizer, lr_factor(i, settings), settings.grad_clip)
        watch.mark("optimizer")

    return step


def gemm_step(cfg, processes: Processes, watch: Stopwatch) -> Step:
    """The matrix products of a dense step alone, into buffers that are there already: what the machine allows."""
    def filled(*shape: int) -> Tensor:
        return torch.randn(shape, device=processes.device, dtype=processes.dtype)

    products = []  # (times, a, b, a @ b)
    for times, rows, inner, columns in product_shapes(cfg):
        products.append((times, filled(*rows, inner), filled(*rows[:-1], inner, columns), filled(*rows, columns)))

    def step(i: int) -> None:
        for times, a, b, out in products:
            for _ in range(times):
                torch.matmul(a, b, out=out)
        watch.mark("products")

    return step


def product_shapes(cfg) -> list[tuple[int, tuple[int, ...], int, int]]:
    """(times, rows, inner, columns) of every product of a step; attention's with half of the keys, since half are masked."""
    s, N = cfg.shape, cfg.micro_batch_size * cfg.seq_len  # tokens
    q, kv = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    shapes = []
    for times, i, o in ((s.n_layers, s.hidden_size, q), (2 * s.n_layers, s.hidden_size, kv), (s.n_layers, q, s.hidden_size),
                        (2 * s.n_layers, s.hidden_size, s.intermediate_size),
                        (s.n_layers, s.intermediate_size, s.hidden_size), (1, s.hidden_size, s.vocab_size)):
        shapes += [(times, (N,), i, o), (times, (N,), o, i), (times, (o,), N, i)]  # output, gradient of input, of weight
    batch, T, h = cfg.micro_batch_size * s.n_heads, cfg.seq_len, s.head_dim
    # q @ k.T and the gradient of the probabilities; probabilities @ v and the gradient of q; those of k and v
    shapes += [(2 * s.n_layers, (batch, T), h, T // 2), (2 * s.n_layers, (batch, T), T // 2, h),
               (2 * s.n_layers, (batch, T // 2), T, h)]
    return shapes


def write_tokens(folder: str, cfg) -> None:
    """Random tokens of two domains, in prepare.py's format."""
    for domain in "ab":
        path = Path(folder) / domain / "train.bin"
        path.parent.mkdir()
        n = 64 * cfg.seq_len + 1
        np.random.default_rng(0).integers(cfg.vocab_size, size=n).astype(np.uint32).tofile(path)
        path.with_suffix(".json").write_text(json.dumps(dict(
            format=1, domain=domain, split="train", dtype="uint32", n_tokens=n, n_documents=1, n_bytes=4 * n,
            vocab_size=cfg.vocab_size, tokenizer="none", sha256="")))


def build(cfg, processes: Processes, variant: str, folder: str, watch: Stopwatch) -> Step:
    if variant == "gemm":
        return gemm_step(cfg, processes, watch)
    sampler = Sampler(open_domains(folder, ["a", "b"], "train", cfg.seq_len),
                      global_batch_size=cfg.micro_batch_size * processes.world, seed=0)
    if variant == "hf":
        return hf_step(cfg, processes, sampler, watch)
    return stage_step(cfg, processes, sampler, watch, masked=variant == "masked")
