"""`make gpu`: its checks on a GPU where there is one, and on the CPU what shows that they work."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from model import Norm
from tools import gpu_cases, gpu_check

CPU = torch.device("cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", gpu_cases.CHECKS)
def test_on_a_gpu(name):
    print(gpu_cases.CHECKS[name](torch.device("cuda", 0)))


def test_what_is_checked():
    assert list(gpu_cases.CHECKS) == [
        "a step never waits", "masked is compacted", "a resumed run is the same to the bit",
        "ddp and fsdp are the plain model", "flash attn is sdpa", "compiled is eager"]


def test_a_check_finds_a_difference(monkeypatch):
    """DDP and FSDP against the plain model, once as it is and once with a norm that counts other dimensions there."""
    check, plain = gpu_cases.CHECKS["ddp and fsdp are the plain model"], Norm.forward
    assert check(CPU).startswith("ddp: ")
    monkeypatch.setattr(Norm, "forward", lambda self, x, kept=None, factor=None: plain(
        self, x, None if torch.distributed.is_initialized() else kept, factor))
    with pytest.raises(AssertionError, match="ddp: they differ by"):
        check(CPU)
    assert not torch.distributed.is_initialized()


def test_a_check_that_fails_keeps_no_other_from_running(monkeypatch):
    def fails(device):
        raise RuntimeError("CUDA error:\nwhatever")

    monkeypatch.setattr(gpu_check, "CHECKS", {"a": fails, "b": lambda device: "1e-9"})
    lines, failed = gpu_check.run_checks(CPU)
    assert failed == 1 and lines[2:] == ["| a | **failed**: RuntimeError: CUDA error: whatever |", "| b | 1e-9 |"]


def test_parts_are_named_and_one_alone_replaces_no_report():
    with pytest.raises(ValueError, match="parts has 'bensh', which is not checks, bench or pipeline"):
        gpu_check.GpuSettings(parts="checks,bensh", out="x.md")
    with pytest.raises(ValueError, match=r"parts = checks alone would replace docs/gpu\.md; give another --out"):
        gpu_check.GpuSettings(parts="checks")
    assert gpu_check.GpuSettings(parts="checks,pipeline,bench").out == "docs/gpu.md"


def test_a_step_that_has_not_the_memory_is_a_row_of_the_report(monkeypatch):
    found = {"hf": None, "masked": dict(tokens=5000.0, mfu=0.4, bytes=4.5e10),
             "dense": dict(tokens=6e3, mfu=0.5, bytes=4.5e10)}
    monkeypatch.setattr(gpu_check, "in_new_process", lambda function, cfg: found[cfg.variants[0]])
    monkeypatch.setattr(gpu_check, "planned_bytes", lambda cfg: 4.4e10)
    monkeypatch.setattr(gpu_check, "SIZES", {"1.3B": gpu_check.SIZES["1.3B"]})
    lines = gpu_check.run_bench(rounds=1)
    assert "| 1.3B | transformers, compiled | out of memory | | | |" in lines
    assert "| 1.3B | masked, compiled | 5,000 | 40.0% | 45.0 | 44.0 |" in lines and lines[-3].endswith("met")


def test_goals_are_held_against_what_was_measured():
    def step(tokens, mfu, size, planned):
        return dict(tokens=tokens, mfu=mfu, bytes=size, planned=planned)

    found = {("1.3B", "dense", "off"): step(100, 0.45, 50e9, 51e9), ("1.3B", "dense", "on"): step(120, 0.54, 40e9, 41e9),
             ("1.3B", "masked", "on"): step(90, 0.41, 50e9, 60e9), ("370M", "dense", "on"): step(900, 0.99, 1e9, 2e9),
             ("1.3B", "hf", "on"): step(500, 0.9, 1e9, None)}
    assert [line.rpartition(": ")[2] for line in gpu_check.goals(found)] == ["met", "**missed**", "**missed**"]
    assert "54.0% MFU" in gpu_check.goals(found)[0] and "0.750" in gpu_check.goals(found)[1]
    assert "could not be measured" in gpu_check.goals({})[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_so_and_needs_few_packages(tmp_path):
    """Whatever is neither torch, numpy, safetensors, tqdm, transformers nor one of their own requirements is hidden."""
    hidden = ["sentencepiece", "tiktoken", "pytest", "hypothesis", "gguf", "zstandard", "pyarrow", "matplotlib",
              "tensorboard", "wandb", "flash_attn", "google", "scipy", "pandas"]
    code = f"""
import sys
from importlib.abc import MetaPathFinder

class Hide(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden}:
            raise ModuleNotFoundError("hidden: " + name)

sys.meta_path.insert(0, Hide())
import compact, convert, prepare, pretrain, prune, tools.bench, tools.gpu_check
from run.settings import run_stage
sys.argv = ["gpu_check", "--out={tmp_path / 'gpu.md'}"]
run_stage(tools.gpu_check.main, tools.gpu_check.GpuSettings)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "gpu_check: torch sees no CUDA device here: 0 passed\n", done.stderr
    assert not (tmp_path / "gpu.md").exists()
