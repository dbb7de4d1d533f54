"""The data path at the size of real runs: speed from the page cache, and an index of 10^12 tokens in sparse files."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_prepare import prepare, text, write_raw
from conftest import text_like, write_tokens
from test_prepare import MISTRAL

from data import RunData, Sampler, open_split

CPU, T = torch.device("cpu"), 4096


def test_sampler_feeds_50_million_tokens_a_second(tmp_path):
    """In one thread, from the page cache; the fastest of many batches, since other work may share the machine."""
    write_tokens(tmp_path, "a", "train", text_like(8_000_000, 0))
    sampler = Sampler([open_split(tmp_path, "a", "train", T)], global_batch_size=64, seed=0)
    best, cursors = 0.0, {"a": 0}
    for step in range(40):
        start = time.perf_counter()
        batch = sampler.draw(step, {"a": 1.0}, cursors)
        for i in range(0, 64, 16):
            sampler.load(batch, slice(i, i + 16), CPU)
        best, cursors = max(best, 64 * T / (time.perf_counter() - start)), batch.cursors
    print(f"sampler: {best / 1e6:.0f} M tokens/s")
    assert best > 50e6


def write_sparse(data_dir: Path, n_tokens: int, shards: int) -> int:
    """A domain "huge" of zeros that take no room, its last window numbered.  Returns n_tokens, or less if need be."""
    each = n_tokens // shards
    for i in range(shards):
        path = write_tokens(data_dir, "huge", "train", [], name="train" + f"-{i:05d}-of-{shards:05d}" * (shards > 1))
        with path.with_suffix(".bin").open("r+b") as file:
            while True:
                try:
                    file.truncate(2 * each)
                    break
                except OSError:  # more than the file system's largest file
                    each //= 2
            last = (each - 1) // T - 1
            file.seek(2 * last * T)
            file.write(np.arange(T + 1, dtype=np.uint16).tobytes())
        path.write_text(json.dumps(json.loads(path.read_text()) | {"n_tokens": each}))
    return each * shards


def resident_mb() -> float:
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 / 1e6 if status.exists() else 0.0


@pytest.mark.parametrize("shards", [1, 1000])
def test_a_trillion_tokens_open_within_a_second_and_in_constant_memory(tmp_path, shards):
    n_tokens = write_sparse(tmp_path, 10**12, shards)
    before, start = resident_mb(), time.perf_counter()
    split = open_split(tmp_path, "huge", "train", T)
    sampler = Sampler([split], global_batch_size=256, seed=0)
    seconds = time.perf_counter() - start
    batch = sampler.draw(7, {"huge": 1.0}, {"huge": split.n_windows - 100})  # and on into the next epoch
    tokens, _ = sampler.load(batch, slice(0, 64), CPU)
    grown = resident_mb() - before
    print(f"{n_tokens:,} tokens in {shards} files: {seconds:.3f} s, {grown:.1f} MB")
    assert seconds < 1 and grown < 20
    # each file loses at most a window's worth of tokens at its end
    assert split.n_tokens == n_tokens and 0 <= n_tokens // T - split.n_windows <= shards
    assert batch.window.dtype == np.int64 and batch.cursors == {"huge": split.n_windows + 156}
    assert batch.window.min() >= 0 and batch.window.max() < split.n_windows
    assert len(np.unique(batch.window[:100])) == 100 and batch.window.max() > 0.9 * split.n_windows
    assert tokens.shape == (64, T)
    assert np.array_equal(split.window(split.n_windows - 1), np.arange(T + 1))  # no offset has wrapped
    assert f"{n_tokens:,}" in RunData([split], [], Path()).budget_table({"huge": 1.0}, {"huge": 0}, split.n_windows)


@pytest.mark.slow
def test_memory_of_prepare_does_not_grow_with_the_input(tmp_path):
    documents, peaks = list(text()), []
    for mb in (8, 40):
        write_raw(tmp_path / f"raw{mb}", documents, mb)
        row = prepare(tmp_path / f"raw{mb}", tmp_path / f"out{mb}", MISTRAL)
        peaks.append(row["parent_mb"] + row["worker_mb"])
    assert peaks[1] < peaks[0] + 20, peaks
