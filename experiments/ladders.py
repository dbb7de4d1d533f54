"""What experiments.run runs: ladders, each a source, a target and a budget, and the ways that are compared on them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    """How units are chosen: scores of tools.importance, or masks that prune.py learns from such scores."""

    score: str  # of tools.importance; "": none
    sequences: int = 0  # that the scores are measured on
    at_once: int = 8  # of those
    steps: int = 0  # of prune.py; 0: the scores choose
    batch: int = 0  # sequences of such a step
    rate: float = 0.1  # of the scores
    sampled: str = ""  # the released recipe, weights trained under sampled masks, and how it counts; "": masks alone
    budget: int = 1  # times the ladder's
    target: dict[str, int] | None = None  # target_* of prune.py; None: the ladder's
    kd_weight: float = 0.0  # of the source's distribution in the training of the cut model
    mixture: str = "constant"  # of domains: constant, or doremi steered by clipped or signed excess over the source's losses
    rival: str = "activation"  # the way that it is compared with, seed by seed; "": none


@dataclass(frozen=True)
class Ladder:
    """A source, a target, and what all cells share."""

    target: dict[str, int]  # target_* of prune.py
    seq_len: int
    batch: int  # sequences a step of the cut model
    budget: int  # steps of the cut model that every cell may spend, choosing included
    learning_rate: float
    ways: dict[str, Way]
    seeds: tuple[int, ...] = (1, 2, 3)
    source_steps: int = 0  # of pretrain.py, for the source's own training; 0: it is there
    source_shape: dict | None = None
    bytes_a_domain: int = 2_500_000
    eval_sequences: int = 100
    dtype: str = "float32"  # of autocast, on whatever device there is

    def target_of(self, way: Way) -> dict[str, int]:
        """target_* of prune.py."""
        return way.target or self.target


SMALL_SHAPE = {"vocab_size": 2048, "hidden_size": 192, "n_layers": 8, "n_heads": 6, "n_kv_heads": 3, "head_dim": 32,
               "intermediate_size": 512, "context_length": 256, "tie_embeddings": True}


def target(hidden_size: int, n_layers: int, n_heads: int, n_kv_heads: int, intermediate_size: int) -> dict[str, int]:
    """target_* of prune.py."""
    return {f"target_{name}": value for name, value in locals().items()}


RIVALS = {
    "learned": Way("activation", 32, steps=40, batch=4),
    "activation": Way("activation", 128),
    "gradient": Way("gradient", 32, 1),
    "magnitude": Way("magnitude", 8),
    "random": Way("random", 8),
    "sampled": Way("", steps=60, batch=16, sampled="expected"),
    "scratch": Way(""),
}
CUT_28, CUT_74 = target(176, 7, 6, 3, 416), target(128, 4, 4, 2, 320)
QUESTIONS = {  # of the small ladder, beside the rivals
    "sampled_rescaled": Way("", steps=60, batch=16, sampled="rescaled"),
    "learned_28": Way("activation", 32, steps=40, batch=4, target=CUT_28, rival="activation_28"),
    "activation_28": Way("activation", 128, target=CUT_28, rival=""),
    "learned_74": Way("activation", 32, steps=40, batch=4, target=CUT_74, rival="activation_74"),
    "activation_74": Way("activation", 128, target=CUT_74, rival=""),
    "learned_10_steps": Way("activation", 32, steps=10, batch=4, rival="learned"),
    "learned_160_steps": Way("activation", 32, steps=160, batch=4, rival="learned"),
    "activation_kd_0.5": Way("activation", 128, kd_weight=0.5),
    "activation_kd_1": Way("activation", 128, kd_weight=1.0),
    "activation_clipped": Way("activation", 128, mixture="clipped"),
    "activation_signed": Way("activation", 128, mixture="signed"),
    "activation_x4": Way("activation", 128, budget=4, rival="scratch_x4"),
    "scratch_x2": Way("", budget=2),
    "scratch_x4": Way("", budget=4),
    "scratch_x8": Way("", budget=8),
}
REAL = {
    "learned": Way("activation", 64, steps=40, batch=4),
    "learned_kd_1": Way("activation", 64, steps=40, batch=4, kd_weight=1.0, rival="activation_kd_1"),
    "activation": Way("activation", 64),
    "gradient": Way("gradient", 64, 1),
    "sampled": Way("", steps=80, batch=16, sampled="expected"),
    "scratch": Way(""),
    "activation_kd_1": Way("activation", 64, kd_weight=1.0),
}
LADDERS = {
    # a source at a plateau of its learning rate: 3.6 M parameters, 5.1 M tokens; the main cut is 55%
    "small": Ladder(target=target(144, 6, 4, 2, 384), seq_len=128, batch=16, budget=300, learning_rate=2e-3,
                    ways=RIVALS | QUESTIONS, source_steps=2500, source_shape=SMALL_SHAPE, bytes_a_domain=6_000_000),
    # real weights: half of SmolLM2-135M's parameters without the embedding
    "smollm2": Ladder(target=target(448, 26, 6, 2, 1152), seq_len=512, batch=16, budget=300, learning_rate=1e-3, ways=REAL,
                      bytes_a_domain=12_000_000, eval_sequences=50, dtype="auto"),
}
