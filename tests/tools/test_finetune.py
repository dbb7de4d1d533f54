"""tools/finetune.py: a tiny export learns conversations; the loss is the answers', the template travels with the export."""

import json

import pytest
import torch
from conftest import refusal

from tools import finetune
from tools.finetune import FinetuneSettings

TALKS = [[("human", f"What is {a} and {b}?"), ("gpt", f"It is {a + b}."), ("human", "Sure?"), ("gpt", "Yes.")]
         for a in range(4) for b in range(4)]


@pytest.fixture
def data(tmp_path):
    """Half of the lines as ShareGPT has them, half as messages; then one whose answer lies beyond seq_len."""
    path = tmp_path / "talks.jsonl"
    talks = [*TALKS, [("human", "\u2028" * 200), ("gpt", "No.")]]
    path.write_text("".join(json.dumps(
        {"conversations": [{"from": who, "value": text} for who, text in talk]} if i % 2 else
        {"messages": [{"role": finetune.ROLES[who], "content": text} for who, text in talk]}, ensure_ascii=False) + "\n"
        for i, talk in enumerate(talks)), encoding="utf-8")
    return path


@torch.no_grad()
def loss_of(folder, batch: dict) -> float:
    """Mean over the tokens that have a label."""
    from transformers import AutoModelForCausalLM

    logits = AutoModelForCausalLM.from_pretrained(folder)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()))


def test_an_export_learns_the_answers(letters_export, data, tmp_path, monkeypatch, capsys):
    trl = pytest.importorskip("trl", reason="the extra `chat` is not installed: make extras")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, seen, train = tmp_path / "chat", [], trl.SFTTrainer.train

    def training(self):
        seen.extend([next(iter(self.get_train_dataloader())), self.train_dataset[1]])
        return train(self)

    monkeypatch.setattr(trl.SFTTrainer, "train", training)
    finetune.main(FinetuneSettings(str(letters_export), str(data), str(out), learning_rate=3e-3, epochs=5, seq_len=128,
                                   global_batch_size=4, micro_batch_size=2))
    assert "20 steps; 16 conversations; 1 have no answer in seq_len" in capsys.readouterr().out
    batch, example = seen
    assert loss_of(out, batch) < loss_of(letters_export, batch) - 1

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 258  # no token is new
    whole = "<s>User: What is 0 and 1?\n\nAssistant: It is 1.</s>\n\nUser: Sure?\n\nAssistant: Yes.</s>\n\n"
    assert tokenizer.decode(example["input_ids"]) == whole
    at = [i for i, label in enumerate(example["labels"]) if label != -100]
    assert [example["input_ids"][i] for i in at] == [example["labels"][i] for i in at]
    assert tokenizer.decode([example["labels"][i] for i in at]) == " It is 1.</s> Yes.</s>"  # and nothing of the questions

    chat = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "What is 1 and 2?"}]
    found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert tokenizer.decode(found["input_ids"][0]) == "<s>Be exact.\n\nUser: What is 1 and 2?\n\nAssistant:"
    answer = model.generate(**found, max_new_tokens=30, do_sample=False)[0, found["input_ids"].shape[1]:]
    assert tokenizer.decode(answer).startswith(" ") and len(answer) > 1


def test_the_defaults_are_the_published_recipe():
    cfg = FinetuneSettings("e", "d", "o")
    assert (cfg.learning_rate, cfg.epochs, cfg.global_batch_size, cfg.seq_len) == (5e-6, 3, 128, 2048)


def test_refusals(letters_export, tmp_path, monkeypatch, capsys):
    def said(text: str, *argv: str, export=letters_export) -> str:
        (tmp_path / "d.jsonl").write_text(text)
        return refusal("finetune", [str(export), f"--data={tmp_path}/d.jsonl", f"--out_dir={tmp_path}/o", *argv],
                       monkeypatch, capsys)

    good = json.dumps({"messages": [{"role": "assistant", "content": "a"}]})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("[]")
    assert "config.json lacks a whole number max_position_embeddings" in said(good, export=tmp_path / "bad")
    assert "d.jsonl: line 3 is not JSON" in said(good + "\n\n{\n")
    assert 'line 1 has neither a list "messages"' in said('{"text": "a"}\n')
    assert "line 2 has a turn of 'robot'" in said(good + '\n{"conversations": [{"from": "robot", "value": "a"}]}\n')
    no_text = "has a turn of 'user', not human, user, gpt, assistant, system, or no text"
    assert no_text in said('{"messages": [{"role": "user", "content": ["a"]}]}\n')
    assert "line 1 has a turn of None" in said('{"messages": ["a"]}\n')
    assert "line 1 'utf-8' codec can't encode" in said('{"messages": [{"role": "user", "content": "\\ud800"}]}')
    assert "line 1 has no turn of the assistant's" in said('{"conversations": [{"from": "human", "value": "a"}]}\n')
    assert "holds no conversation" in said("\n")
    assert "is no multiple of micro_batch_size" in said(good, "--micro_batch_size=7")
    assert "config.json: No such file" in said(good, export=tmp_path)
    assert "longer than the export's context of 256 tokens" in said(good, "--seq_len=2048")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in said(good)
    assert not (tmp_path / "o").exists()
