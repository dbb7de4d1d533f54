"""The frozen model that a run learns from beside its tokens: `teacher` and `kd_weight` of its settings."""

import os
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from run.processes import Processes, compile_layers, compiles, shard
from run.settings import TrainSettings, check
from run.weights import load_weights, read_model_config


def teacher_config(cfg: TrainSettings, student):
    """The teacher's shape, None without one.  student: the shape that learns.  Raises UserError."""
    if not cfg.teacher or cfg.kd_weight == 0:
        return None
    shape = read_model_config(cfg.teacher, type(student))
    check(not os.path.exists(os.path.join(cfg.teacher, "masks.safetensors")), f"teacher = {cfg.teacher} holds masks, which "
          "would be lost; run compact.py on it first")
    check(shape.vocab_size == student.vocab_size, f"teacher = {cfg.teacher} has a vocabulary of {shape.vocab_size} tokens, "
          f"not the {student.vocab_size} of the model that is to learn from it; take one with the same tokenizer")
    check(cfg.seq_len <= shape.context_length, f"seq_len = {cfg.seq_len} is longer than the context of teacher = "
          f"{cfg.teacher}, {shape.context_length} tokens; lower it")
    return shape


def open_teacher(cfg: TrainSettings, shape, model_class: type[nn.Module], processes: Processes) -> nn.Module | None:
    """The teacher, in the dtype of autocast and sharded as the model that learns is; None if shape is.

    Its `body`, called under no_grad, is what it is for.  Raises UserError.
    """
    if shape is None:
        return None
    with torch.device("meta"):
        model = model_class(shape, attention=cfg.attention, checkpointing="none").to(processes.dtype).requires_grad_(False)
    model = load_weights(shard(model, cfg, processes).to_empty(device=processes.device), Path(cfg.teacher)).eval()
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "body")  # or the weights would not be gathered
    if compiles(cfg, processes.device):
        compile_layers(model)
    return model
