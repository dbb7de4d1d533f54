"""Every shape that the chooser prints can be reached by prune.py, is of the size asked for, and divides as asked."""

import json
import re
import shlex

import pytest
from conftest import refusal, tiny_config

import prune
from run.settings import parse_args
from tools import shapes

LLAMA2 = dict(vocab_size=32000, hidden_size=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128,
              intermediate_size=11008)
LLAMA3_HF = dict(model_type="llama", vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=8192, rms_norm_eps=1e-5,
                 rope_theta=500000.0)


PYTHIA_HF = dict(model_type="gpt_neox", vocab_size=50304, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                 intermediate_size=4096, max_position_embeddings=2048, layer_norm_eps=1e-5)


@pytest.fixture
def folders(tmp_path):
    for name, file, config in (("llama2", "model_config.json", LLAMA2), ("llama3", "config.json", LLAMA3_HF),
                               ("pythia", "config.json", PYTHIA_HF)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(config))
    return tmp_path


def printed(capsys, source, target_params: float, **changes) -> dict[str, tuple[int, object]]:
    """By name of a shape: (parameters in its row, the target that prune.py makes of its flags)."""
    shapes.main(shapes.ShapeSettings(source=str(source), target_params=target_params, **changes))
    out = capsys.readouterr().out
    model = shapes.read_source(source)
    rows = {m[1]: int(m[2].replace(",", "")) for m in re.finditer(r"^(\S.*?) {2,}.* ([\d,]{6,}) +[\d.]+% ", out, re.M)}
    assert rows.pop("the source") == model.n_params()
    found = {}
    for name, line in re.findall(r"^(.*):\n  (--target.*)$", out, re.M):
        cfg = parse_args(prune.PruneSettings, ["--data_dir=d", "--out_dir=o", "--init_from=s", *shlex.split(line)])
        found[name] = rows.pop(name), prune.target_config(cfg, model)
    assert not rows
    return found


@pytest.mark.parametrize("source, size", [("llama2", 1.3e9), ("llama2", 2.7e9), ("llama3", 4e9), ("llama3", 1.5e9)])
@pytest.mark.parametrize("tensor_parallel", [1, 8])
def test_shapes_can_be_pruned_to_and_divide(folders, capsys, source, size, tensor_parallel):
    found = printed(capsys, folders / source, size, tensor_parallel=tensor_parallel, multiple=128)
    assert len(found) >= 3
    for name, (n_params, shape) in found.items():
        assert shape.n_params() == n_params and abs(n_params / size - 1) <= shapes.NEAR
        assert shapes.reachable(shapes.read_source(folders / source), shape)
        assert shape.hidden_size % 128 == shape.intermediate_size % 128 == shape.n_heads % tensor_parallel == 0, name
        assert shape.n_kv_heads % tensor_parallel == 0 or tensor_parallel % shape.n_kv_heads == 0
        if name in shapes.KINDS:
            assert abs(n_params / size - 1) <= shapes.NEAR / 2
    layers = {name: shape.n_layers for name, (_, shape) in found.items()}
    assert layers["deep: all layers"] == 32 > layers["the source's proportions"]


def test_shapes_of_pythia_can_be_exported(folders, capsys):
    """GPT-NeoX has no head_dim: every shape's heads are as wide as the source's."""
    found = printed(capsys, folders / "pythia", 162_322_944)
    assert next(iter(found)) == "Pythia-160M" and found["Pythia-160M"][0] == 162_322_944 and len(found) >= 3
    assert all(shape.hidden_size == 64 * shape.n_heads for _, shape in found.values())


def test_the_published_shape_of_the_family_comes_first(folders, capsys):
    found = printed(capsys, folders / "llama2", 1.3e9)
    name, (n_params, shape) = next(iter(found.items()))
    assert (name, n_params) == ("Sheared-LLaMA-1.3B", 1345423360)  # the paper's count
    assert shapes.kv_bytes(shape) == 24 * 16 * 128 * 2 * 2
    assert "Llama-3.1-Minitron-4B-Width" in printed(capsys, folders / "llama3", 4.5e9)


@pytest.mark.parametrize("family", shapes.PUBLISHED)
def test_published_shapes_are_shapes(family):
    """Their numbers fit together, and of each family at least one leads to another."""
    def config(numbers):
        d, L, H, K, f, h = numbers
        return tiny_config(hidden_size=d, n_layers=L, n_heads=H, n_kv_heads=K, intermediate_size=f, head_dim=h)

    sizes = [config(numbers) for numbers in shapes.PUBLISHED[family].values()]
    assert any(shapes.reachable(a, b) for a in sizes for b in sizes if a.head_dim == b.head_dim)


def test_grouped_heads_and_odd_sources(tmp_path, capsys):
    """Three KV heads, as the demo's source: everything printed still divides."""
    (tmp_path / "model_config.json").write_text(tiny_config(
        vocab_size=2048, hidden_size=192, n_layers=6, n_heads=6, n_kv_heads=3, head_dim=32, intermediate_size=512).to_json())
    found = printed(capsys, tmp_path, 1.2e6, multiple=32)
    assert found and all(shape.n_kv_heads in (1, 2, 3) for _, shape in found.values())


def test_refusals(folders, monkeypatch, capsys):
    def said(*argv: str) -> str:
        return refusal("shapes", [str(a) for a in argv], monkeypatch, capsys)

    assert "must be below the source's 6,738,415,616" in said(folders / "llama2", "--target_params=7e9")
    assert "has no model_config.json and no config.json" in said(folders, "--target_params=1e9")
    assert "gpu = T800 is not one of" in said(folders / "llama2", "--target_params=1e9", "--gpu=T800")
    assert "take smaller ones" in said(folders / "llama3", "--target_params=4e9", "--tensor_parallel=31")
    assert said("--target_params=1e9").endswith("give SOURCE")


def test_a_runs_folder_is_its_newest_checkpoint(pruned):
    assert shapes.read_source(pruned) == shapes.read_source(pruned / "step_0000006")
