"""Masks and Lagrangian: equal to the authors' numbers, and what the method promises of them."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import ROOT, SHAPES, tiny_config

from l0 import (L0, LOG_ALPHA_MAX, LOG_ALPHA_MIN, MASKS, TopK, dims, expected_params, mask_sets, prob_open,
                sample, straight_through, undecided)
from model import ModelConfig
from run.processes import clip_and_step, make_optimizer

GOLDEN = np.load(ROOT / "tests" / "golden" / "l0_small.npz")
SOURCE = ModelConfig(vocab_size=128, hidden_size=64, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=16, intermediate_size=160)
TARGET = dataclasses.replace(SOURCE, hidden_size=32, n_layers=3, n_heads=2, n_kv_heads=2, intermediate_size=96)
SETS = ("head", "intermediate", "layer", "hidden")
GROUPED = tiny_config()  # d 32, L 4, H 4, K 2, f 48
GROUPED_TARGET = tiny_config(hidden_size=20, n_layers=3, n_heads=1, n_kv_heads=1, intermediate_size=30)


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name])).double()


def golden_masks() -> L0:
    masks = L0(mask_sets(SOURCE, TARGET)).double()
    assert masks.sets.keys() == set(SETS)
    with torch.no_grad():
        for m in SETS:
            masks.log_alpha[m].copy_(golden(f"{m}.log_alpha"))
            masks.lambda_[m].copy_(golden(f"{m}.lambda"))
            masks.phi[m].copy_(golden(f"{m}.phi"))
    masks.clamp_()
    return masks


def same(ours, name: str) -> None:
    ours = torch.as_tensor(ours, dtype=torch.float64).detach()
    torch.testing.assert_close(ours, golden(name).reshape(ours.shape), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("m", SETS)
def test_agrees_with_the_authors_masks(m):
    masks = golden_masks()
    same(masks.log_alpha[m], f"{m}.log_alpha_clamped")
    same(prob_open(masks.log_alpha[m]), f"{m}.prob_open")
    same(masks.open_units()[m], f"{m}.prob_open")
    same(masks.sparsity()[m], f"{m}.expected_sparsity")
    same(masks.target_sparsity(m, 10**6, warmup=10), f"{m}.target_sparsity")
    same(sample(masks.log_alpha[m], golden(f"{m}.u")), f"{m}.z_sampled")
    same(masks.deterministic(target=True)[m], f"{m}.z_target")
    same(masks.deterministic(target=False)[m], f"{m}.z_current")


@pytest.mark.parametrize("step", [0, 3, 10, 50])
def test_agrees_with_the_authors_lagrangian(step):
    masks = golden_masks()
    loss = masks.lagrangian(step, warmup=10)
    loss.backward()
    same(loss, f"step{step}.lagrangian_loss")
    for m in SETS:
        same(masks.target_sparsity(m, step, warmup=10), f"step{step}.{m}.ramped_target")
        for ours, name in ((masks.log_alpha, "log_alpha"), (masks.lambda_, "lambda"), (masks.phi, "phi")):
            same(ours[m].grad, f"step{step}.{m}.grad_{name}")


def test_agrees_with_the_authors_count_of_parameters():
    same(expected_params(SOURCE, golden_masks().open_units())[0], "expected_params")
    same(expected_params(SOURCE, {})[0], "prunable_params")
    same(expected_params(TARGET, {})[0], "prunable_target_params")


def spread(masks: L0) -> L0:
    """Every log_alpha somewhere else between its bounds."""
    with torch.no_grad():
        for i, p in enumerate(masks.log_alpha.values()):
            p.uniform_(LOG_ALPHA_MIN, LOG_ALPHA_MAX, generator=torch.Generator().manual_seed(i))
    return masks


def test_samples_are_open_as_often_as_prob_open_says():
    masks, n = spread(L0(mask_sets(GROUPED, GROUPED_TARGET))), 3000
    counts = {name: torch.zeros_like(p) for name, p in masks.log_alpha.items()}
    with torch.no_grad():
        for draw in range(n):
            for name, z in masks.sample(0, draw, 0).items():
                assert draw or bool(((z >= 0) & (z <= 1)).all())
                counts[name] += z != 0
    for name, p in masks.log_alpha.items():
        want = prob_open(p.detach())
        deviation = (counts[name] / n - want) / (want * (1 - want) / n).sqrt()
        assert deviation.abs().max() < 4.5, name  # some 300 units: expect 3
        assert deviation.square().mean() < 1.6, name


def test_exact_ones_and_zeros_occur_and_gradients_flow_between():
    masks = spread(L0(mask_sets(GROUPED, GROUPED_TARGET)))
    z = masks.sample(0, 0, 0)["intermediate"]
    assert (z == 0).any() and (z == 1).any()
    z.sum().backward()
    between = (z > 0) & (z < 1)
    assert torch.equal(masks.log_alpha["intermediate"].grad != 0, between)


def test_noise_follows_from_its_coordinates_alone():
    masks = spread(L0(mask_sets(GROUPED, GROUPED_TARGET)))
    state = torch.get_rng_state()
    draws = {at: torch.cat([z.flatten() for z in masks.sample(*at).values()])
             for at in itertools.product((0, 1), (0, 1, 2), (0, 1, 7))}
    torch.rand(3)
    for at, z in draws.items():
        assert torch.equal(torch.cat([x.flatten() for x in masks.sample(*at).values()]), z)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws.values(), 2))
    torch.set_rng_state(state)
    L0(mask_sets(GROUPED, GROUPED_TARGET), seed=3).sample(0, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fill", [LOG_ALPHA_MIN, LOG_ALPHA_MAX, 0.0, 1.0, "steps", "bounds"])
def test_each_row_keeps_exactly_the_targets_count(fill):
    masks = L0(mask_sets(GROUPED, GROUPED_TARGET))
    with torch.no_grad():
        for p in masks.log_alpha.values():
            if fill == "steps":  # many ties
                p.copy_((torch.arange(p.numel()) % 3).view(p.shape))
            elif fill == "bounds":
                p.copy_(torch.where(torch.arange(p.numel()) % 2 == 0, LOG_ALPHA_MIN, LOG_ALPHA_MAX).view(p.shape))
            else:
                p.fill_(fill)
    for name, z in masks.deterministic().items():
        assert bool(((z != 0).sum(-1) == masks.sets[name][1]).all()), name
        soft = torch.sigmoid(masks.log_alpha[name] * 1.5 * 0.8)
        assert torch.equal(z, torch.where(z == 0, 0.0, soft.detach()))
        cut, open_ = masks.log_alpha[name].masked_fill(z != 0, -9), masks.log_alpha[name].masked_fill(z == 0, 9)
        assert bool((cut.max(-1)[0] <= open_.min(-1)[0]).all())  # the smallest were cut
    for name, z in masks.deterministic(target=False).items():
        p = prob_open(masks.log_alpha[name].detach())
        assert torch.equal((z != 0).sum(-1).float(), p.shape[-1] - (p.shape[-1] - p.sum(-1)).round()), name


def at_target(masks: L0) -> L0:
    """Every unit at a bound, and as many open as the target has."""
    with torch.no_grad():
        for name, z in spread(masks).deterministic().items():
            masks.log_alpha[name].copy_(torch.where(z != 0, LOG_ALPHA_MAX, LOG_ALPHA_MIN))
    return masks


def test_rescaled_count_reads_the_target_of_decided_masks():
    for cfg, target in ((GROUPED, GROUPED_TARGET), (SOURCE, TARGET)):
        sets = mask_sets(cfg, target)
        rescaled, expected = (at_target(L0(sets, count=count)) for count in ("rescaled", "expected"))
        for name, s in rescaled.sparsity().items():
            t = rescaled.target_sparsity(name, 10, warmup=1)
            torch.testing.assert_close(s, torch.full_like(s, t), rtol=0, atol=1e-6)
            assert bool((expected.sparsity()[name] < t).all())  # why the option exists: spec 4
        assert float(rescaled.lagrangian(10, warmup=1).detach()) == 0
    half = L0({"hidden": ((64,), 32)})
    with torch.no_grad():
        half.log_alpha["hidden"][:32], half.log_alpha["hidden"][32:] = LOG_ALPHA_MIN, LOG_ALPHA_MAX
    assert float(half.sparsity()["hidden"].detach()) == pytest.approx(0.477, abs=1e-3)  # spec 4's figure


def test_undecided_counts_near_dead_and_soft_units():
    masks = L0({"hidden": ((10,), 6)})
    with torch.no_grad():
        masks.log_alpha["hidden"].copy_(torch.tensor([LOG_ALPHA_MIN] * 6 + [0.0, 1.0] + [LOG_ALPHA_MAX] * 2))
    assert undecided(masks.deterministic()["hidden"]) == (2, 2)


def test_multipliers_climb_while_the_model_is_too_dense():
    masks = L0(mask_sets(GROUPED, GROUPED_TARGET))  # all open
    optimizer = torch.optim.AdamW(  # as prune.py has it
        [dict(params=[*masks.lambda_.values(), *masks.phi.values()], maximize=True)], lr=0.1, weight_decay=0.0)
    first = masks.lagrangian(5, warmup=1).detach()
    for _ in range(3):
        optimizer.zero_grad()
        masks.lagrangian(5, warmup=1).backward()
        optimizer.step()
    assert first == 0  # the multipliers start at 0
    assert all(v < 0 for v in masks.lambda_.values()), "s < t, so lambda (s - t) grows with a falling lambda"
    assert all(v > 0 for v in masks.phi.values())
    assert masks.lagrangian(5, warmup=1) > first
    masks.lagrangian(5, warmup=1).backward()
    for p in masks.log_alpha.values():
        assert bool((p.grad > 0).all())  # and so descent closes units


def test_target_sparsity_is_a_ramp():
    masks = L0({"hidden": ((10,), 4)})
    found = [masks.target_sparsity("hidden", s, warmup=4, start=0.2) for s in (0, 1, 2, 4, 100)]
    np.testing.assert_allclose(found, [0.2, 0.3, 0.4, 0.6, 0.6])
    assert masks.target_sparsity("hidden", 0, warmup=0) == 0 and masks.target_sparsity("hidden", 1, warmup=0) == 0.6


def test_clamp_bounds_and_start():
    masks = L0(mask_sets(GROUPED, GROUPED_TARGET))
    assert all(bool((p == p.new_tensor(LOG_ALPHA_MAX)).all()) for p in masks.log_alpha.values())
    with torch.no_grad():
        for p in masks.log_alpha.values():
            p.fill_(-50)
    masks.clamp_()
    assert all(bool((p == p.new_tensor(LOG_ALPHA_MIN)).all()) for p in masks.log_alpha.values())


def matrices(cfg: ModelConfig) -> int:
    return cfg.n_layers * (2 * (cfg.n_heads + cfg.n_kv_heads) * cfg.head_dim * cfg.hidden_size
                           + (2 + cfg.gated_mlp) * cfg.hidden_size * cfg.intermediate_size)


@pytest.mark.parametrize("changes", [dict(tie_embeddings=True), *SHAPES.values()])
@pytest.mark.parametrize("source, target", [(GROUPED, GROUPED_TARGET), (SOURCE, TARGET), (GROUPED, GROUPED)])
def test_expected_params_are_the_real_ones_where_masks_are_decided(source, target, changes):
    changes = {name: value for name, value in changes.items() if "heads" not in name}
    source, target = (dataclasses.replace(c, **changes) for c in (source, target))
    masks = L0(mask_sets(source, target))
    closed = {name: (z != 0).double() for name, z in spread(masks).deterministic().items()}
    everything = {name: torch.ones_like(z) for name, z in closed.items()}
    for p_open, cfg in ((everything, source), ({}, source), (closed, target)):
        prunable, total = expected_params(source, p_open)
        assert float(prunable) == matrices(cfg)
        assert float(total) == cfg.n_params()


@pytest.mark.parametrize("gqa", [False, True])
def test_expected_params_are_the_mean_over_masks(gqa):
    """Against the mean of the exact count over independent draws of all sets, blocks closed one by one included."""
    source = tiny_config(hidden_size=5, n_layers=3, n_heads=4, n_kv_heads=2 if gqa else 4, intermediate_size=6)
    n, generator = dims(source), torch.Generator().manual_seed(0)
    names = [m for m in MASKS if m not in (("head",) if gqa else ("kv_head", "query_head"))]
    p = {m: torch.empty([n[x] for x in MASKS[m]]).uniform_(0.2, 1, generator=generator).double() for m in names}
    draws = 4000
    z = {m: (torch.rand((draws, *q.shape), generator=generator, dtype=torch.float64) < q).double() for m, q in p.items()}
    kv = z["kv_head"] if gqa else z["head"]
    query = (z["kv_head"][..., None] * z["query_head"]).flatten(2) if gqa else z["head"]
    heads = source.head_dim * 2 * (query.sum(2) + kv.sum(2))  # (draws, L)
    layers = z["layer"] * (z["head_layer"] * heads + z["mlp"] * 3 * z["intermediate"].sum(2))
    count = z["hidden"].sum(1) * layers.sum(1)
    error = float(count.mean() - expected_params(source, p)[0])
    assert abs(error) < 4 * float(count.std()) / draws**0.5


def all_shapes():
    for d, L, K, G, f in itertools.product((2, 3), (1, 2), (1, 2, 3), (1, 2), (3, 4)):
        yield tiny_config(hidden_size=d, n_layers=L, n_heads=K * G, n_kv_heads=K, intermediate_size=f)


def test_every_pair_of_shapes_is_reached_or_refused():
    letters = {"d": "hidden", "L": "layer", "f": "intermediate", "K": "kv_head", "G": "query_head"}
    reached = 0
    for source, target in itertools.product(all_shapes(), all_shapes()):
        a, b = dims(source), dims(target)
        gqa = a["K"] != a["H"]
        if any(b[x] > a[x] for x in "dLHKGf") or (not gqa and b["K"] != b["H"]):
            with pytest.raises(ValueError, match="target"):
                mask_sets(source, target)
            continue
        reached += 1
        names = letters if gqa else {"d": "hidden", "L": "layer", "f": "intermediate", "H": "head"}
        sets = mask_sets(source, target)
        assert sets.keys() == {m for x, m in names.items() if a[x] != b[x]}
        for name, (shape, kept) in sets.items():
            assert shape == tuple(a[x] for x in MASKS[name]) and kept == b[MASKS[name][-1]]
        if "kv_head" in sets or "query_head" in sets:  # the two factors make exactly the target's heads
            assert (sets.get("kv_head", (0, a["K"]))[1], sets.get("query_head", (0, a["G"]))[1]) == (b["K"], b["G"])
        for left_out in sets:  # a dimension that shrinks without a mask is refused
            with pytest.raises(ValueError, match=left_out):
                mask_sets(source, target, tuple(m for m in sets if m != left_out))
    assert reached > 300


@pytest.mark.parametrize("source, changes, modules, named", [
    (GROUPED, dict(hidden_size=33), None, "hidden_size = 33.*32"),
    (GROUPED, dict(n_layers=5), None, "n_layers = 5.*4"),
    (GROUPED, dict(n_heads=8, n_kv_heads=2), None, "n_heads = 8.*4"),
    (GROUPED, dict(n_heads=4, n_kv_heads=4), None, "n_kv_heads = 4.*2"),
    (GROUPED, dict(n_heads=4, n_kv_heads=1), None, "query heads a KV head = 4.*2"),
    (GROUPED, dict(intermediate_size=49), None, "intermediate_size = 49.*48"),
    (SOURCE, dict(n_heads=4, n_kv_heads=2), None, "n_kv_heads = 2.*n_heads = 4"),
    (GROUPED, {}, ("hiden",), "hiden.*hidden"),
    (GROUPED, {}, ("head",), "head.*kv_head and query_head"),
    (SOURCE, {}, ("kv_head",), "kv_head.*take head"),
    (GROUPED, dict(n_layers=3), ("hidden",), "L = 3.*layer or head_layer or mlp"),
])
def test_unreachable_targets_are_refused_by_name(source, changes, modules, named):
    with pytest.raises(ValueError, match=named):
        mask_sets(source, dataclasses.replace(source, **changes), modules)


def test_block_masks_stand_in_for_layers():
    target = dataclasses.replace(GROUPED, n_layers=3)
    assert mask_sets(GROUPED, target, ("head_layer", "mlp")) == {"head_layer": ((4,), 3), "mlp": ((4,), 3)}
    assert mask_sets(GROUPED, GROUPED, tuple(m for m in MASKS if m != "head")) == {}


@pytest.mark.parametrize("shape, count", [((10,), 4), ((3, 7), 7), ((2, 3, 2), 1), ((5, 400), 399), ((2, 3), 0)])
def test_hard_masks_pass_the_gradient_of_soft_ones(shape, count):
    scores = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = straight_through(scores, count)
    assert set(z.detach().unique().tolist()) <= {0.0, 1.0} and (z.sum(-1) == count).all()
    assert (z.gather(-1, scores.argsort(-1)).diff(dim=-1) >= 0).all()  # the highest are kept
    z.sum().backward()
    assert (scores.grad > 0).all() and scores.grad.max() <= 0.25
    nearest = scores.grad.argmax(-1)  # a unit next to the threshold feels the most
    rank = scores.argsort(-1).argsort(-1).gather(-1, nearest[..., None]).squeeze(-1)
    assert ((rank - (shape[-1] - count)).abs() <= 1).all()


def test_scores_close_units_by_the_ramp_and_keep_the_highest():
    sets = mask_sets(GROUPED, GROUPED_TARGET)
    masks = TopK(sets, ramp=5)
    scores = {name: torch.rand(shape) + 0.1 for name, (shape, _) in sets.items()}
    masks.start_from(scores)
    for step in range(10):
        for name, z in masks.sample(0, step, 0).items():
            size, kept = sets[name][0][-1], sets[name][1]
            asked = kept if name == "layer" else round(size + (kept - size) * min(1, (step + 1) / 5))
            assert ((z == 1).sum(-1) == asked).all() and ((z == 0).sum(-1) == size - asked).all()
    assert [masks.scores[name].requires_grad for name in ("hidden", "layer")] == [True, False]  # as the start says
    for name, z in masks.deterministic().items():
        kept = sets[name][1]
        assert set(z.unique().tolist()) == {0.0, 1.0} and (z.sum(-1) == kept).all()
        lowest = scores[name].masked_fill(z == 0, 9.0).amin(-1)  # the highest scores of each row are those kept
        assert (lowest >= scores[name].masked_fill(z == 1, -9.0).amax(-1)).all()


def test_a_step_moves_a_score_by_its_share_of_the_gradient_of_its_row():
    masks = TopK({"intermediate": ((2, 4), 2)})
    before = masks.scores["intermediate"].detach().clone()
    optimizer = make_optimizer(masks.parameter_groups(mask_lr=0.1, multiplier_lr=1.0))
    worth = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1e-6, 2e-6, 0.0]])  # of an open unit to the loss, which is to fall
    (masks.sample(0, 0, 0)["intermediate"] * worth).sum().backward()
    masks.finish_gradients_(0)
    clip_and_step(optimizer, 1.0, 1e-3)  # clipping is for weights
    moved = masks.scores["intermediate"].detach() - before
    even = worth / worth.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(moved, -0.1 * even, rtol=0.03, atol=1e-6)


def test_a_unit_that_the_start_overlooks_comes_back():
    masks = TopK({"hidden": ((6,), 3)})
    masks.start_from({"hidden": torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])})
    optimizer = make_optimizer(masks.parameter_groups(mask_lr=0.1, multiplier_lr=1.0))
    target = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.5])
    for step in range(80):
        (masks.sample(0, step, 0)["hidden"] - target).square().sum().backward()
        masks.finish_gradients_(step)
        clip_and_step(optimizer, 1.0, 1.0)
    torch.testing.assert_close(masks.deterministic()["hidden"], target, rtol=0.05, atol=0)  # units and what they are worth
