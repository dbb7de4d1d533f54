"""Order of the data, evaluation and dynamic batch loading: what they promise, on any number of ranks."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_model, text_like, tiny_config, write_data_dir, write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (RunData, Sampler, Split, evaluate, open_domains, open_run_data, open_split, permute, steer,
                  update_domain_weights)
from run.processes import Processes, RunState

CPU = torch.device("cpu")
CHECKED = settings(max_examples=150, deadline=None, derandomize=True)


def numbered(tmp_path, sizes: dict[str, int], seq_len: int = 4) -> list[Split]:
    """Domains of so many windows each; token i of a domain is 1000 times its number, plus i."""
    for d, (domain, windows) in enumerate(sizes.items()):
        write_tokens(tmp_path, domain, "train", 1000 * d + np.arange(windows * seq_len + 1), vocab_size=10_000)
    return open_domains(tmp_path, list(sizes), "train", seq_len)


# ---- the permutation


@given(n=st.integers(1, 3000), key=st.text(max_size=5))
@CHECKED
def test_permute_is_a_bijection(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 256, 257, 4095, 4096, 4097, 65535, 65537])
def test_permute_is_a_bijection_around_powers_of_two(n):
    found = permute(np.arange(n), n, "k")
    assert found.dtype == np.int64 and np.array_equal(np.sort(found), np.arange(n))
    assert n < 8 or not np.array_equal(found, permute(np.arange(n), n, "l"))
    one_by_one = [int(permute(np.array([i]), n, "k")[0]) for i in range(min(n, 20))]
    assert one_by_one == found[:20].tolist()


def test_permute_of_a_huge_range_stays_inside_and_distinct():
    for n in (2**40, 2**40 + 1, 10**12):
        found = permute(np.arange(n - 5000, n), n, "k")
        assert found.min() >= 0 and found.max() < n and len(np.unique(found)) == 5000
        assert abs(found.mean() / n - 0.5) < 0.05  # and spread over all of it


def test_permute_looks_random():
    """Neighbours land apart: the mean distance of uniform draws is n / 3, and no order is left."""
    n = 5000
    found = permute(np.arange(n), n, "k")
    assert abs(np.abs(np.diff(found)).mean() / (n / 3) - 1) < 0.05
    assert abs(np.corrcoef(found, np.arange(n))[0, 1]) < 0.06


# ---- windows


@given(n_tokens=st.integers(0, 60), seq_len=st.integers(1, 9))
@CHECKED
def test_no_target_is_lost(n_tokens, seq_len):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    n = max(0, (n_tokens - 1) // seq_len)
    split = Split("d", "train", seq_len, (tokens,), np.array([0, n]), 100, "t")
    windows = [split.window(i) for i in range(n)]
    assert all(len(w) == seq_len + 1 for w in windows)
    targets = np.concatenate([w[1:] for w in windows]) if n else np.zeros(0)
    assert np.array_equal(targets, tokens[1:n * seq_len + 1]) and n_tokens - 1 - len(targets) < seq_len


def test_shards_are_one_split(tmp_path):
    sizes, T = (23, 0, 3, 41), 5  # one empty, one too short for a window
    for i, n in enumerate(sizes):
        write_tokens(tmp_path, "d", "train", 100 * i + np.arange(n), name=f"train-{i:05d}-of-00004", vocab_size=999)
    split = open_split(tmp_path, "d", "train", T)
    assert split.n_windows == 4 + 0 + 0 + 8 and split.n_tokens == sum(sizes)
    firsts = [split.window(i).tolist() for i in range(split.n_windows)]
    assert firsts == [list(range(i * T, i * T + T + 1)) for i in range(4)] + [
        list(range(300 + i * T, 300 + i * T + T + 1)) for i in range(8)]  # no window spans two shards


# ---- the sampler


def tokens_of(sampler: Sampler, batch, world: int, micro: int) -> torch.Tensor:
    """The global batch as the ranks of a run load it: micro-steps in order, in each the ranks in order."""
    accum = sampler.global_batch_size // (micro * world)
    parts = []
    for micro_step in range(accum):
        for rank in range(world):
            index = micro_step * world + rank
            tokens, targets = sampler.load(batch, slice(index * micro, (index + 1) * micro), CPU)
            assert tokens.dtype == torch.int64 and torch.equal(tokens[:, 1:], targets[:, :-1])
            parts.append(tokens)
    return torch.cat(parts)


def test_order_does_not_depend_on_ranks_or_micro_batches(tmp_path):
    sampler = Sampler(numbered(tmp_path, {"a": 50, "b": 70}), global_batch_size=16, seed=3)
    batch = sampler.draw(5, {"a": 0.3, "b": 0.7}, {"a": 4, "b": 9})
    whole = sampler.load(batch, slice(0, 16), CPU)[0]
    for world in (1, 2, 4):
        for micro in (1, 2, 4):
            assert torch.equal(tokens_of(sampler, batch, world, micro), whole)


def test_each_epoch_uses_every_window_once_in_an_order_of_its_own(tmp_path):
    sizes, cursors, used = {"a": 13, "b": 29}, {"a": 0, "b": 0}, {"a": [], "b": []}
    sampler = Sampler(numbered(tmp_path, sizes), global_batch_size=8, seed=3)
    for step in range(30):
        batch = sampler.draw(step, {"a": 0.5, "b": 0.5}, cursors)
        for d, w in zip(batch.domain, batch.window):
            used["ab"[d]].append(int(w))
        cursors = batch.cursors
    for domain, n in sizes.items():
        assert len(used[domain]) == cursors[domain] >= 2 * n
        epochs = [used[domain][i:i + n] for i in range(0, len(used[domain]), n)]
        assert all(sorted(e) == list(range(n)) for e in epochs[:-1]) and len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    first = Sampler(sampler.splits, global_batch_size=8, seed=4).draw(0, {"a": 0.5, "b": 0.5}, {"a": 0, "b": 0})
    again = sampler.draw(0, {"a": 0.5, "b": 0.5}, {"a": 0, "b": 0})
    assert not np.array_equal(first.window, again.window)  # another seed, another order


def test_a_batch_may_span_epochs_of_a_tiny_domain(tmp_path):
    sampler = Sampler(numbered(tmp_path, {"a": 3}), global_batch_size=10, seed=0)
    batch = sampler.draw(0, {"a": 1.0}, {"a": 2})  # the last one of an epoch, and three whole ones
    assert batch.cursors == {"a": 12}
    for epoch in (batch.window[1:4], batch.window[4:7], batch.window[7:10]):
        assert sorted(epoch) == [0, 1, 2]


def test_drawing_changes_nothing_and_is_the_same_each_time(tmp_path):
    sampler = Sampler(numbered(tmp_path, {"a": 50, "b": 70}), global_batch_size=16, seed=3)
    weights, cursors, state = {"a": 0.3, "b": 0.7}, {"a": 4, "b": 9}, np.random.get_state()[1].copy()
    one, two = sampler.draw(5, weights, cursors), sampler.draw(5, weights, cursors)
    assert cursors == {"a": 4, "b": 9} and weights == {"a": 0.3, "b": 0.7}
    assert np.array_equal(one.domain, two.domain) and np.array_equal(one.window, two.window) and one.cursors == two.cursors
    assert np.array_equal(np.random.get_state()[1], state)
    assert sum(one.cursors.values()) == 13 + 16
    assert not np.array_equal(sampler.draw(6, weights, cursors).domain, one.domain)


def test_shares_follow_the_weights(tmp_path):
    sampler = Sampler(numbered(tmp_path, {"a": 50, "b": 50, "none": 50, "c": 50}), global_batch_size=500, seed=3)
    weights = {"a": 0.05, "b": 0.6, "none": 0.0, "c": 0.35}
    batches = [sampler.draw(step, weights, dict.fromkeys(weights, 0)) for step in range(40)]
    share = np.bincount(np.concatenate([b.domain for b in batches]), minlength=4) / 20_000
    want = np.array(list(weights.values()))
    assert np.all(np.abs(share - want) <= 4 * np.sqrt(want * (1 - want) / 20_000)), share
    per_batch = np.array([np.bincount(b.domain, minlength=4)[1] for b in batches])
    assert 0.5 < per_batch.var() / (500 * 0.6 * 0.4) < 1.8  # drawn independently: binomial


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (1 - 1e-12, 0.0), (0.1 + 0.2, 0.0)])
def test_a_domain_without_weight_is_never_drawn(tmp_path, weights, monkeypatch):
    sampler = Sampler(numbered(tmp_path, {"a": 9, "b": 9}), global_batch_size=4, seed=0)
    top = SimpleNamespace(random=lambda n: np.array([0.0, 0.5, 1 - 1e-9, np.nextafter(1, 0)]))  # u at its very ends
    monkeypatch.setattr(np.random, "Generator", lambda bits: top)
    batch = sampler.draw(0, dict(zip("ab", weights)), {"a": 0, "b": 0})
    assert set(batch.domain.tolist()) == {0 if weights[0] else 1}


@given(n=st.integers(1, 12), before=st.integers(0, 40), drawn=st.integers(0, 40))
@CHECKED
def test_exhausted_names_the_domains_that_began_again(n, before, drawn):
    split = Split("d", "train", 1, (np.zeros(n + 1, np.uint16),), np.array([0, n]), 9, "t")
    sampler = Sampler([split], global_batch_size=1, seed=0)
    reused = [i for i in range(before, before + drawn) if i and i % n == 0]  # these sequences begin an epoch
    assert sampler.exhausted({"d": before}, {"d": before + drawn}) == (["d"] if reused else [])


def test_budget_table_counts_tokens_and_epochs(tmp_path):
    splits = numbered(tmp_path, {"a": 50, "b": 100})
    table = RunData(splits, [], tmp_path).budget_table({"a": 0.25, "b": 0.75}, {"a": 10, "b": 0}, 1000).splitlines()
    assert table[1].split() == ["a", "0.2500", "201", "1,040", "5.20"]
    assert table[2].split() == ["b", "0.7500", "401", "3,000", "7.50"]


# ---- evaluation


class Ranks(Processes):
    """A rank of `world`, whose sum over ranks is filled in once all have run: see `evaluate_on`."""

    def sum(self, tensor):
        self.__dict__.setdefault("seen", tensor.clone())
        return tensor if "total" not in self.__dict__ else self.__dict__["total"].clone()


def evaluate_on(world: int, model, masks, splits, cfg) -> list[dict]:
    """What every rank returns: each runs alone first, then again with the sum of what they would have added up."""
    ranks = [Ranks(r, world, CPU, torch.float32) for r in range(world)]
    for rank in ranks:
        evaluate(model, masks, splits, cfg, rank)
    total = sum(rank.__dict__["seen"] for rank in ranks)
    for rank in ranks:
        rank.__dict__["total"] = total
    return [evaluate(model, masks, splits, cfg, rank) for rank in ranks]


def eval_settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**(dict(eval_sequences=7, micro_batch_size=3, eval_batch_size=0, eval_between=0) | changes))


def eval_case(tmp_path, eval_sequences: int = 7, micro_batch_size: int = 3):
    for i, (domain, n) in enumerate({"a": 8 * 20 + 1, "none": 0, "b": 8 * 4 + 5, "short": 8}.items()):
        write_tokens(tmp_path, domain, "eval", text_like(n, i))
    splits = open_domains(tmp_path, ["a", "none", "b", "short"], "eval", 8)
    model = random_model(tiny_config(n_layers=2))
    return model, splits, eval_settings(eval_sequences=eval_sequences, micro_batch_size=micro_batch_size)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_evaluation_does_not_depend_on_the_number_of_ranks(tmp_path, world):
    model, splits, cfg = eval_case(tmp_path)
    masks = {"hidden": torch.linspace(0.1, 1, 32)}
    want = evaluate(model, masks, splits, cfg, Processes(0, 1, CPU, torch.float32))
    assert want["none"] is None and want["short"] is None and want["a"] > 1
    assert evaluate_on(world, model, masks, splits, cfg) == [want] * world  # to the last bit


@torch.no_grad()
def test_evaluation_is_the_mean_over_the_windows(tmp_path):
    model, splits, _ = eval_case(tmp_path)
    cfg = eval_settings(eval_sequences=1000, micro_batch_size=3)  # all there are
    found = evaluate(model, {}, splits, cfg, Processes(0, 1, CPU, torch.float32))
    for split in (splits[0], splits[2]):
        windows = torch.from_numpy(np.stack([split.window(i) for i in range(split.n_windows)]).astype(np.int64))
        want = model(windows[:, :-1], windows[:, 1:])
        assert found[split.domain] == pytest.approx(float(want), rel=1e-5)


def test_evaluation_uses_the_same_windows_at_any_micro_batch_size(tmp_path):
    model, splits, _ = eval_case(tmp_path)
    settings = [eval_settings(micro_batch_size=1), eval_settings(micro_batch_size=4),
                eval_settings(micro_batch_size=1, eval_batch_size=100)]
    found = [evaluate(model, {}, splits, cfg, Processes(0, 1, CPU, torch.float32)) for cfg in settings]
    for other in found[1:]:
        assert all(other[d] == (None if v is None else pytest.approx(v, rel=1e-5)) for d, v in found[0].items())


def test_evaluations_in_turn_see_all_windows(tmp_path):
    """Three at a time: of domain a's 7 each was there three times after 7 turns, of domain b's 4 after 4."""
    model, splits, _ = eval_case(tmp_path)
    cfg, alone = eval_settings(eval_between=3), Processes(0, 1, CPU, torch.float32)
    whole = evaluate(model, {}, splits, cfg, alone)
    turns = [evaluate(model, {}, splits, cfg, alone, turn=turn) for turn in range(5, 5 + 7)]
    assert len({t["a"] for t in turns}) == 7 and len({t["b"] for t in turns}) == 4 and turns[0]["none"] is None
    assert sum(t["a"] for t in turns) / 7 == pytest.approx(whole["a"], rel=1e-6)
    assert sum(t["b"] for t in turns[:4]) / 4 == pytest.approx(whole["b"], rel=1e-6)
    many = eval_settings(eval_between=100)
    assert evaluate(model, {}, splits, many, alone, turn=2) == whole
    assert evaluate_on(3, model, {}, splits, eval_settings(eval_between=3))[1] == whole


def test_evaluation_refuses_a_loss_that_is_not_finite(tmp_path):
    model, splits, cfg = eval_case(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="domain a is nan"):
        evaluate(model, {}, splits, cfg, Processes(0, 1, CPU, torch.float32))


# ---- dynamic batch loading


def test_weights_by_hand():
    """Algorithm 1, two domains: one a nat above its reference, one half a nat below it."""
    weights, losses, reference = {"a": 0.6, "b": 0.4}, {"a": 3.0, "b": 1.5}, {"a": 2.0, "b": 2.0}
    for excess, (up, down) in {"clipped": (math.e, 1.0), "signed": (math.e, math.exp(-0.5))}.items():
        a, b = 0.6 * up, 0.4 * down
        want = {"a": (1 - 1e-4) * a / (a + b) + 1e-4 / 2, "b": (1 - 1e-4) * b / (a + b) + 1e-4 / 2}
        assert update_domain_weights(weights, losses, reference, excess=excess) == pytest.approx(want, rel=1e-12)
    same = update_domain_weights(weights, {"a": 2.0, "b": 1.0}, reference)  # none above: only the smoothing
    assert same == pytest.approx({"a": 0.6 - 1e-4 * 0.1, "b": 0.4 + 1e-4 * 0.1}, rel=1e-12)
    slow = update_domain_weights(weights, losses, reference, eta=0.5, smoothing=0.0)
    assert slow["a"] / slow["b"] == pytest.approx(1.5 * math.exp(0.5), rel=1e-12)


def test_a_domain_without_loss_keeps_its_weight():
    weights, reference = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 1.0, "c": 1.0}
    found = update_domain_weights(weights, {"a": 2.0, "b": None, "c": 1.0}, reference)
    alone = update_domain_weights({"a": 5 / 7, "c": 2 / 7}, {"a": 2.0, "c": 1.0}, reference)
    assert found == pytest.approx({"a": alone["a"] * 0.7, "b": 0.3, "c": alone["c"] * 0.7}, rel=1e-12)
    assert update_domain_weights(weights, dict.fromkeys(weights), {}) == weights
    only = {"a": 1.0, "b": 0.0}
    assert update_domain_weights(only, {"a": None, "b": 3.0}, {"b": 1.0}) == only


def test_min_weight_is_a_floor_and_the_others_keep_their_proportions():
    weights, reference = {"a": 0.02, "b": 0.08, "c": 0.9}, dict.fromkeys("abc", 0.0)
    found = update_domain_weights(weights, dict.fromkeys("abc", 0.0), reference, min_weight=0.1, smoothing=0.0)
    assert found == pytest.approx({"a": 0.1, "b": 0.1, "c": 0.8})
    weights = {"a": 0.02, "b": 0.2, "c": 0.78}
    found = update_domain_weights(weights, dict.fromkeys("abc", 0.0), reference, min_weight=0.1, smoothing=0.0)
    assert found == pytest.approx({"a": 0.1, "b": 0.9 * 0.2 / 0.98, "c": 0.9 * 0.78 / 0.98})
    sinks = {"a": 0.01, "b": 0.251, "c": 0.739}  # b falls below the floor only once a has been raised
    found = update_domain_weights(sinks, dict.fromkeys("abc", 0.0), reference, min_weight=0.25, smoothing=0.0)
    assert found == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5})


@st.composite
def mixtures(draw):
    n = draw(st.integers(1, 6))
    raw = draw(st.lists(st.floats(0, 1), min_size=n, max_size=n).filter(lambda x: sum(x) > 0.1))
    weights = {f"d{i}": x / sum(raw) for i, x in enumerate(raw)}
    loss = st.one_of(st.none(), st.floats(0, 1e6))
    losses = {d: draw(loss) for d in weights}
    reference = {d: draw(st.floats(0, 20)) for d in weights}
    return weights, losses, reference, draw(st.sampled_from(["clipped", "signed"])), draw(st.floats(0, 0.99 / n))


@given(case=mixtures(), rounds=st.integers(1, 4))
@settings(CHECKED, max_examples=400)
def test_weights_stay_a_distribution_above_the_floor(case, rounds):
    weights, losses, reference, excess, floor = case
    start, known = weights, [d for d in weights if losses[d] is not None]
    for _ in range(rounds):
        weights = update_domain_weights(weights, losses, reference, excess=excess, min_weight=floor)
        assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
        assert all(math.isfinite(w) and w >= 0 for w in weights.values())
    mass = sum(start[d] for d in known)
    assert all(weights[d] == start[d] for d in start if d not in known)
    for d in known:
        assert weights[d] >= min(floor, mass / len(known)) * (1 - 1e-9)
        assert mass == 0 or weights[d] >= 0.99e-4 * mass / len(known)  # smoothing: nothing starves for good


def test_steering_waits_for_the_first_step_and_keeps_the_sources_losses():
    cfg = SimpleNamespace(update="doremi", excess="clipped", min_weight=0.0)
    state = RunState(0, {"a": 0.5, "b": 0.5}, {"a": 0, "b": 0}, {})
    steer(state, {"a": 2.0, "b": 3.0}, cfg)
    assert state.reference_loss == {"a": 2.0, "b": 3.0} and state.domain_weights == {"a": 0.5, "b": 0.5}
    given = RunState(0, {"a": 0.5, "b": 0.5}, {"a": 0, "b": 0}, {"a": 1.0, "b": 3.0})
    steer(given, {"a": 2.0, "b": 3.0}, cfg)  # above its reference, but nothing has been trained yet
    assert given.domain_weights == {"a": 0.5, "b": 0.5} and given.evaluated == 0
    state.step = 50
    steer(state, {"a": 2.5, "b": 3.0}, cfg)
    assert state.domain_weights["a"] > 0.6 and state.reference_loss == {"a": 2.0, "b": 3.0} and state.evaluated == 50
    before = state.domain_weights
    steer(state, {"a": 9.0, "b": 3.0}, SimpleNamespace(update="constant", excess="clipped", min_weight=0.0))
    assert state.domain_weights == before


# ---- what cannot be read


def rewrite(path, **changes):
    index = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


@pytest.mark.parametrize("changes", [dict(dtype="int32"), dict(format=2), dict(n_tokens=-1), dict(n_tokens="9"),
                                     dict(dtype=None), dict(sha256=None), dict(tokenizer=3), dict(vocab_size=64.0)])
def test_an_index_of_another_kind_is_refused(tmp_path, changes):
    rewrite(write_tokens(tmp_path, "d", "train", range(20)), **changes)
    with pytest.raises(ValueError, match=r"train\.json"):
        open_split(tmp_path, "d", "train", 4)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00"])
def test_an_index_that_is_no_index_is_refused(tmp_path, text):
    write_tokens(tmp_path, "d", "train", range(20)).write_text(text)
    with pytest.raises(ValueError, match=r"train\.json"):
        open_split(tmp_path, "d", "train", 4)


def test_tokens_that_do_not_match_their_index_are_refused(tmp_path):
    path = write_tokens(tmp_path, "d", "train", range(20))
    for n_bytes in (39, 38, 42):
        path.with_suffix(".bin").write_bytes(b"\0" * n_bytes)
        with pytest.raises(ValueError, match=rf"train\.bin has {n_bytes} bytes.* 40"):
            open_split(tmp_path, "d", "train", 4)
    path.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match=r"train\.bin"):
        open_split(tmp_path, "d", "train", 4)
    path.unlink()
    with pytest.raises(ValueError, match=r"train\.json.*prepare\.py"):
        open_split(tmp_path, "d", "train", 4)


def shards(tmp_path, n: int = 3, **changes):
    return [write_tokens(tmp_path, "d", "train", range(20), name=f"train-{i:05d}-of-{n:05d}",
                         **(changes if i == n - 1 else {})) for i in range(n)]


def test_missing_or_mixed_shards_are_refused(tmp_path):
    paths = shards(tmp_path)
    paths[1].rename(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="train-00001-of-00003"):
        open_split(tmp_path, "d", "train", 4)
    (tmp_path / "elsewhere.json").rename(paths[1])
    assert open_split(tmp_path, "d", "train", 4).n_windows == 12
    write_tokens(tmp_path, "d", "train", range(20), name="train-00001-of-00002")
    with pytest.raises(ValueError, match="train-00001-of-00002"):
        open_split(tmp_path, "d", "train", 4)


@pytest.mark.parametrize("changes", [dict(dtype="uint32"), dict(vocab_size=65), dict(tokenizer="another")])
def test_shards_that_differ_are_refused(tmp_path, changes):
    shards(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"00002-of-00003.*{next(iter(changes))}"):
        open_split(tmp_path, "d", "train", 4)


def test_a_split_and_shards_of_it_are_refused(tmp_path):
    shards(tmp_path)
    write_tokens(tmp_path, "d", "train", range(20))
    with pytest.raises(ValueError, match="both"):
        open_split(tmp_path, "d", "train", 4)


def test_domains_of_different_tokenizers_are_refused(tmp_path):
    write_tokens(tmp_path, "a", "train", range(20))
    write_tokens(tmp_path, "b", "train", range(20), tokenizer="another")
    with pytest.raises(ValueError, match=r"a and b .* different tokenizers"):
        open_domains(tmp_path, ["a", "b"], "train", 4)


def test_uint32_tokens_are_read_beside_uint16_ones(tmp_path):
    write_tokens(tmp_path, "a", "train", [70_000, 1, 100_255, 3, 4], dtype="uint32", vocab_size=100_256)
    split = open_split(tmp_path, "a", "train", 4)
    sampler = Sampler([split], global_batch_size=1, seed=0)
    tokens, targets = sampler.load(sampler.draw(0, {"a": 1.0}, {"a": 0}), slice(0, 1), CPU)
    assert tokens.tolist() == [[70_000, 1, 100_255, 3]] and targets.tolist() == [[1, 100_255, 3, 4]]


@pytest.mark.parametrize("where", ["train", "eval", "a shard"])
def test_the_largest_token_that_is_there_is_held_against_the_model(tmp_path, where):
    """A tokenizer may have more tokens than the model, a [PAD] for one, as long as no text has them."""
    fits = dict(split="train", seq_len=8, vocab_size=64, context_length=64)
    names = ["train-00000-of-00002", "train-00001-of-00002"] if where == "a shard" else ["train"]
    for name in [*names, "eval"]:
        write_tokens(tmp_path, "code", name.split("-")[0], range(64), name=name, vocab_size=90, max_token=63)
    open_run_data(tmp_path, [], **fits)
    bad = {"a shard": names[-1]}.get(where, where)
    write_tokens(tmp_path, "code", bad.split("-")[0], range(65), name=bad, vocab_size=90, max_token=64)
    with pytest.raises(ValueError, match=rf"code has token 64 in its {bad.split('-')[0]} split .*90 tokens.*model knows 64"):
        open_run_data(tmp_path, [], **fits)
    write_tokens(tmp_path, "code", bad.split("-")[0], range(64), name=bad, vocab_size=90)  # not recorded: what could be
    with pytest.raises(ValueError, match="code has token 89"):
        open_run_data(tmp_path, [], **fits)


@pytest.mark.parametrize("max_token", [64, -2, 1.0, None, "3", True])
def test_an_odd_largest_token_is_refused(tmp_path, max_token):
    path = write_tokens(tmp_path, "code", "train", range(64), max_token=max_token)
    with pytest.raises(ValueError, match=f"{path}: max_token .* is not below vocab_size 64"):
        open_split(tmp_path, "code", "train", 8)


def test_run_data_names_what_does_not_fit(tmp_path):
    write_data_dir(tmp_path, {"code": 200, "wiki": 200})
    fits = dict(split="train", seq_len=8, vocab_size=64, context_length=64)
    assert open_run_data(tmp_path, [], **fits).domains == ["code", "wiki"]  # all there are; the tokenizer is none
    assert open_run_data(tmp_path, ["wiki"], **fits).domains == ["wiki"]
    for changes, domains, named in ((dict(seq_len=65), [], "seq_len = 65.*64"), (dict(vocab_size=63), [], "64 tokens.*63"),
                                    ({}, ["coed"], "'coed'.*code, wiki"), (dict(split="prune"), [], "prune")):
        with pytest.raises(ValueError, match=named):
            open_run_data(tmp_path, domains, **(fits | changes))
    with pytest.raises(ValueError, match="prepare"):
        open_run_data(tmp_path / "nowhere", [], **fits)


@pytest.mark.parametrize("n_tokens", [0, 1, 4])
def test_an_empty_domain_is_refused_at_start(tmp_path, n_tokens):
    write_tokens(tmp_path, "small", "train", range(n_tokens))
    with pytest.raises(ValueError, match=f"domain small has {n_tokens} tokens"):
        Sampler([open_split(tmp_path, "small", "train", 4)], global_batch_size=1, seed=0)
