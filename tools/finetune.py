"""Instruction tuning of an export: trl's SFT trainer on conversations, the loss on the assistant's turns alone.

    python -m tools.finetune export/1.3b --data=sharegpt.jsonl --out_dir=export/1.3b_chat

The defaults are the published recipe, for 10,000 ShareGPT conversations.  A line of the file has "conversations", a list of
{"from": "human", "gpt" or "system", "value": TEXT}, or "messages", of {"role": "user", "assistant" or "system", "content":
TEXT}.  The chat template goes into the new export, in place of any other.  `make extras` installs trl.
"""

import importlib.util
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from run.settings import FilePath, UserError, check, export_config, require, run_stage
from run.weights import new_folder

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Plain words, so no token is new.  `generation` marks what the loss is taken over: the answer and the EOS behind it.
TEMPLATE = ("{{- bos_token or '' -}}{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{ m['content'] + '\\n\\n' }}"
            "{%- elif m['role'] == 'user' -%}{{ 'User: ' + m['content'] + '\\n\\n' }}{%- else -%}{{ 'Assistant:' }}"
            "{%- generation -%}{{ ' ' + m['content'] + eos_token }}{%- endgeneration -%}{{ '\\n\\n' }}{%- endif -%}"
            "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}")


@dataclass(frozen=True)
class FinetuneSettings:
    export: FilePath  # Hugging Face folder to start from, as convert.py --to_hf writes it
    data: FilePath  # JSONL file of conversations; see above
    out_dir: FilePath  # folder to write; must not exist
    learning_rate: float = 5e-6  # peak; linear warm-up over 3% of the steps, cosine to 0
    epochs: float = 3.0  # times that each conversation is seen
    global_batch_size: int = 128  # conversations a step
    micro_batch_size: int = 8  # conversations a forward pass
    seq_len: int = 2048  # tokens; what a conversation has beyond them is left out
    seed: int = 1234  # of the order of the conversations

    positional = "export"

    def __post_init__(self):
        for name in ("learning_rate", "epochs", "global_batch_size", "micro_batch_size", "seq_len"):
            require(0 < getattr(self, name) < math.inf, f"{name} = {getattr(self, name)} must be above 0")
        require(self.global_batch_size % self.micro_batch_size == 0,
                f"global_batch_size = {self.global_batch_size} is no multiple of micro_batch_size = {self.micro_batch_size}")


def messages(line: str) -> list[dict[str, str]]:
    """A line's conversation as transformers writes it.  Raises ValueError, saying what is wrong with it."""
    values = json.loads(line)
    turns = values.get("messages", values.get("conversations")) if isinstance(values, dict) else None
    require(isinstance(turns, list), 'has neither a list "messages" nor a list "conversations"')
    found = []
    for turn in turns:
        turn = turn if isinstance(turn, dict) else {}
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        require(role in list(ROLES) and isinstance(text, str), f"has a turn of {role!r}, not {', '.join(ROLES)}, or no text")
        found.append({"role": ROLES[role], "content": text.encode().decode()})  # a lone surrogate is a ValueError
    require(any(m["role"] == "assistant" for m in found), "has no turn of the assistant's")
    return found


def conversations(path: Path) -> list[dict]:
    """Those of a JSONL file.  Raises UserError, or OSError."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            found += [{"messages": messages(line.decode())}] if line.strip() else []
        except (ValueError, RecursionError) as error:
            what = "is not JSON" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{path}: line {number} {what}") from None
    check(bool(found), f"data = {path} holds no conversation")
    return found


def make_trainer(cfg: FinetuneSettings, data: list[dict], folder: Path):
    """trl's trainer of the export on these conversations.  Its weights are fp32, on a GPU with products in bf16."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.export)
        model = AutoModelForCausalLM.from_pretrained(cfg.export, dtype=torch.float32)  # bf16 has no room for such a rate
    except (OSError, ValueError) as error:
        raise UserError(f"export = {cfg.export} cannot be loaded: {error}") from None
    check(tokenizer.eos_token is not None, f"the tokenizer of {cfg.export} has no EOS token to end an answer with")
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.pad_token or tokenizer.eos_token
    args = trl.SFTConfig(
        output_dir=str(folder), save_strategy="no", report_to="none", logging_steps=1, seed=cfg.seed,
        bf16=torch.cuda.is_available(), assistant_only_loss=True, max_length=cfg.seq_len, num_train_epochs=cfg.epochs,
        learning_rate=cfg.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.03,  # below 1: a share of the steps
        per_device_train_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=cfg.global_batch_size // cfg.micro_batch_size)
    return trl.SFTTrainer(model, args=args, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(data))


def main(cfg: FinetuneSettings) -> None:
    config = export_config(cfg.export, "max_position_embeddings")
    context = config["max_position_embeddings"]
    check(os.environ.get("WORLD_SIZE", "1") == "1", "tools.finetune runs as one process; start it without torchrun")
    data = conversations(Path(cfg.data))
    check(cfg.seq_len <= context, f"seq_len = {cfg.seq_len} is longer than the export's context of {context} tokens")
    check(importlib.util.find_spec("trl") is not None, "trl is not installed; pip install -e '.[chat]'")
    with new_folder(cfg.out_dir) as folder:
        trainer = make_trainer(cfg, data, folder)
        n = len(trainer.train_dataset)
        check(n > 0, f"no conversation of {cfg.data} has an answer within seq_len = {cfg.seq_len} tokens")
        trainer.train()
        trainer.model.to(getattr(torch, config.get("dtype", "float32"))).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    print(f"{cfg.out_dir}: {trainer.state.global_step} steps; {n} conversations; {len(data) - n} have no answer in seq_len")


if __name__ == "__main__":
    run_stage(main, FinetuneSettings)
