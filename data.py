"""Tokens on disk, the domain sampler, per-domain evaluation and dynamic batch loading.  Spec: sections 5 and 7.

State in, state out.  A global batch is a pure function of (seed, step, domain weights, cursors): the domain of each of
its sequences is drawn once for all ranks; the n-th sequence that a domain gives is entry n of a keyed permutation of its
windows.  No list of used samples, no iterator: to resume takes one cursor a domain, on any number of ranks.

A window is T + 1 tokens and starts every T tokens, so each token of a window but the first is a target once.
"""

import hashlib
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from run.weights import sha256

INDEX_KEYS = {"format": int, "domain": str, "split": str, "dtype": str, "n_tokens": int, "n_documents": int,
              "n_bytes": int, "vocab_size": int, "tokenizer": str, "sha256": str}


@dataclass(frozen=True)
class Split:
    """One domain's tokens of one split, as windows of seq_len + 1.  The files stay on disk (memory maps)."""

    domain: str
    split: str
    seq_len: int
    parts: tuple[np.ndarray, ...]  # of uint16 or uint32, one a shard of prepare.py
    starts: np.ndarray  # int64 [parts + 1]: index of each part's first window; the last is the number of windows
    vocab_size: int
    tokenizer: str  # fingerprint
    checksums: tuple[tuple[Path, str], ...] = ()  # of each file: SHA-256 by its index
    max_token: int = -1  # the largest id in it, -1 if it is empty
    n_bytes: int = 0  # of its text, UTF-8

    @property
    def n_windows(self) -> int:
        return int(self.starts[-1])

    @property
    def n_tokens(self) -> int:
        return sum(len(p) for p in self.parts)

    def window(self, i: int) -> np.ndarray:
        """Window i: T + 1 tokens, uint16 or uint32."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        at = (i - int(self.starts[part])) * self.seq_len
        return self.parts[part][at:at + self.seq_len + 1]


def read_index(path: Path) -> dict:
    """One JSON index of prepare.py.  Raises ValueError, naming the file, if it is not one."""
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(index, dict) or any(type(index.get(k)) is not t for k, t in INDEX_KEYS.items()):
        raise ValueError(f"{path} is no index of prepare.py: it must have {', '.join(INDEX_KEYS)}")
    least = min(index["n_tokens"], index["vocab_size"] - 1)
    if index["format"] != 1 or index["dtype"] not in ("uint16", "uint32") or least < 0:
        raise ValueError(f"{path}: format {index['format']}, dtype {index['dtype']}, n_tokens {index['n_tokens']}, "
                         f"vocab_size {index['vocab_size']}: expected 1, uint16 or uint32, not negative, above 0")
    index.setdefault("max_token", index["vocab_size"] - 1)  # before it was recorded: what the tokenizer could give
    if type(index["max_token"]) is not int or not -1 <= index["max_token"] < index["vocab_size"]:
        raise ValueError(f"{path}: max_token {index['max_token']} is not below vocab_size {index['vocab_size']}")
    return index


def open_split(data_dir: str | Path, domain: str, split: str, seq_len: int) -> Split:
    """The tokens that prepare.py wrote for a domain and split.  Raises ValueError, naming the file and what is wrong."""
    folder = Path(data_dir) / domain
    if not folder.is_dir():
        there = sorted(p.name for p in Path(data_dir).glob("*") if any(p.glob("*.bin")))
        raise ValueError(f"no domain {domain!r} in {data_dir}; there: {', '.join(there) or 'none'}")
    whole, shards = folder / f"{split}.json", sorted(folder.glob(f"{split}-*-of-*.json"))
    if whole.exists() and shards:
        raise ValueError(f"{folder} has both {whole.name} and shards of it; remove one kind")
    paths = [whole] if not shards else shards
    if shards:
        if odd := [p.name for p in shards if not re.fullmatch(rf"{re.escape(split)}-\d{{5}}-of-\d{{5}}", p.stem)]:
            raise ValueError(f"{folder / odd[0]} is no name of a shard, as {split}-00000-of-00002.json is; remove it")
        n = int(shards[0].stem[-5:])
        want = [folder / f"{split}-{i:05d}-of-{n:05d}.json" for i in range(n)]
        if want != shards:
            odd = sorted(p.name for p in set(want) ^ set(shards))
            raise ValueError(f"{folder}: shards of {split} are missing or of different runs: {', '.join(odd[:3])}")
    elif not whole.exists():
        raise ValueError(f"{whole} does not exist; run prepare.py")
    indexes = [read_index(p) for p in paths]
    parts = []
    for path, index in zip(paths, indexes):
        for key in ("dtype", "vocab_size", "tokenizer"):
            if index[key] != indexes[0][key]:
                raise ValueError(f"{path}: {key} = {index[key]} differs from {paths[0].name}'s {indexes[0][key]}")
        file = path.with_suffix(".bin")
        if not file.exists():
            raise ValueError(f"{file} is missing, but its index is there; copy it again or run prepare.py again")
        size, want_size = file.stat().st_size, index["n_tokens"] * np.dtype(index["dtype"]).itemsize
        if size != want_size:
            raise ValueError(f"{file} has {size} bytes, its index says {want_size}; copy it again or run prepare.py again")
        # an empty file cannot be mapped
        parts.append(np.memmap(file, index["dtype"], "r") if want_size else np.zeros(0, index["dtype"]))
    windows = [max(0, (len(p) - 1) // seq_len) for p in parts]
    return Split(domain, split, seq_len, tuple(parts), np.cumsum([0, *windows], dtype=np.int64),
                 indexes[0]["vocab_size"], indexes[0]["tokenizer"],
                 tuple((path.with_suffix(".bin"), index["sha256"]) for path, index in zip(paths, indexes)),
                 max(index["max_token"] for index in indexes), sum(index["n_bytes"] for index in indexes))


def open_domains(data_dir: str | Path, domains: list[str], split: str, seq_len: int) -> list[Split]:
    """`open_split` of each domain; ValueError too if they were made with different tokenizers."""
    splits = [open_split(data_dir, d, split, seq_len) for d in domains]
    for s in splits:
        if (s.tokenizer, s.vocab_size) != (splits[0].tokenizer, splits[0].vocab_size):
            raise ValueError(f"domains {splits[0].domain} and {s.domain} were made with different tokenizers")
    return splits


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is measured on; see `open_run_data`."""

    train: list[Split]
    eval: list[Split]
    tokenizer_dir: Path  # the tokenizer that made the tokens

    @property
    def domains(self) -> list[str]:
        return [s.domain for s in self.train]

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Of each domain, what makes bits a byte of its held-out text, any tokenizer's, of a loss in nats a token."""
        return {s.domain: s.n_tokens / (s.n_bytes * math.log(2)) for s in self.eval if s.n_bytes}

    def verify(self) -> None:
        """Raises ValueError, naming the file, if one differs from the checksum in its index.  Reads all, in 8 threads."""
        files = [file for split in (*self.train, *self.eval) for file in split.checksums]
        with ThreadPoolExecutor(8) as pool:
            for (path, want), got in zip(files, pool.map(lambda file: sha256(file[0]), files)):
                if got != want:
                    raise ValueError(f"{path} differs from the checksum in its index: damaged or changed since prepare.py "
                                     "wrote it; copy it again, or remove it and its index and run prepare.py again")

    def budget_table(self, domain_weights: dict[str, float], cursors: dict[str, int], sequences: int) -> str:
        """Per domain: tokens there, tokens still needed for so many sequences at these weights, epochs.  For people."""
        rows = [f"{'domain':<16}{'weight':>9}{'tokens there':>16}{'tokens needed':>16}{'epochs':>9}"]
        for s in self.train:
            share = domain_weights[s.domain]
            need = cursors[s.domain] + share * sequences  # sequences
            rows.append(f"{s.domain:<16}{share:>9.4f}{s.n_tokens:>16,}{need * s.seq_len:>16,.0f}{need / s.n_windows:>9.2f}")
        return "\n".join(rows)


