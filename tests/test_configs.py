"""Every shipped config is accepted by its stage, states the published recipe, and opens with the command that runs it."""

import json
import re
from pathlib import Path

import pytest

import pretrain
import prune
from l0 import L0, mask_sets
from model import ModelConfig, Transformer
from run.cost import FITS, MACHINES, Parts, evaluations, per_device, run_seconds
from run.plan import checkpoint_bytes
from run.settings import parse_args

CONFIGS = sorted(Path("configs").glob("*.py"))
LLAMA2_7B = ModelConfig(vocab_size=32000, hidden_size=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128,
                        intermediate_size=11008)
SMOLLM2 = ModelConfig(vocab_size=49152, hidden_size=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64,
                      intermediate_size=1536, context_length=8192, tie_embeddings=True)
PYTHIA_410M = ModelConfig(vocab_size=50304, hidden_size=1024, n_layers=24, n_heads=16, n_kv_heads=16, head_dim=64,
                          intermediate_size=4096, context_length=2048, norm="layer", gated_mlp=False, activation="gelu",
                          qkv_bias=True, o_bias=True, mlp_bias=True, parallel_residual=True, rotary_dims=16)
SOURCES = {"7b_to": LLAMA2_7B, "smollm2_": SMOLLM2, "pythia_": PYTHIA_410M}  # by how a config's name begins
STAGES = {"prune.py": prune.PruneSettings, "pretrain.py": pretrain.PretrainSettings}


def parse(path: Path):
    """The settings of a config, by the stage that its first line names."""
    stage = re.search(r"\b(prune|pretrain)\.py", path.read_text().splitlines()[0])[0]
    return parse_args(STAGES[stage], [str(path)])


def world(path: Path) -> int:
    """The processes that a config's first line starts."""
    first = path.read_text().splitlines()[0]
    return int(re.search(r"nproc_per_node=(\d+)|$", first)[1] or 1) * int(re.search(r"nnodes=(\d+)|$", first)[1] or 1)


def source_of(path: Path) -> ModelConfig:
    """What a config's run starts from: a source as released, or the target of the config that prunes to it."""
    for start, source in SOURCES.items():
        if path.stem.startswith(start):
            return source
    if path.stem.startswith("pretrain_"):
        return prune.target_config(parse(path.with_name(path.name.replace("pretrain_", "7b_to_"))), LLAMA2_7B)
    if path.stem == "small_prune":
        return ModelConfig(**json.loads(re.search(r"--shape='(.*)'", Path("README.md").read_text())[1]))
    return ModelConfig(**parse(path.with_name("demo_source.py")).shape)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_valid(path):
    first = path.read_text().splitlines()[0]
    assert re.fullmatch(rf"# (torchrun [\w\- =:]+|python) (prune|pretrain)\.py {path.as_posix()}", first)
    cfg = parse(path)
    assert cfg.global_batch_size % (cfg.micro_batch_size * world(path)) == 0
    tokens = int(re.search(r"= ([\d.,]+) ?M? tokens a step", path.read_text())[1].replace(",", "").split(".")[0])
    if said := re.search(r"(\d+) GPUs(?: x (\d+) micro-steps)? x (\d+) sequence", path.read_text()):
        assert int(said[1]) == world(path) and int(said[3]) == cfg.micro_batch_size
        assert int(said[1]) * int(said[2] or 1) * int(said[3]) == cfg.global_batch_size
    assert tokens in (cfg.seq_len * cfg.global_batch_size, cfg.seq_len * cfg.global_batch_size // 10**6)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_fits_its_gpus(path):
    """Planned at its own number of devices; what it says of its memory is what the plan says."""
    cfg, source = parse(path), source_of(path)
    sets = mask_sets(source, prune.target_config(cfg, source)) if isinstance(cfg, prune.PruneSettings) else {}
    parts = Parts(Transformer, L0)
    bytes_of, cost = per_device(source, sets, cfg, parts, world(path), checkpointing=cfg.checkpointing)
    assert bytes_of["peak"] < FITS * MACHINES["A100"].memory and FITS == 0.85
    if said := re.search(r"(\d+) GB a GPU by --plan=(\d+)", path.read_text()):
        assert (float(said[1]), int(said[2])) == (pytest.approx(bytes_of["peak"] / 1e9, abs=1), world(path))
    if "7b_to" in path.stem:  # evaluations are held to a tenth of the run, checkpoints left out
        assert evaluations(cfg) == (65, 2 * 500 + 63 * 50)
        for gpu in MACHINES:
            t = run_seconds(source, cfg, cost, world(path), gpu, domains=7, checkpoint_bytes=checkpoint_bytes(source, sets),
                            parts=parts)
            assert t["evaluations"] < 0.1 * (t["in all"] - t["checkpoints"]), (gpu, t)


def test_sources_reach_their_targets():
    for path in CONFIGS:
        if path.stem.startswith((*SOURCES,)):
            source = source_of(path)
            sets = mask_sets(source, prune.target_config(parse(path), source))
            heads = "kv_head" if source == SMOLLM2 else "head"
            assert {"hidden", "intermediate", heads} <= sets.keys()


@pytest.mark.parametrize("name, shape, n_params", [("2.7b", (2560, 32, 20, 6912), 2_702_000_000),
                                                   ("1.3b", (2048, 24, 16, 5504), 1_345_423_360),
                                                   ("370m", (1024, 24, 8, 2816), 374_000_000)])
def test_published_recipe(name, shape, n_params):
    cfg, more = parse(Path(f"configs/7b_to_{name}.py")), parse(Path(f"configs/pretrain_{name}.py"))
    target = prune.target_config(cfg, LLAMA2_7B)
    assert (target.hidden_size, target.n_layers, target.n_heads, target.intermediate_size) == shape
    assert target.n_params() == pytest.approx(n_params, rel=0.01)
    assert (cfg.max_steps, cfg.global_batch_size, cfg.seq_len) == (3200, 32, 4096)
    assert (more.max_steps, more.global_batch_size, more.seq_len) == (48000, 256, 4096)
    assert (cfg.learning_rate, cfg.mask_learning_rate, cfg.multiplier_learning_rate) == (1e-4, 1, 1)
    assert more.learning_rate == 1e-4
    assert (cfg.warmup_steps, cfg.lagrangian_warmup_steps, more.warmup_steps) == (320, 640, 1440)
    assert (cfg.eval_interval, more.eval_interval, cfg.save_interval, more.save_interval) == (50, 400, 400, 3200)
    assert cfg.reference_loss == more.reference_loss  # the released script of 1.3B took the 2.7B model's
    assert cfg.excess == more.excess == "signed"
    assert list(cfg.domain_weights) == ["cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4-rp"]


def test_pythia_is_counted_as_released():
    """Sheared-Pythia-160m has Pythia-160m's shape; both models' parameters as their pages tell."""
    cfg = parse(Path("configs/pythia_410m_to_160m.py"))
    target = prune.target_config(cfg, PYTHIA_410M)
    assert (target.hidden_size, target.n_layers, target.n_heads, target.intermediate_size) == (768, 12, 12, 3072)
    assert (PYTHIA_410M.n_params(), target.n_params()) == (405_334_016, 162_322_944)
    assert cfg.max_steps * cfg.global_batch_size * cfg.seq_len == pytest.approx(0.4e9, rel=0.05)
