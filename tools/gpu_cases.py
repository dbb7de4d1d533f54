"""The checks of tools/gpu_check.py, one function each, on any device: where a GPU's kernels could differ from the CPU's.

Each returns what it found, as text, and raises AssertionError if that is wrong.  tests/tools/test_gpu.py runs them too.
"""

import dataclasses
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import compact
import prune
from l0 import L0, mask_sets
from model import ModelConfig, Transformer, init_weights
from run.processes import Processes, shard, start_processes, wrap
from run.weights import latest_checkpoint, load_weights, read_model_config, write_assets, write_tensors
from tools.bench import BenchSettings
from tools.bench_steps import Stopwatch, build, write_tokens

SMALL = ModelConfig(vocab_size=2048, hidden_size=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64,
                    intermediate_size=688)
HALF = dataclasses.replace(SMALL, hidden_size=128, n_layers=3, n_heads=2, n_kv_heads=1, intermediate_size=344)


def close(what: str, a: Tensor, b: Tensor, tolerance: float) -> str:
    """The largest difference by the largest magnitude, as text.  Raises AssertionError beyond the tolerance."""
    a, b = a.detach().double(), b.detach().double()
    found = float((a - b).abs().max() / b.abs().max())
    assert found <= tolerance, f"{what}: they differ by {found:.2e} of the largest, more than {tolerance:.0e}"
    return f"{what}: {found:.1e}"


def fresh(device: torch.device, **options) -> Transformer:
    model = Transformer(SMALL, **options).to(device)
    init_weights(model, seed=0)
    return model


def masks_and_tokens(device: torch.device) -> tuple[dict, Tensor]:
    """Masks at the target's counts with soft values, and tokens [4, 256]."""
    l0, generator = L0(mask_sets(SMALL, HALF)).to(device), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in l0.log_alpha.values():
            p.copy_(torch.empty(p.shape).normal_(0, 2, generator=generator))
    return l0.deterministic(), torch.randint(SMALL.vocab_size, (4, 256), generator=generator).to(device)


def in_bf16(device: torch.device):
    return torch.autocast(device.type, dtype=torch.bfloat16)


