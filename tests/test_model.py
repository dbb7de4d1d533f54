"""The model computes what the method says, and its options change nothing but cost."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHAPES, random_model, random_tokens, soft_mask, tiny_config

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from l0 import MASKS, dims
from model import HeadLoss, ModelConfig, Transformer, init_weights, rope_tables

GOLDEN = np.load(ROOT / "tests" / "golden" / "model_small.npz")
GOLDEN_NAMES = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.wq": "self_attn.q_proj",
                "attn.wk": "self_attn.k_proj", "attn.wv": "self_attn.v_proj", "attn.out_proj": "self_attn.o_proj",
                "mlp.gate_proj": "mlp.gate_proj", "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj"}
GQA_SETS = ("hidden", "layer", "intermediate", "head_layer", "mlp", "kv_head", "query_head")


def golden_model() -> Transformer:
    """The authors' model, in float64."""
    cfg = ModelConfig(vocab_size=128, hidden_size=64, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=16,
                      intermediate_size=160)
    names = {"wte": "model.embed_tokens", "ln_f": "model.norm", "output": "lm_head"}
    for i, (theirs, ours) in itertools.product(range(4), GOLDEN_NAMES.items()):
        names[f"blocks.{i}.{theirs}"] = f"model.layers.{i}.{ours}"
    weights = {}
    for key in GOLDEN.files:
        if key.startswith("weight."):
            name = key.removeprefix("weight.").removesuffix(".weight")
            weights[names[name] + ".weight"] = torch.from_numpy(GOLDEN[key]).double()
    model = Transformer(cfg).double()
    model.load_state_dict(weights)
    return model


