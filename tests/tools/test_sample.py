"""Samples depend on their seed only, and are what the model's logits say."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_model

from model import ModelConfig, Transformer
from run.settings import UserError
from tools import sample

CFG = ModelConfig(vocab_size=64, hidden_size=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, intermediate_size=48,
                  context_length=16)
LETTERS = SimpleNamespace(vocab_size=64, bos_id=1, eos_id=2, encode=lambda text: [ord(c) - 60 for c in text],
                          decode=lambda ids: "".join(chr(i + 60) for i in ids))


def random_model() -> Transformer:
    model, generator = Transformer(CFG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=generator)
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    write_model(tmp_path, dict(random_model().named_parameters()), CFG, [])
    monkeypatch.setattr(sample, "load_tokenizer", lambda assets: LETTERS)
    return tmp_path


def generate(prompt: list[int], *, seed: int = 0, **changes) -> list[int]:
    settings = dict(max_new_tokens=20, temperature=1.0, top_k=10) | changes
    return sample.generate(random_model(), prompt, generator=torch.Generator().manual_seed(seed), **settings)


def printed(capsys, folder: Path, **settings) -> list[str]:
    sample.main(sample.SampleSettings(model_dir=str(folder), device="cpu", **settings))
    return capsys.readouterr().out.split("\n" + "-" * 16 + "\n")[:-1]


def test_a_seed_gives_a_text(folder, capsys):
    texts = printed(capsys, folder, prompt="AB", max_new_tokens=30, n_samples=3)
    assert len(set(texts)) == 3 and all(text.startswith("AB") for text in texts)
    torch.manual_seed(99)  # the global generator has no part in it
    assert texts == printed(capsys, folder, prompt="AB", max_new_tokens=30, n_samples=3)
    assert texts[1:2] == printed(capsys, folder, prompt="AB", max_new_tokens=30, seed=1235)


def test_a_runs_folder_is_its_newest_checkpoint(folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for step in (3, 12):
        shutil.copytree(folder, tmp_path / "run" / f"step_{step:07d}", ignore=shutil.ignore_patterns("run"))
    first, text = printed(capsys, tmp_path / "run", prompt="AB")[0].split("\n", 1)
    assert first == f"{tmp_path / 'run'} is a run's folder: taking its newest checkpoint, step_0000012"
    assert text == printed(capsys, folder, prompt="AB")[0]


@torch.no_grad()
def test_greedy_is_the_argmax_also_past_the_context():
    model, tokens = random_model(), [1, 5, 9]
    for _ in range(20):
        tokens.append(int(model(torch.tensor([tokens[-16:]]))[0, -1].argmax()))
    assert generate([1, 5, 9], temperature=0) == tokens[3:]
    assert generate([1, 5, 9], top_k=1) == tokens[3:]


def test_progress_is_shown(monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "tqdm", lambda steps, **options: seen.append(len(steps)) or steps)
    generate([1, 5, 9])
    assert seen == [20]


def test_stops_before_eos():
    tokens = generate([1, 5, 9])
    assert generate([1, 5, 9], eos_id=tokens[7]) == tokens[:tokens.index(tokens[7])]


@torch.no_grad()
def test_draws_follow_the_logits():
    logits, generator = torch.randn(64, generator=torch.Generator().manual_seed(4)), torch.Generator().manual_seed(5)
    draws = [sample.next_token(logits, temperature=0.5, top_k=5, generator=generator) for _ in range(4000)]
    kept = logits.topk(5).indices
    want = torch.zeros(64).index_copy(0, kept, torch.softmax(logits[kept] / 0.5, 0))
    assert (torch.bincount(torch.tensor(draws), minlength=64) / 4000 - want).abs().max() < 0.03


def test_long_prompt_is_cropped_and_said(folder, capsys):
    text = printed(capsys, folder, prompt="ABCDEFGHIJKLMNOPQRSTUVWXYZ", max_new_tokens=3, temperature=0.0)[0]
    assert text.startswith("(the model sees the last 16 of the prompt's 27 tokens)\nABCDEFGHIJ")


def test_refused(folder):
    (folder / "masks.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"run compact\.py first"):
        sample.main(sample.SampleSettings(model_dir=str(folder)))
    for flags, message in ((["--model_dir=nowhere"], "model folder nowhere does not exist"),
                           (["--model_dir=x", "--temperature=-1"], "temperature = -1.0 must not be negative")):
        done = subprocess.run([sys.executable, "-m", "tools.sample", *flags], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, f"sample.py: {message}\n")
