"""The Llama decoder and its relatives, with an optional `masks` argument that makes it the model compact.py would cut out.

Shapes: L layers, d hidden size, H query heads, K key/value heads, G = H // K, h head dim, f MLP intermediate size,
V vocabulary, B sequences, T tokens.  Parameters carry Hugging Face Llama's names, so a checkpoint of that family
loads as it is.

A mask is a tensor of factors of at least 0, one for each unit; `masks` is a dict with any of the sets of l0.MASKS.  The
forward pass scales *weights* by the masks, never activations: `o_proj(context * z) * z'` is computed as
`(z' o_proj z)(context)`.  That is what compaction does once and for all, so the two agree to rounding, in bf16 too, and
it is cheaper: a weight is smaller than its activations as soon as a micro-batch has more tokens than the layer has rows.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from run import fields

MAX_LAYERS, MAX_PARAMS = 1000, 10**14  # more is a damaged file's, and would take for ever to build
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
               "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu}  # named as by Hugging Face
CHOICES = {"norm": ("rms", "layer"), "qk_norm": ("none", "head", "all"), "activation": (*ACTIVATIONS,)}
LOSS_BYTES = 1 << 26  # of fp32 logits alive at a time in the loss, instead of B*T x V: 524 rows at V = 32,000; on CUDA 4 x


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model and nothing else: the defaults are Llama's.  Raises ValueError if it does not fit together."""

    vocab_size: int  # V
    hidden_size: int  # d
    n_layers: int  # L
    n_heads: int  # H, query heads
    n_kv_heads: int  # K, key/value heads; K = H is multi-head attention, 1 < K < H grouped-query
    head_dim: int  # h; not always d / H, and seldom after pruning
    intermediate_size: int  # f
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", ...}, keys as in Hugging Face configs
    context_length: int = 4096  # tokens; the longest sequence that the rotary embedding is meant for
    tie_embeddings: bool = False  # the LM head is the embedding matrix
    qkv_bias: bool = False  # Qwen2
    o_bias: bool = False  # Llama with attention_bias has this and qkv_bias
    mlp_bias: bool = False  # on each matrix of the MLP
    gated_mlp: bool = True  # down(activation(gate x) * up x); False, GPT-NeoX: down(activation(up x))
    activation: str = "silu"  # of ACTIVATIONS
    norm: str = "rms"  # "layer", GPT-NeoX: with the mean taken off, and a bias
    norm_after: bool = False  # OLMo 2: the norms take what the blocks put out, not what they take in
    qk_norm: str = "none"  # RMS norm of queries and keys: "head", each head by itself (Qwen3); "all" at once (OLMo 2)
    parallel_residual: bool = False  # GPT-NeoX: attention and MLP of a layer both take its input
    rotary_dims: int | None = None  # so many of a head's dims, the first ones, are turned; None: all

    def __post_init__(self):
        fields.check_fields(self, CHOICES)
        fields.check_rope_scaling(self.rope_scaling)
        if self.n_layers > MAX_LAYERS or self.n_params() > MAX_PARAMS:
            raise ValueError(f"n_layers = {self.n_layers}, {self.n_params():.3g} parameters: more than "
                             f"{MAX_LAYERS} layers or {MAX_PARAMS:.0e} parameters are refused")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide by n_kv_heads = {self.n_kv_heads}")
        if self.rotary_dims is None and self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd, and rotary embeddings turn pairs")
        if (r := self.rotary_dims) is not None and (type(r) is not int or not 0 < r < self.head_dim or r % 2):
            raise ValueError(f"rotary_dims = {r!r} is not an even number below head_dim = {self.head_dim} (none: all)")
        if self.norm_after and self.parallel_residual:
            raise ValueError("norm_after = True does not go with parallel_residual = True")

    from_json, from_dict = classmethod(fields.from_json), classmethod(fields.from_dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def n_params(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        d, L, qkv, o = self.hidden_size, self.n_layers, self.n_heads + 2 * self.n_kv_heads, self.n_heads * self.head_dim
        attention = qkv * self.head_dim * (d + self.qkv_bias) + d * (o + self.o_bias)
        attention += {"none": 0, "head": 2, "all": self.n_heads + self.n_kv_heads}[self.qk_norm] * self.head_dim
        mlp = (2 + self.gated_mlp) * d * self.intermediate_size
        mlp += self.mlp_bias * ((1 + self.gated_mlp) * self.intermediate_size + d)
        norm = d * (2 if self.norm == "layer" else 1)
        return L * (attention + mlp + 2 * norm) + norm + self.vocab_size * d * (2 - self.tie_embeddings)

    def train_flops_per_token(self, seq_len: int) -> float:
        """Forward and backward floating-point operations a token: 6 a matrix weight, and causal attention as half."""
        d, h = self.hidden_size, self.head_dim
        mlp = (2 + self.gated_mlp) * d * self.intermediate_size
        matrices = self.n_layers * (2 * (self.n_heads + self.n_kv_heads) * h * d + mlp)
        attention = self.n_layers * self.n_heads * h * seq_len  # 2 products of T x h a head and token, halved
        return 6 * (matrices + self.vocab_size * d + attention)


def product(*factors: Tensor | None) -> Tensor | None:
    """The product of the factors that are there, None if none is."""
    result = None
    for z in factors:
        if z is not None:
            result = z if result is None else result * z
    return result


def layer_masks(masks: dict[str, Tensor], i: int, cfg: ModelConfig) -> dict[str, Tensor | None]:
    """What the masks mean for layer i: the factors that the forward pass and compaction put on its weights.

    Returns attention_norm and mlp_norm [d] (weight and bias of the norms), head [H] (columns of o_proj, h each),
    attention_out [d] (rows of o_proj), intermediate [f] (rows of up_proj; without a gate, where an activation follows it,
    columns of down_proj), mlp_out [d] (rows of down_proj), hidden [d] (0 for dims that no norm counts), and queries [H*h]
    and keys [K*h] (rows of q_proj and k_proj, those that a norm over all heads counts).  None is a factor of one.
    Raises ValueError if a set is among the masks that gives no factor.
    """
    z = {name: mask if name == "hidden" else mask[i] for name, mask in masks.items()}
    hidden, layer, kv_head, query_head = (z.pop(name, None) for name in ("hidden", "layer", "kv_head", "query_head"))
    if kv_head is not None:  # [K]
        kv_head = kv_head.repeat_interleave(cfg.n_heads // cfg.n_kv_heads)  # a KV head takes its group along
    head = product(z.pop("head", None), kv_head, None if query_head is None else query_head.flatten())
    outs = [product(layer, z.pop(name, None), hidden) for name in ("head_layer", "mlp")]
    outs = [None if z_out is None else z_out.expand(cfg.hidden_size) for z_out in outs]  # without a hidden mask it is one
    # No tensor stands here twice: full checkpointing hands copies to a compiled layer, which would then be another graph.
    norms = [None if hidden is None else hidden.view_as(hidden) for _ in outs]
    if cfg.norm_after:  # which would undo what came before it: the factors come after, and before it only what is closed
        outs, norms = [None if hidden is None else hidden != 0 for _ in outs], outs
    queries = keys = None
    if cfg.qk_norm == "all" and head is not None:
        is_open = head != 0
        is_open = is_open | ~is_open.any()  # all closed, nothing comes out: count all, and do not divide by 0
        queries, keys = (n.repeat_interleave(cfg.head_dim) for n in (is_open, is_open.view(cfg.n_kv_heads, -1).any(1)))
    intermediate = z.pop("intermediate", None)
    if z:  # it would train, and do nothing
        raise ValueError(f"layer_masks puts no factor on any weight for the mask set {', '.join(z)}")
    return {"hidden": hidden, "attention_norm": norms[0], "queries": queries, "keys": keys, "head": head,
            "attention_out": outs[0], "mlp_norm": norms[1], "intermediate": intermediate, "mlp_out": outs[1]}


def masked_linear(x: Tensor, linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """linear(x * columns) * rows, with the factors on the weight.  x [..., in], rows [out], columns [in] -> [..., out]."""
    if rows is None and columns is None:
        return linear(x)  # a call that hooks see: tools/importance.py
    weight, bias = linear.weight, linear.bias
    if columns is not None:
        weight = weight * columns
    if rows is not None:
        weight = weight * rows[:, None]
        bias = None if bias is None else (bias * rows).to(x.dtype)
    return F.linear(x, weight.to(x.dtype), bias)


class Norm(nn.Module):
    """Root-mean-square norm, or layer norm, over the kept dimensions, in fp32.

    x [..., n], 0 in every dimension that is not kept; kept [n], 0 there, or None: all; factor [n], of weight and bias, or
    None -> [..., n] in x's dtype.
    """

    def __init__(self, size: int, eps: float, kind: str = "rms"):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" else None

    def forward(self, x: Tensor, kept: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        # x is 0 wherever kept is, so the sum needs no gather: only the count changes.  # spec 3
        count = x.shape[-1] if kept is None else (kept != 0).sum()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.bias is not None:
            wide = wide - wide.sum(-1, keepdim=True) / count
            wide = wide if kept is None else wide * (kept != 0)  # 0 again
        normed = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / count + self.eps)
        normed = normed * (self.weight if factor is None else self.weight * factor)
        if self.bias is not None:
            normed = normed + (self.bias if factor is None else self.bias * factor)
        return normed.to(x.dtype)


def rope_frequencies(size: int, theta: float, scaling: dict | None, device: torch.device) -> Tensor:
    """Radians a token of each pair of `size` dimensions of a head, [size/2], fp32."""
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    if scaling is not None and scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling is not None:  # llama3: keep the fast ones, stretch the slow ones, blend between (Llama 3.1's release)
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies
    return frequencies


def rope_tables(cfg: ModelConfig, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, r/2], fp32, of the angle of every position and frequency; r of a head's h dims are turned.

    Computed at each call from the config: T x r/2 numbers cost nothing, and no cached buffer can be stale or too short.
    """
    frequencies = rope_frequencies(cfg.rotary_dims or cfg.head_dim, cfg.rope_theta, cfg.rope_scaling, device)
    angles = torch.arange(seq_len, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split as in Hugging Face Llama, turned in fp32.  x [B, T, heads, h]; cos, sin [T, r/2]."""
    cos, sin, r = cos[:, None], sin[:, None], 2 * cos.shape[-1]
    turned, rest = (x, ()) if r == x.shape[-1] else (x[..., :r], (x[..., r:],))
    a, b = turned.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, *rest), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, attention: str):
        super().__init__()
        self.cfg, self.attention = cfg, attention
        d, q, kv = cfg.hidden_size, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        self.q_proj = nn.Linear(d, q, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(q, d, bias=cfg.o_bias)
        if cfg.qk_norm != "none":
            q, kv = (q, kv) if cfg.qk_norm == "all" else (cfg.head_dim, cfg.head_dim)
            self.q_norm, self.k_norm = Norm(q, cfg.norm_eps), Norm(kv, cfg.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, z: dict[str, Tensor | None]) -> Tensor:
        B, T, _ = x.shape
        h, H, K = self.cfg.head_dim, self.cfg.n_heads, self.cfg.n_kv_heads
        q, k = masked_linear(x, self.q_proj, rows=z["queries"]), masked_linear(x, self.k_proj, rows=z["keys"])
        if self.cfg.qk_norm == "all":
            q, k = self.q_norm(q, z["queries"]), self.k_norm(k, z["keys"])
        q, k, v = q.view(B, T, H, h), k.view(B, T, K, h), self.v_proj(x).view(B, T, K, h)
        if self.cfg.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.attention == "flash_attn":  # CUDA, half precision, and installed: the stage has checked
            from flash_attn import flash_attn_func

            context = flash_attn_func(q, k, v, causal=True)  # (B, T, H, h)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, h)
            if H != K and q.is_cuda and q.dtype == torch.float32:  # its one kernel with groups forms all T x T scores
                k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))  # (B, H, T, h)
            context = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != H).transpose(1, 2)
        columns = None if z["head"] is None else z["head"].repeat_interleave(h)  # (H*h)
        return masked_linear(context.reshape(B, T, H * h), self.o_proj, rows=z["attention_out"], columns=columns)


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=cfg.mlp_bias) if cfg.gated_mlp else None
        self.up_proj = nn.Linear(d, f, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=cfg.mlp_bias)
        self.activation = ACTIVATIONS[cfg.activation]

    def forward(self, x: Tensor, z: dict[str, Tensor | None]) -> Tensor:
        if self.gate_proj is None:
            units = self.activation(self.up_proj(x))  # (B, T, f)
            return masked_linear(units, self.down_proj, rows=z["mlp_out"], columns=z["intermediate"])
        up = masked_linear(x, self.up_proj, rows=z["intermediate"])  # (B, T, f)
        return masked_linear(self.activation(self.gate_proj(x)) * up, self.down_proj, rows=z["mlp_out"])