def one_process(device: torch.device) -> Processes:
    """In bf16 on a GPU; a CPU, where some take minutes for a product in bf16, shows with fp32 that a check works."""
    return Processes(0, 1, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def losses_of(model: nn.Module, wrapped: Callable, processes: Processes, masks: dict) -> Tensor:
    """Of four steps of plain gradient descent."""
    _, tokens = masks_and_tokens(processes.device)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(4):
        with processes.autocast():
            loss = wrapped(tokens, tokens, masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def check_a_step_never_waits(device: torch.device) -> str:
    """torch raises an error at any operation that waits for the GPU."""
    for variant in ("masked", "dense"):
        cfg = BenchSettings(device=device.type, memory=False, n_layers=2, vocab_size=2048)
        processes, watch = start_processes(cfg.train_settings()), Stopwatch(device)
        with tempfile.TemporaryDirectory() as folder:
            write_tokens(folder, cfg)
            step = build(cfg, processes, variant, folder, watch)
        watch.start()
        step(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "masked and dense"


def check_masked_is_compacted(device: torch.device) -> str:
    """By the stages themselves: a run of prune.py, cut by compact.py, both on this device."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = short_prune(Path(folder), device, "run", max_steps=4)
        compact.main(compact.CompactSettings(checkpoint=str(checkpoint), out_dir=f"{folder}/compact"))
        l0 = load_weights(L0(mask_sets(SMALL, HALF)).to(device), checkpoint / "masks.safetensors")
        masked = load_weights(Transformer(SMALL).to(device), checkpoint)
        shape = read_model_config(f"{folder}/compact", ModelConfig)
        dense = load_weights(Transformer(shape).to(device), f"{folder}/compact")
        tokens, found = masks_and_tokens(device)[1], []
        with torch.no_grad():
            found.append(close("fp32", masked(tokens, None, l0.deterministic()), dense(tokens), 1e-4))
            with in_bf16(device):
                found.append(close("bf16", masked(tokens, None, l0.deterministic()), dense(tokens), 3e-2))
    return ", ".join(found)


def short_prune(folder: Path, device: torch.device, name: str, **changes) -> Path:
    """A few steps of prune.py from fresh weights on made-up tokens.  Returns its last checkpoint."""
    if not (folder / "source").exists():
        (folder / "source").mkdir()
        (folder / "data" / "tokenizer").mkdir(parents=True)
        write_tokens(str(folder / "data"), BenchSettings(vocab_size=2048, seq_len=256))
        for path in (folder / "data").glob("*/train.json"):
            shutil.copy(path.with_suffix(".bin"), path.with_name("eval.bin"))
            path.with_name("eval.json").write_text(json.dumps(json.loads(path.read_text()) | {"split": "eval"}))
        weights = dict(fresh(torch.device("cpu")).named_parameters())
        shapes, dtypes = ({n: getattr(p, kind) for n, p in weights.items()} for kind in ("shape", "dtype"))
        write_tensors(folder / "source" / "model.safetensors", shapes, dtypes, weights.__getitem__)
        write_assets(folder / "source", SMALL, [])
    prune.main(prune.PruneSettings(**dict(
        data_dir=str(folder / "data"), out_dir=str(folder / name), init_from=str(folder / "source"), split="train",
        target_hidden_size=128, target_n_layers=3, target_n_heads=2, target_n_kv_heads=1, target_intermediate_size=344,
        seq_len=256, global_batch_size=8, micro_batch_size=4, eval_interval=100, eval_sequences=8, save_interval=2,
        warmup_steps=1, lagrangian_warmup_steps=2, verify_data=False, device=device.type, compile="off") | changes))
    return latest_checkpoint(folder / name)


def check_a_resumed_run_is_the_same_to_the_bit(device: torch.device) -> str:
    """With torch's deterministic kernels, which a run does not ask for by itself."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            whole = short_prune(folder, device, "whole", max_steps=4)
            short_prune(folder, device, "parts", max_steps=4)
            cut = folder / "parts" / "step_0000004"
            cut.rename(folder / "aside")
            resumed = short_prune(folder, device, "parts", max_steps=4, resume=True)
            for name in ("model", "optimizer", "masks"):
                same = (resumed / f"{name}.safetensors").read_bytes() == (whole / f"{name}.safetensors").read_bytes()
                assert same, f"{name}.safetensors of a resumed run differs"
    finally:
        torch.use_deterministic_algorithms(False)
    return "weights, moments and masks"


def check_ddp_and_fsdp_are_the_plain_model(device: torch.device) -> str:
    """In a process group of one."""
    alone, found = one_process(device), []
    masks, _ = masks_and_tokens(device)
    model = fresh(device)
    plain = losses_of(model, model, alone, masks)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=store)
        try:
            for parallel in ("ddp", "fsdp"):
                settings = dataclasses.replace(BenchSettings().train_settings(), parallel=parallel)
                model = shard(fresh(device), settings, alone)
                found.append(close(parallel, losses_of(model, wrap(model, settings, alone), alone, masks), plain, 5e-3))
        finally:
            dist.destroy_process_group()
    return ", ".join(found)


def check_flash_attn_is_sdpa(device: torch.device) -> str:
    if importlib.util.find_spec("flash_attn") is None:
        return "left out: flash-attn is not installed"
    masks, tokens = masks_and_tokens(device)
    with torch.no_grad(), in_bf16(device):
        logits = [fresh(device, attention=kind)(tokens, None, masks) for kind in ("flash_attn", "sdpa")]
    return close("logits", *logits, 3e-2)


def check_compiled_is_eager(device: torch.device) -> str:
    alone, found = one_process(device), []
    for name, masks in (("masked", masks_and_tokens(device)[0]), ("dense", {})):
        losses = []
        for compiled in ("on", "off"):
            model = fresh(device)
            wrapped = wrap(model, dataclasses.replace(BenchSettings().train_settings(), compile=compiled), alone)
            losses.append(losses_of(model, wrapped, alone, masks))
        found.append(close(name, *losses, 5e-3))
    return ", ".join(found)


CHECKS = {name.removeprefix("check_").replace("_", " "): function for name, function in list(globals().items())
          if name.startswith("check_")}