def random_masks(cfg: ModelConfig, sets=GQA_SETS, seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Soft masks of these sets; about two thirds of each row are open."""
    generator, n, masks = torch.Generator().manual_seed(seed), dims(cfg), {}
    for name in sets:
        shape = tuple(n[x] for x in MASKS[name])
        masks[name] = soft_mask(shape, max(1, 2 * shape[-1] // 3), generator).to(dtype)
    return masks


@pytest.mark.parametrize("which", ["dense", "sampled", "target"])
@torch.no_grad()
def test_agrees_with_the_authors_model(which):
    model, tokens = golden_model(), torch.from_numpy(GOLDEN["input_ids"]).long()
    masks = {k.split(".")[-1]: torch.from_numpy(GOLDEN[k]).double() for k in GOLDEN.files if k.startswith(f"z.{which}.")}
    assert masks.keys() == (set() if which == "dense" else {"head", "intermediate", "layer", "hidden"})
    want = torch.from_numpy(GOLDEN[f"logits.{which}"]).double()
    error = (model(tokens, masks=masks) - want).abs().max() / want.abs().max()  # relative to the largest logit
    assert error < 1e-6, error
    assert float(model(tokens[:, :-1], tokens[:, 1:], masks)) == pytest.approx(float(GOLDEN[f"ce.{which}"]), rel=1e-6)


def written_out(model: Transformer, tokens: torch.Tensor, z: dict[str, torch.Tensor]) -> torch.Tensor:
    """Spec 3 as it stands there: masks on activations, attention head by head.  float64; z has every set of MASKS."""
    cfg, hidden, keep = model.cfg, z["hidden"], z["hidden"] != 0
    T, h, turned = tokens.shape[1], cfg.head_dim, cfg.rotary_dims or cfg.head_dim
    cos, sin = rope_tables(cfg, T, tokens.device)
    turn = torch.complex(cos.double(), sin.double())  # (T, turned/2)
    activation = {"silu": F.silu, "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2, "gelu_pytorch_tanh":
                  lambda x: x * (1 + torch.tanh((2 / torch.pi)**0.5 * (x + 0.044715 * x**3))) / 2}[cfg.activation]

    def norm(x, module, kept, factor):  # of the kept dims, as if the others were not there
        y = x[..., kept]
        if module.bias is not None:
            y = y - y.mean(-1, keepdim=True)
        y = y / (y.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * module.weight[kept]
        y = y if module.bias is None else y + module.bias[kept]
        return torch.zeros_like(x).index_add_(-1, kept.nonzero().flatten(), y) * factor

    def rotated(x):  # (B, T, h)
        a, b, rest = x.split((turned // 2, turned // 2, h - turned), -1)
        y = torch.complex(a, b) * turn
        return torch.cat((y.real, y.imag, rest), -1)

    def attention(a, y, i):
        q, k, v = a.q_proj(y), a.k_proj(y), a.v_proj(y)
        group = cfg.n_heads // cfg.n_kv_heads
        factors = (z["kv_head"][i][:, None] * z["query_head"][i] * z["head"][i].view(-1, group)).flatten()  # (H)
        if cfg.qk_norm == "all":
            is_open = factors != 0
            q = norm(q, a.q_norm, is_open.repeat_interleave(h), 1)
            k = norm(k, a.k_norm, is_open.view(-1, group).any(1).repeat_interleave(h), 1)
        contexts = []
        for head in range(cfg.n_heads):
            at, kv_at = (slice(n * h, (n + 1) * h) for n in (head, head // group))
            one_q, one_k = q[..., at], k[..., kv_at]
            if cfg.qk_norm == "head":
                every = torch.ones(h).bool()
                one_q, one_k = norm(one_q, a.q_norm, every, 1), norm(one_k, a.k_norm, every, 1)
            scores = rotated(one_q) @ rotated(one_k).transpose(1, 2) / h**0.5  # (B, T, T)
            seen = torch.ones(T, T).tril().bool()
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            contexts.append(weights @ v[..., kv_at] * factors[head])
        return a.o_proj(torch.cat(contexts, -1))

    def mlp(m, y, i):
        if cfg.gated_mlp:
            return m.down_proj(activation(m.gate_proj(y)) * m.up_proj(y) * z["intermediate"][i])
        return m.down_proj(activation(m.up_proj(y)) * z["intermediate"][i])

    def block(x, module, what, its_norm, i, factor):
        if cfg.norm_after:
            return norm(what(module, x, i), its_norm, keep, hidden) * factor
        return what(module, norm(x, its_norm, keep, hidden), i) * factor * hidden

    x = model.model["embed_tokens"](tokens) * hidden
    for i, layer in enumerate(model.model["layers"]):
        y = x + block(x, layer.self_attn, attention, layer.input_layernorm, i, z["layer"][i] * z["head_layer"][i])
        x = y + block(x if cfg.parallel_residual else y, layer.mlp, mlp, layer.post_attention_layernorm, i,
                      z["layer"][i] * z["mlp"][i])
    head = model.model["embed_tokens"] if cfg.tie_embeddings else model.lm_head
    return norm(x, model.model["norm"], keep, hidden) @ head.weight.T


@pytest.mark.parametrize("sets", [(), *itertools.combinations(GQA_SETS, 1), ("kv_head", "query_head"), GQA_SETS])
@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_is_the_method_written_out(sets, family):
    cfg = tiny_config(n_layers=3, **SHAPES[family])
    model, tokens = random_model(cfg, dtype=torch.float64), random_tokens(cfg)
    masks = random_masks(cfg, sets, dtype=torch.float64)
    every = {name: torch.ones([dims(cfg)[x] for x in axes], dtype=torch.float64) for name, axes in MASKS.items()}
    torch.testing.assert_close(model(tokens, masks=masks), written_out(model, tokens, every | masks), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_masks_of_ones_are_no_masks(family):
    cfg = tiny_config(**SHAPES[family])
    model, tokens = random_model(cfg), random_tokens(cfg)
    ones = {name: torch.ones_like(z) for name, z in random_masks(cfg).items()}
    assert torch.equal(model(tokens, masks=ones), model(tokens))


@pytest.mark.parametrize("family", SHAPES)
def test_closing_everything_is_still_finite(family):
    """A sample of the masks may close all heads or all units of a layer."""
    cfg = tiny_config(**SHAPES[family])
    model, tokens = random_model(cfg), random_tokens(cfg)
    masks = {name: torch.zeros([dims(cfg)[x] for x in MASKS[name]], requires_grad=True) for name in GQA_SETS[1:]}
    gradients = torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:], masks), [*model.parameters(), *masks.values()])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("tie", [False, True])
@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_logits(tie, monkeypatch):
    monkeypatch.setattr("model.LOSS_BYTES", 10 * 4 * 64)  # several chunks, the last of them short
    cfg = tiny_config(tie_embeddings=tie)
    model, tokens, masks = random_model(cfg), random_tokens(cfg, B=3, T=17), random_masks(cfg)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    for z in (None, masks):
        each = F.cross_entropy(model(inputs, masks=z).transpose(1, 2), targets, reduction="none")
        torch.testing.assert_close(model(inputs, targets, z), each.mean())
        torch.testing.assert_close(model(inputs, targets, z, reduction="none"), each.mean(1))


def test_gradient_of_the_loss_is_that_of_plain_cross_entropy(monkeypatch):
    """In fp32 to 1e-6 with frozen parts left out, and in fp64 against differences; under checkpointing too."""
    monkeypatch.setattr("model.LOSS_BYTES", 5 * 8 * 11)
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(n, 6, generator=generator, dtype=torch.float64).requires_grad_() for n in (12, 11))
    targets = torch.randint(11, (12,), generator=generator)

    def loss(x, head):
        return HeadLoss.apply(x, head, targets, x.dtype)[0]

    # checkpointing computes the forward pass again for each of gradcheck's backward passes: one alone may take its gradients
    assert torch.autograd.gradcheck(lambda *given: checkpoint(loss, *given, use_reentrant=False), (x, head))
    x, head = (t.detach().float().requires_grad_() for t in (x, head))
    want = torch.autograd.grad(3 * F.cross_entropy(x @ head.T, targets), (x, head))
    found = torch.autograd.grad(3 * loss(x, head), (x, head))
    alone = torch.autograd.grad(3 * loss(x, head.detach()), x) + torch.autograd.grad(3 * loss(x.detach(), head), head)
    for a, b, c in zip(found, alone, want):
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # a second pass would scale them again
        again = 3 * loss(x, head)
        again.backward(retain_graph=True)
        again.backward()


def distillation(x, head, teacher_x, teacher_head, targets, w):
    """The plain formula, with [N, V] tensors: loss, cross-entropy, KL."""
    log_p, log_q = ((a @ b.T).log_softmax(-1) for a, b in ((x, head), (teacher_x, teacher_head)))
    ce, kl = F.nll_loss(log_p, targets), F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return (1 - w) * ce + w * kl, ce, kl


@pytest.mark.parametrize("w", [0.3, 1.0])
def test_distillation_is_the_plain_formula(w, monkeypatch):
    """Losses and gradients in fp32 to 1e-6, and in fp64 against differences; a teacher of another width."""
    monkeypatch.setattr("model.LOSS_BYTES", 8 * 8 * 11)
    generator = torch.Generator().manual_seed(0)
    x, head, teacher_x, teacher_head = (torch.randn(n, d, generator=generator, dtype=torch.float64)
                                        for n, d in ((12, 6), (11, 6), (12, 9), (11, 9)))
    targets = torch.randint(11, (12,), generator=generator)

    def losses(x, head):
        return HeadLoss.apply(x, head, targets, x.dtype, teacher_x.to(x.dtype), teacher_head.to(x.dtype), w)

    assert torch.autograd.gradcheck(lambda *given: checkpoint(lambda *pair: losses(*pair)[0], *given, use_reentrant=False),
                                    (x.requires_grad_(), head.requires_grad_()))
    x, head = (t.detach().float().requires_grad_() for t in (x, head))
    want, (loss, each, kl) = distillation(x, head, teacher_x.float(), teacher_head.float(), targets, w), losses(x, head)
    for a, b in zip((loss, each.mean(), kl), want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, (x, head)), torch.autograd.grad(want[0], (x, head))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not each.requires_grad and not kl.requires_grad


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    model, tokens = random_model(tiny_config()), random_tokens(tiny_config(), T=13)
    with torch.no_grad():
        teacher = model.body(tokens)
    losses = model(tokens, tokens, teacher=teacher, kd_weight=1.0)
    assert losses["loss"] == losses["loss/kl"] == 0
    assert torch.equal(losses["loss/ce"], model(tokens, tokens))
    assert all(g.eq(0).all() for g in torch.autograd.grad(losses["loss"], model.parameters()))


class RoundedOnce(TorchDispatchMode):
    """Products in bf16 as a GPU takes them: added up in fp32, then rounded.  The CPU's own take 100 times as long."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.bfloat16:
            return (args[0].float() @ args[1].float()).bfloat16()
        return func(*args, **(kwargs or {}))


def test_gradient_of_the_head_in_bf16_is_as_near_as_one_rounding(monkeypatch):
    monkeypatch.setattr("model.LOSS_BYTES", 500 * 4 * 2000)
    generator, V, N = torch.Generator().manual_seed(0), 2000, 4000
    targets = torch.multinomial(1 / torch.arange(1.0, V + 1), N, replacement=True, generator=generator)  # Zipf's law
    x = torch.randn(N, 64, generator=generator)
    head = (0.02 * torch.randn(V, 64, generator=generator)).requires_grad_()
    want, = torch.autograd.grad(F.cross_entropy(x @ head.T, targets), head)
    with RoundedOnce():
        found, = torch.autograd.grad(HeadLoss.apply(x, head, targets, torch.bfloat16)[0], head)
    assert found.dtype == torch.float32
    assert (found - want).norm() < 0.0025 * want.norm()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "olmo2"])