class Layer(nn.Module):
    """Two blocks, attention and MLP, and the norm of each, with Llama's names for them."""

    def __init__(self, cfg: ModelConfig, attention: str):
        super().__init__()
        self.cfg = cfg
        self.input_layernorm = Norm(cfg.hidden_size, cfg.norm_eps, cfg.norm)
        self.self_attn = Attention(cfg, attention)
        self.post_attention_layernorm = Norm(cfg.hidden_size, cfg.norm_eps, cfg.norm)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, z: dict[str, Tensor | None]) -> Tensor:
        norm_1 = partial(self.input_layernorm, kept=z["hidden"], factor=z["attention_norm"])
        norm_2 = partial(self.post_attention_layernorm, kept=z["hidden"], factor=z["mlp_norm"])
        if self.cfg.norm_after:
            x = x + norm_1(self.self_attn(x, cos, sin, z))
            return x + norm_2(self.mlp(x, z))
        y = x + self.self_attn(norm_1(x), cos, sin, z)
        return y + self.mlp(norm_2(x if self.cfg.parallel_residual else y), z)


def keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    """What a layer keeps for its backward pass with selective checkpointing: the outputs of products and attention.

    Norms, rotations, SwiGLU and masked weights are computed again, which costs little; 40% less memory for activations.
    """
    name = op.__name__
    kept = name.startswith(("mm", "addmm", "_scaled_dot_product", "_flash_attn"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class HeadLoss(torch.autograd.Function):
    """The head and the loss in one, over chunks of tokens: no [B*T, V] tensor is ever there.

    The loss is cross-entropy; with a teacher (1 - w) cross-entropy + w KL(teacher || student).  The forward pass computes
    the gradients too, where a chunk's probabilities are at hand, of the sum; backward scales them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype, teacher_x: Tensor | None = None,
                teacher_head: Tensor | None = None, kd_weight: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [N, d], head [V, d], targets int64 [N] -> loss [], the one with a gradient; cross-entropy of each token [N];
        mean KL [], None without a teacher; all in nats.

        dtype: of the products.  Softmax, losses and the sum of the head's gradient over chunks are in fp32 at least.
        teacher_x [N, d'], teacher_head [V, d']: what the teacher's `body` gives.  kd_weight: w.
        """
        wide, (N, V) = torch.promote_types(dtype, torch.float32), (len(x), len(head))
        narrow_x, narrow_head = x.to(dtype), head.to(dtype)
        dx = torch.empty_like(narrow_x) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head, dtype=wide) if ctx.needs_input_grad[1] else None
        each, kl = torch.empty(N, dtype=wide, device=x.device), None
        rows = min(N, max(1, LOSS_BYTES * (4 if x.is_cuda else 1) // (wide.itemsize * V)))
        if teacher_x is not None:
            kl, rows = torch.empty_like(each), (rows + 2) // 3  # three buffers then
            teacher_x, teacher_head = teacher_x.to(dtype), teacher_head.to(dtype)
        # Buffers for all chunks: memory that is asked for anew costs a CPU as much time as all the softmax does.
        logits = torch.empty(rows, V, dtype=dtype, device=x.device)
        buffers = [torch.empty_like(logits, dtype=wide) for _ in range(1 if kl is None else 3)]

        def log_softmax(x: Tensor, head: Tensor, out: Tensor) -> Tensor:
            return torch.log_softmax(torch.mm(x, head.T, out=logits[:len(x)]), -1, dtype=wide, out=out[:len(x)])

        for part in (slice(i, i + rows) for i in range(0, N, rows)):
            log_p = log_softmax(narrow_x[part], narrow_head, buffers[0])  # (rows, V)
            target = targets[part, None]
            each[part] = -log_p.gather(1, target)[:, 0]
            if kl is not None:
                log_q = log_softmax(teacher_x[part], teacher_head, buffers[1])
                q = torch.exp(log_q, out=buffers[2][:len(log_q)])
                kl[part] = log_q.sub_(log_p).mul_(q).sum(-1)
            if dx is None and dhead is None:
                continue
            p = log_p.exp_()
            if kl is not None:
                p.sub_(q, alpha=kd_weight)
            p.scatter_add_(1, target, torch.full_like(target, kd_weight - 1, dtype=wide))
            dlogits = p if dtype == wide else logits[:len(p)].copy_(p)
            if dx is not None:
                torch.mm(dlogits, narrow_head, out=dx[part])
            if dhead is not None and dtype == wide:
                dhead.addmm_(dlogits.T, narrow_x[part])
            elif dhead is not None:
                dhead += dlogits.T @ narrow_x[part]
        ctx.save_for_backward(dx, dhead)
        ctx.N, ctx.dtypes = N, (x.dtype, head.dtype)
        if kl is None:
            ctx.mark_non_differentiable(each)
            return each.mean(), each, None
        kl = kl.mean()
        ctx.mark_non_differentiable(each, kl)
        return (1 - kd_weight) * each.mean() + kd_weight * kl, each, kl

    @staticmethod
    def backward(ctx, dloss: Tensor, *_) -> tuple[Tensor | None, ...]:
        # In place, for the memory's sake, so only once: autograd refuses a second time.  A compiler plans memory itself.
        scale = Tensor.mul if torch.compiler.is_compiling() else Tensor.mul_
        dx, dhead = (None if d is None else scale(d, dloss / ctx.N).to(t) for d, t in zip(ctx.saved_tensors, ctx.dtypes))
        return dx, dhead, None, None, None, None, None


class Transformer(nn.Module):
    """attention: "sdpa" or "flash_attn".  checkpointing, what the backward pass computes again to save memory: "none",
    "selective" (see keep_products) or "full" (each layer).
    """

    def __init__(self, cfg: ModelConfig, *, attention: str = "sdpa", checkpointing: str = "selective"):
        super().__init__()
        self.cfg, self.checkpointing = cfg, checkpointing
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(cfg.vocab_size, cfg.hidden_size),
            "layers": nn.ModuleList(Layer(cfg, attention) for _ in range(cfg.n_layers)),
            "norm": Norm(cfg.hidden_size, cfg.norm_eps, cfg.norm),
        })
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def body(self, tokens: Tensor, masks: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """All but the head: (x [B, T, d] after the last norm, the head [V, d] whose product with it are the logits)."""
        masks = masks or {}
        hidden = masks.get("hidden")
        x = self.model["embed_tokens"](tokens)  # (B, T, d)
        if torch.is_autocast_enabled(x.device.type):  # the stream is as wide as it is under FSDP, whose weights come cast
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if hidden is not None:
            x = x * hidden.to(x.dtype)
        cos, sin = rope_tables(self.cfg, tokens.shape[1], tokens.device)
        # selective: a compiler makes that choice by itself
        recompute = self.checkpointing == "full" or (self.checkpointing == "selective" and not torch.compiler.is_compiling())
        for i, layer in enumerate(self.model["layers"]):
            z = layer_masks(masks, i, self.cfg)
            if recompute and torch.is_grad_enabled():
                options = {} if self.checkpointing == "full" else dict(
                    context_fn=partial(create_selective_checkpoint_contexts, keep_products))
                x = checkpoint(layer, x, cos, sin, z, use_reentrant=False, preserve_rng_state=False, **options)
            else:
                x = layer(x, cos, sin, z)
        x = self.model["norm"](x, hidden, hidden)
        return x, (self.model["embed_tokens"] if self.lm_head is None else self.lm_head).weight  # unmasked

    def forward(self, tokens: Tensor, targets: Tensor | None = None, masks: dict[str, Tensor] | None = None, *,
                reduction: str = "mean", teacher: tuple[Tensor, Tensor] | None = None,
                kd_weight: float = 0.0) -> Tensor | dict[str, Tensor]:
        """Logits, or the next-token cross-entropy, or the losses of distillation.

        tokens, targets: int64 [B, T].  masks: see l0.MASKS; fp32.  Without targets: logits [B, T, V].  With them: nats
        per token, the mean over the batch (reduction "mean") or over each sequence, [B] ("none", for evaluation).
        teacher: what the `body` of a model of the same vocabulary gives for these tokens.  With it three means: "loss", the
        one with a gradient, "loss/ce" and "loss/kl", which kd_weight mixes into it; see HeadLoss.
        """
        x, head = self.body(tokens, masks)
        if targets is None:
            return F.linear(x, head)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if not torch.is_grad_enabled():
            x, head = x.detach(), head.detach()  # or HeadLoss would compute gradients
        if teacher is not None:
            teacher_x, teacher_head = teacher
            loss, each, kl = HeadLoss.apply(x.flatten(0, 1), head, targets.flatten(), dtype, teacher_x.flatten(0, 1),
                                            teacher_head, kd_weight)
            return {"loss": loss, "loss/ce": each.mean(), "loss/kl": kl}
        mean, each, _ = HeadLoss.apply(x.flatten(0, 1), head, targets.flatten(), dtype)
        return mean if reduction == "mean" else each.view(targets.shape).mean(1)


def parameter_shapes(cfg: ModelConfig) -> dict[str, torch.Size]:
    """Name -> shape of each parameter of a Transformer, which is not allocated."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(cfg).named_parameters()}


def init_weights(model: Transformer, seed: int) -> None:
    """Fresh weights in place: normal, std 0.02, the two projections that end a block by 1/sqrt(2 L) smaller (GPT-2)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
            else:
                scale = 1 / math.sqrt(2 * model.cfg.n_layers) if "o_proj" in name or "down_proj" in name else 1.0
                p.copy_(torch.empty(p.shape).normal_(0, 0.02 * scale, generator=generator))