def open_run_data(data_dir: str | Path, domains: list[str], *, split: str, seq_len: int, vocab_size: int,
                  context_length: int) -> RunData:
    """Open both splits of each domain (all that are in data_dir, if none is named) and check that they suit a model.

    Raises ValueError: an unknown domain, token ids beyond the model's vocabulary, sequences longer than its context.
    """
    data_dir = Path(data_dir)
    if seq_len > context_length:
        raise ValueError(f"seq_len = {seq_len} is longer than the model's context of {context_length} tokens")
    domains = domains or sorted(p.name for p in data_dir.glob("*") if any(p.glob(f"{split}*.json")))
    if not domains:
        raise ValueError(f"data_dir = {data_dir} holds no domain with a {split} split; run prepare.py")
    train, held_out = (open_domains(data_dir, domains, s, seq_len) for s in (split, "eval"))
    for s in (*train, *held_out):
        if s.max_token >= vocab_size:
            raise ValueError(f"{data_dir}/{s.domain} has token {s.max_token} in its {s.split} split (a tokenizer of "
                             f"{s.vocab_size} tokens made it), but the model knows {vocab_size}; prepare the text with the "
                             "model's tokenizer")
    return RunData(train, held_out, data_dir / "tokenizer")


# ---- the sampler


def mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A keyed hash of uint64 values (the finalizer of SplitMix64)."""
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(i: np.ndarray, n: int, key: str) -> np.ndarray:
    """Where a keyed permutation of 0..n-1 sends each i (int64 -> int64); nothing is stored.

    A four-round Feistel network on the next even power of two, walked until it lands inside (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002): at most 4 steps a value on average.
    """
    half = np.uint64(max(1, math.ceil(math.log2(max(2, n)) / 2)))
    low = np.uint64((1 << int(half)) - 1)
    rounds = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=32).digest(), np.uint64)
    x = np.asarray(i, np.int64).astype(np.uint64)
    walking = np.ones(x.shape, bool)
    while walking.any():
        a, b = x[walking] >> half, x[walking] & low
        for k in rounds:
            a, b = b, a ^ (mix(b, k) & low)
        x[walking] = (a << half) | b
        walking = x >= np.uint64(n)
    return x.astype(np.int64)


@dataclass(frozen=True)
class Batch:
    """A global batch before its tokens are read, and the cursors after it."""

    domain: np.ndarray  # int64 [sequences]: index into the sampler's domains
    window: np.ndarray  # int64 [sequences]: window within the domain
    cursors: dict[str, int]  # sequences that each domain has given so far, this batch included


class Sampler:
    """Draws global batches of sequences from domains.  Holds no state that changes.

    splits: of `open_domains`; each needs at least one window.  Raises ValueError otherwise.
    """

    def __init__(self, splits: list[Split], *, global_batch_size: int, seed: int):
        self.splits, self.global_batch_size, self.seed = splits, global_batch_size, seed
        for s in splits:
            if s.n_windows == 0:
                raise ValueError(f"domain {s.domain} has {s.n_tokens} tokens in its {s.split} split: not one sequence of "
                                 f"{s.seq_len} + 1; prepare more text, or leave it out of domain_weights")

    def draw(self, step: int, domain_weights: dict[str, float], cursors: dict[str, int]) -> Batch:
        """The global batch of a step.  The same for every rank; `cursors` is not changed."""
        weights = np.array([domain_weights[s.domain] for s in self.splits], np.float64)
        u = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, step]))).random(self.global_batch_size)
        edges = np.cumsum(weights / weights.sum())
        # the last domain with any weight takes what rounding leaves above the last edge
        domain = np.minimum(np.searchsorted(edges, u, side="right"), np.flatnonzero(weights)[-1])
        window, after = np.empty_like(domain), dict(cursors)
        for d, split in enumerate(self.splits):
            of_d = np.flatnonzero(domain == d)
            nth = cursors[split.domain] + np.arange(len(of_d))
            after[split.domain] += len(of_d)
            for epoch in np.unique(nth // split.n_windows):
                here = nth // split.n_windows == epoch
                window[of_d[here]] = permute(nth[here] % split.n_windows, split.n_windows,
                                             f"{self.seed}/{split.domain}/{epoch}")
        return Batch(domain, window, after)

    def load(self, batch: Batch, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """tokens, targets: int64 [len(rows), T] on the device, of these rows of the global batch."""
        windows = [self.splits[d].window(w) for d, w in zip(batch.domain[rows].tolist(), batch.window[rows].tolist())]
        return to_device(np.stack(windows), device)

    def exhausted(self, before: dict[str, int], after: dict[str, int]) -> list[str]:
        """The domains that began a new epoch between two cursors: their windows are now used again, in a new order."""
        return [s.domain for s in self.splits
                if (after[s.domain] - 1) // s.n_windows > max(0, before[s.domain] - 1) // s.n_windows]


def to_device(windows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, T + 1] of any integer type -> tokens, targets int64 [B, T]; to a GPU from pinned memory, without waiting."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    else:
        tokens = tokens.to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ---- evaluation and dynamic batch loading


@torch.no_grad()
def evaluate(model, masks: dict[str, Tensor], splits: list[Split], cfg, processes, *,
             turn: int | None = None) -> dict[str, float | None]:
    """Mean loss of each domain, nats a token, over up to cfg.eval_sequences fixed windows; None where there is none.

    model: Transformer.  masks: as its forward takes them.  cfg, processes: TrainSettings and Processes, of run/.
    turn: with it only cfg.eval_between of those windows, the next ones at each turn and round again: what one turn's windows
    have too much, the others' have too little, so that over the turns the steering sees what all windows would show.
    Micro-batches go to the ranks in turn, all of one shape, and each loss is added by one rank alone: the result does
    not depend on the number of ranks.  Raises ValueError if a loss is not finite.
    """
    rank, world, device = processes.rank, processes.world, processes.device
    micro_batch_size, few = cfg.eval_batch_size or cfg.micro_batch_size, cfg.eval_between if turn is not None else 0
    chosen = []  # (domain index, window)
    for d, split in enumerate(splits):
        n = min(cfg.eval_sequences, split.n_windows)
        at = np.arange(n) if not 0 < few < n else (turn * few + np.arange(few)) % n
        chosen += [(d, int(w)) for w in (permute(at, split.n_windows, f"eval/{split.domain}") if n else [])]
    losses = torch.zeros(len(chosen), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    n_batches = math.ceil(len(chosen) / (micro_batch_size * world)) * world  # every rank runs as many: FSDP gathers
    for batch in range(rank, n_batches, world):
        at = [min(batch * micro_batch_size + i, len(chosen) - 1) for i in range(micro_batch_size)]  # the last one padded
        tokens, targets = to_device(np.stack([splits[chosen[i][0]].window(chosen[i][1]) for i in at]), device)
        with processes.autocast():
            found = model(tokens, targets, masks, reduction="none").to(losses)
        n = max(0, min(micro_batch_size, len(chosen) - batch * micro_batch_size))
        losses[batch * micro_batch_size:batch * micro_batch_size + n] = found[:n]
    values, domains = processes.sum(losses).cpu().numpy(), np.array([d for d, _ in chosen])
    means = {s.domain: float(values[domains == d].mean()) if (domains == d).any() else None for d, s in enumerate(splits)}
    for domain, loss in means.items():
        if loss is not None and not math.isfinite(loss):
            raise ValueError(f"the evaluation loss of domain {domain} is {loss}: training diverged (put the newest step_* "
                             "aside, --resume with a lower learning_rate), or the model does not belong to these tokens")
    return means


def steer(state, losses: dict[str, float | None], cfg) -> None:
    """Dynamic batch loading after an evaluation: new domain weights in a RunState, as TrainSettings say.

    Without reference losses the first evaluation, of the source as it is, becomes the reference.  It changes no weights.
    """
    if not state.reference_loss:
        state.reference_loss = {d: loss for d, loss in losses.items() if loss is not None}
    if cfg.update == "doremi" and state.step > 0:
        state.domain_weights = update_domain_weights(state.domain_weights, losses, state.reference_loss,
                                                     excess=cfg.excess, min_weight=cfg.min_weight)
    state.evaluated = state.step


def update_domain_weights(weights: dict[str, float], losses: dict[str, float | None], reference: dict[str, float], *,
                          excess: str = "clipped", eta: float = 1.0, smoothing: float = 1e-4,
                          min_weight: float = 0.0) -> dict[str, float]:
    """Domain weights after an evaluation: w <- w exp(eta excess), normalised and smoothed.  Algorithm 1 of the paper.

    losses, reference: nats a token.  excess: "clipped" max(l - r, 0), or "signed" l - r.  A domain without a loss (None)
    keeps its weight, and the others share the rest.  min_weight: a floor below which no other domain falls.
    """
    known = [d for d in weights if losses[d] is not None and d in reference]
    mass = sum(weights[d] for d in known)
    if mass <= 0:
        return dict(weights)
    gap = np.array([losses[d] - reference[d] for d in known])
    if excess == "clipped":
        gap = gap.clip(min=0)
    old = np.array([weights[d] for d in known])
    with np.errstate(divide="ignore"):  # a weight of 0 is -inf here, and 0 again below
        log_w = np.log(old) + eta * gap
    w = np.exp(log_w - log_w.max())  # the shift cancels in the normalisation: nothing overflows, and not all underflow
    w = (1 - smoothing) * w / w.sum() + smoothing / len(known)
    floor = min(min_weight / mass, 1 / len(known))
    low = w < floor
    while low.any() and not np.isclose(w[low], floor).all():  # raise those below, scale the others; some may sink below
        w[low] = floor
        w[~low] *= (1 - floor * low.sum()) / w[~low].sum()
        low = low | (w < floor)
    return {**weights, **{d: float(x * mass) for d, x in zip(known, w)}}