@torch.no_grad()
def test_bf16_autocast_stays_close(family):
    cfg = tiny_config(**SHAPES[family] | dict(n_layers=2))
    model, tokens, masks = random_model(cfg), random_tokens(cfg, B=1, T=9), random_masks(cfg)
    exact = model(tokens[:, :-1], tokens[:, 1:], masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = model(tokens[:, :-1], tokens[:, 1:], masks)
        each = model(tokens[:, :-1], tokens[:, 1:], masks, reduction="none")
    assert mean.dtype == each.dtype == torch.float32  # the mean is not rounded to bf16's three digits
    assert abs(mean - exact) < 0.05 * exact
    torch.testing.assert_close(each[0], mean, rtol=1e-3, atol=0)


@pytest.mark.parametrize("changes", [
    *SHAPES.values(), dict(tie_embeddings=True), dict(gated_mlp=False, mlp_bias=True),
    dict(qkv_bias=True, o_bias=True, n_kv_heads=1),
    dict(o_bias=True, n_kv_heads=4, head_dim=10), dict(hidden_size=20, n_layers=1, n_heads=6, n_kv_heads=3),
])
def test_n_params_counts_the_shapes(changes):
    cfg = tiny_config(**changes)
    assert cfg.n_params() == sum(p.numel() for p in Transformer(cfg).parameters())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "olmo2"])
