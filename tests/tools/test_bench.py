"""bench.py drives the stages' own functions and says what is true; a step reads nothing back but at a log line."""

import re

import pytest
import torch
from conftest import prune_settings, random_model, random_tokens, run_script, tiny_config
from torch.utils.flop_counter import FlopCounterMode

import prune
from run.settings import UserError, parse_args
from tools import bench, bench_steps

SMALL = dict(hidden_size=32, n_layers=2, n_heads=4, n_kv_heads=4, intermediate_size=48, vocab_size=64, seq_len=16,
             micro_batch_size=2, threads=1, rounds=2, device="cpu")


def test_prints_a_row_a_ratio_and_the_phases_of_each_variant(capsys):
    bench.main(bench.BenchSettings(against="hf,gemm", memory=False, **SMALL))
    out = capsys.readouterr().out
    for variant in ("masked", "dense", "hf", "gemm"):
        ms, rate, _ = re.search(rf"^{variant} +(\d+) +([\d,]+) +([\d.]+)%", out, flags=re.M).groups()
        assert int(rate.replace(",", "")) > 0 and int(ms) >= 0
    for ratio in ("masked / dense", "dense / hf", "masked / hf", "masked / gemm", "dense / gemm"):
        median, low, high = map(float, re.search(rf"^{ratio}: ([\d.]+) \(([\d.]+) to ([\d.]+)\)", out, flags=re.M).groups())
        assert 0 < low <= median <= high
    for variant, phases in (("masked", "data masks forward backward clip optimizer"), ("gemm", "products"),
                            ("hf", "data forward backward clip optimizer")):
        line = re.search(rf"^{variant}: data .*|^{variant}: products .*", out, flags=re.M)[0]
        assert all(f"{phase} " in line for phase in phases.split())


def test_two_processes_report_their_tokens_together():
    result = run_script("-m", "tools.bench", "--memory=False",
                        *(f"--{name}={value}" for name, value in SMALL.items()), processes=2)
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout and result.stdout.count("masked / dense") == 1  # rank 0 alone reports


def test_peak_memory_is_measured_in_a_fresh_process():
    """At least weights, gradients and both moments: 16 bytes a parameter."""
    cfg = bench.BenchSettings(**SMALL | dict(vocab_size=100_000))
    assert 16 * cfg.shape.n_params() < bench.in_new_process(bench.peak_memory, cfg, "dense") < 40 * cfg.shape.n_params()


@pytest.mark.parametrize("changes", [{}, dict(n_kv_heads=2)])
def test_the_bare_products_are_the_flops_of_a_step(changes):
    cfg = bench.BenchSettings(**SMALL | changes)
    flops = 0
    for times, rows, inner, columns in bench_steps.product_shapes(cfg):
        flops += times * 2 * torch.Size(rows).numel() * inner * columns
    assert flops == 2 * 16 * cfg.shape.train_flops_per_token(16)


def test_flops_agree_with_torchs_own_count():
    """Forward and backward of the products as torch counts them; attention, which it counts whole and we as half, apart."""
    cfg, B, T = tiny_config(n_kv_heads=4), 2, 16
    model, tokens = random_model(cfg), random_tokens(cfg, B=B, T=T + 1)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:]).backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if op in ("aten.mm", "aten.addmm"))
    assert products == B * T * cfg.train_flops_per_token(0)


@pytest.mark.parametrize("flag, named", [("--steps=sparse", "sparse"), ("--against=hf,mkl", "mkl"), ("--rounds=0", "rounds"),
                                         ("--hidden_size=100 --n_heads=7", "divide")])
def test_bad_settings_are_refused(flag, named):
    with pytest.raises(UserError, match=named):
        parse_args(bench.BenchSettings, flag.split())


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def test_a_step_without_log_line_reads_nothing_back(tmp_path, data_dir, source, monkeypatch):
    """prune.py over 6 steps, one log line at the end: only there is a tensor turned into a number."""
    reads, now = [], [-1]  # (step, how), and the step that runs

    def counting(name, original):
        def counted(self, *args, **kwargs):
            reads.append((now[0], name))
            return original(self, *args, **kwargs)
        return counted

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    draw = prune.Sampler.draw

    def watched(self, step, *args):
        now[0] = step
        return draw(self, step, *args)

    monkeypatch.setattr(prune.Sampler, "draw", watched)
    prune.main(prune_settings(data_dir, tmp_path / "out", source, log_interval=100, save_interval=100, eval_interval=100))
    assert (5, "tolist") in reads  # the log line's one
    assert not [read for read in reads if 0 <= read[0] < 5]


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_inductor_compiles_the_model_whole(masked):
    from test_model import random_masks

    cfg = tiny_config(n_layers=1)
    model, tokens, masks = random_model(cfg), random_tokens(cfg, T=9), {}
    if masked:
        masks = random_masks(cfg)
    torch._dynamo.reset()
    eager = model(tokens[:, :-1], tokens[:, 1:], masks)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(tokens[:, :-1], tokens[:, 1:], masks), eager)
