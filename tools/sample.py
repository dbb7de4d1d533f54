"""Text from a model folder, or from a checkpoint of pretrain.py.

    python -m tools.sample --model_dir=out/demo/continue/step_0000300 --prompt="Once upon a time" --n_samples=2
    python -m tools.sample --model_dir=models/smollm2-135m --temperature=0

Every token runs the whole context through the model again: no cache here makes model.py longer.  Who serves a model
exports it (convert.py --to_hf).
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from model import ModelConfig, Transformer
from run.settings import FilePath, check, require, run_stage
from run.tokenizer import load_tokenizer
from run.weights import load_weights, newest_in, read_model_config


@dataclass(frozen=True)
class SampleSettings:
    model_dir: FilePath  # model folder, step_* folder, or a run's for its newest; its tokenizer is in assets/
    prompt: str = ""  # text to go on from; a BOS token goes before it if the tokenizer has one
    max_new_tokens: int = 200  # a sample ends here, or with EOS
    temperature: float = 0.8  # below 1 the likely tokens become likelier; 0: always the likeliest
    top_k: int = 50  # draw among so many likeliest tokens; 0: among all
    n_samples: int = 1  # how many texts
    seed: int = 1234  # sample i draws with seed + i
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu

    def __post_init__(self):
        for name in ("max_new_tokens", "n_samples"):
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)} must be above 0")
        for name in ("temperature", "top_k", "seed"):
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)} must not be negative")
        require(not re.search("[\ud800-\udfff]", self.prompt), f"prompt = {self.prompt!a} is no text: not all of it is "
                "UTF-8; give it in that encoding")


def next_token(logits: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw one token.  logits: [V]; on the CPU, so that a seed draws the same on every device."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(top_k or len(logits), len(logits)))
    probabilities = torch.softmax((values - values[0]) / temperature, 0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def generate(model: Transformer, prompt: list[int], *, max_new_tokens: int, temperature: float, top_k: int,
             generator: torch.Generator, eos_id: int | None = None) -> list[int]:
    """Tokens that go on from the prompt, up to max_new_tokens or EOS (left out).  The model sees its last context_length."""
    device = next(model.parameters()).device
    tokens = list(prompt)
    for _ in tqdm(range(max_new_tokens), unit=" tokens", leave=False, disable=None):
        context = torch.tensor([tokens[-model.cfg.context_length:]], device=device)  # (1, T)
        token = next_token(model(context)[0, -1], temperature=temperature, top_k=top_k, generator=generator)
        if token == eos_id:
            break
        tokens.append(token)
    return tokens[len(prompt):]


def main(settings: SampleSettings) -> None:
    folder, device = newest_in(settings.model_dir), settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    check(device != "cuda" or torch.cuda.is_available(), "device = cuda, but torch sees no CUDA device; take --device=cpu")
    check(device != "mps" or torch.backends.mps.is_available(), "device = mps, but torch sees none; take --device=cpu")
    cfg = read_model_config(folder, ModelConfig)
    check(not (folder / "masks.safetensors").exists(), f"{folder} holds masks; run compact.py first")
    tokenizer = load_tokenizer(folder / "assets")
    start, text = [] if tokenizer.bos_id is None else [tokenizer.bos_id], tokenizer.encode(settings.prompt)
    prompt = start + text
    check(bool(prompt), "prompt is empty and the tokenizer has no BOS token to start from; give --prompt=...")
    check(max(prompt) < cfg.vocab_size, f"the tokenizer in {folder / 'assets'} has token {max(prompt)} for the prompt, but "
          f"the model has vocab_size = {cfg.vocab_size}; put the model's own tokenizer there")
    with torch.device("meta"):  # no time goes into weights that are about to be replaced
        model = Transformer(cfg)
    load_weights(model.to_empty(device=device), folder)
    if len(prompt) > cfg.context_length:
        print(f"(the model sees the last {cfg.context_length} of the prompt's {len(prompt)} tokens)")
    for i in range(settings.n_samples):
        generator = torch.Generator().manual_seed(settings.seed + i)
        new = generate(model, prompt, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
                       top_k=settings.top_k, generator=generator, eos_id=tokenizer.eos_id)
        print(tokenizer.decode(text + new))  # in one piece: a space can belong to the token behind it
        print("-" * 16)


if __name__ == "__main__":
    run_stage(main, SampleSettings)