def test_flops_are_six_a_weight_and_causal_attention(family):
    """A shape without attention worth the name: 6 x (matrix weights, the head among them)."""
    cfg = tiny_config(**SHAPES[family])
    weights = sum(p.numel() for n, p in Transformer(cfg).named_parameters() if p.dim() == 2 and "embed" not in n)
    assert cfg.train_flops_per_token(0) == 6 * weights
    T, H, h = 50, cfg.n_heads, cfg.head_dim
    causal = 2 * 2 * h * H * cfg.n_layers * T / 2  # two products, two operations an element, half of them masked
    assert cfg.train_flops_per_token(T) - 6 * weights == 3 * causal  # forward, and twice that backward


def test_checkpointing_changes_nothing():
    cfg, found = tiny_config(), []
    tokens, masks = random_tokens(cfg, T=13), {n: z.requires_grad_() for n, z in random_masks(cfg).items()}
    for checkpointing in ("none", "selective", "full"):
        model = Transformer(cfg, checkpointing=checkpointing)
        model.load_state_dict(random_model(cfg).state_dict())
        loss = model(tokens[:, :-1], tokens[:, 1:], masks)
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters(), *masks.values()])])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found))


def fresh(seed: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Transformer(tiny_config(qkv_bias=True))
    model = model.to_empty(device="cpu")
    init_weights(model, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_fresh_weights_follow_from_the_seed_alone():
    state = torch.get_rng_state()
    a, b, c = fresh(1), fresh(1), fresh(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(not torch.equal(a[n], c[n]) for n in a if a[n].dim() == 2)
    assert all(p.isfinite().all() and p.abs().max() <= 1 for p in a.values())


@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_no_token_sees_the_future(family):
    cfg = tiny_config(**SHAPES[family])
    model, tokens, masks = random_model(cfg), random_tokens(cfg, B=1, T=12), random_masks(cfg)
    before = model(tokens, masks=masks)
    for t in (0, 5, 11):
        changed = tokens.clone()
        changed[0, t] = (tokens[0, t] + 1) % cfg.vocab_size
        after = model(changed, masks=masks)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-6, atol=1e-6)
        assert all((after[0, i] - before[0, i]).abs().max() > 1e-4 for i in range(t, 12))


@pytest.mark.parametrize("changes, sets", [
    (dict(n_kv_heads=2, qkv_bias=True, o_bias=True), GQA_SETS), (SHAPES["olmo2"], GQA_SETS),
    (dict(n_kv_heads=4, qkv_bias=True, o_bias=True), ("hidden", "layer", "head", "intermediate")),
    (SHAPES["gpt_neox"], ("hidden", "layer", "head", "intermediate"))])
def test_gradients_of_masks_are_finite_differences(changes, sets):
    cfg = tiny_config(**dict(hidden_size=6, n_layers=2, intermediate_size=5, head_dim=4) | changes)
    model, tokens = random_model(cfg, dtype=torch.float64), random_tokens(cfg, T=7)
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.empty(z.shape, dtype=torch.float64).uniform_(0.2, 0.9, generator=generator).requires_grad_()
             for name, z in random_masks(cfg, sets).items()}

    # not torch's gradcheck: it runs backward twice, which the loss refuses
    gradients = torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:], masks), list(masks.values()))
    with torch.no_grad():
        for z, gradient in zip(masks.values(), gradients):
            for value, want in zip(z.view(-1), gradient.flatten()):  # value is a view: it changes z
                value.add_(1e-5)
                above = model(tokens[:, :-1], tokens[:, 1:], masks)
                value.sub_(2e-5)
                below = model(tokens[:, :-1], tokens[:, 1:], masks)
                value.add_(1e-5)
                torch.testing.assert_close((above - below) / 2e-5, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family, masked", [("llama", False), ("llama", True), ("gpt_neox", True),
                                            ("all at once", True)])
def test_compiles_into_one_graph(family, masked):
    cfg = tiny_config(**dict(n_layers=2) | SHAPES[family])
    model, tokens = random_model(cfg), random_tokens(cfg, T=9)
    masks = {n: z.requires_grad_() for n, z in random_masks(cfg).items()} if masked else {}
    leaves = [*model.parameters(), *masks.values()]
    eager = model(tokens[:, :-1], tokens[:, 1:], masks)
    want = torch.autograd.grad(eager, leaves)
    torch._dynamo.reset()
    # aot_eager: the graph that a real backend gets, forward and backward, without the minutes of its C++ compiler
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens[:, :-1], tokens[:, 1:], masks)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, leaves), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    teacher = tuple(t.detach() for t in random_model(cfg, seed=1).body(tokens[:, :-1]))
    plain, compiled = (f(tokens[:, :-1], tokens[:, 1:], masks, teacher=teacher, kd_weight=0.3)["loss"] for f in (
        model, torch.compile(model, fullgraph=True, backend="aot_eager")))
    for a, b in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scaling", [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 512},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0,
     "original_max_position_embeddings": 64},
])
def test_rotary_tables_are_those_of_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    cfg = tiny_config(head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    theirs = LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=4096,
                         rope_parameters={"rope_type": "default", "rope_theta": 5e5} | (scaling or {}))
    T = 64
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(T)[None])  # (1, T, h): the half twice
    for ours, want in zip(rope_tables(cfg, T, torch.device("cpu")), (cos, sin)):
        torch.testing.assert_close(ours, want[0, :, :32], rtol=0, atol=1e-5)


def test_config_survives_json():
    for changes in (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), *SHAPES.values()):
        cfg = tiny_config(**changes)
        assert ModelConfig.from_json(cfg.to_json()) == cfg


@pytest.mark.parametrize("change, named", [
    (dict(hidden_size=0), "hidden_size"), (dict(hidden_size=32.0), "hidden_size"), (dict(n_layers=True), "n_layers"),
    (dict(n_heads="4"), "n_heads"), (dict(n_kv_heads=3), "n_kv_heads"), (dict(head_dim=7), "head_dim"),
    (dict(norm_eps=-1.0), "norm_eps"), (dict(rope_theta="1e4"), "rope_theta"), (dict(norm_eps=float("nan")), "norm_eps"),
    (dict(tie_embeddings=1), "tie_embeddings"), (dict(rope_scaling={"rope_type": "yarn"}), "yarn"),
    (dict(rope_scaling={"rope_type": "linear"}), "factor"), (dict(rope_scaling="linear"), "rope_scaling"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 0}), "factor"),
    (dict(norm="batch"), "norm = 'batch' is not one of rms, layer"), (dict(activation=None), "activation"),
    (dict(qk_norm=["all"]), "qk_norm"), (dict(rotary_dims=3), "rotary_dims = 3"),
    (dict(rotary_dims=8), "below head_dim = 8"), (dict(rotary_dims=2.0), "rotary_dims = 2.0"),
    (dict(norm_after=True, parallel_residual=True), "norm_after"),
    (dict(colour="red"), "colour"), (dict(vocab_size=None), "vocab_size"),
])
def test_bad_configs_are_refused_by_name(change, named):
    text = json.dumps(dataclasses.asdict(tiny_config()) | change)
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"vocab_size": 3}', "{'a': 1}"])
def test_what_is_no_config_is_a_value_error(text):
    with pytest.raises(ValueError):
        ModelConfig.from_json(text)
