"""tools/evaluate.py, offline: what the harness finds is what the model says, and held-out loss is what a run measures."""

import json
import math

import pytest
import torch
from conftest import DOMAINS, eval_lines, refusal

import convert
from run.settings import UserError
from tools import evaluate
from tools.evaluate import AVERAGED, PUBLISHED, TASKS, EvaluateSettings

QUESTIONS = [("the sky is", ["blue", "dogs", "zero"], 0), ("two and two are", ["four", "reds"], 1),
             ("a cat is", ["wood", "fish", "pets"], 0), ("it rains", ["down", "over", "more"], 2),
             ("one", ["two", "ten"], 1), ("ab", ["cd", "xz", "ee"], 1), ("seven", ["of", "or", "it"], 2),
             ("so", ["that", "much"], 0)]
TASK = """task: %s
dataset_path: %s
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with one task; its data lie beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "quiz.yaml").write_text(TASK % ("quiz", "json\ndataset_kwargs: {data_files: {test: quiz.jsonl}}"))
    (folder / "quiz.jsonl").write_text("".join(json.dumps({"question": q, "choices": c, "answer": a}) + "\n"
                                               for q, c, a in QUESTIONS))
    return folder


@torch.no_grad()
def likeliest(folder, question: str, choices: list[str]) -> int:
    """The choice of the highest probability behind the question, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start, totals = tokenizer(question)["input_ids"], []
    for choice in choices:
        ids = torch.tensor([start + tokenizer(" " + choice)["input_ids"]])
        losses = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        totals.append(float(losses[len(start) - 1:].sum()))
    return totals.index(max(totals))


def test_a_task_of_a_folder(letters_export, tasks, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed: make extras")
    cfg = EvaluateSettings(str(letters_export), str(tmp_path / "out"), tasks=str(tasks), batch_size=2)
    evaluate.main(cfg)
    right = [likeliest(letters_export, q, c) == a for q, c, a in QUESTIONS]
    acc, n = sum(right) / len(right), len(right)
    error = (acc * (1 - acc) / (n - 1)) ** 0.5
    assert 0 < acc < 1
    row = f"| quiz | 0 | acc | {acc:.4f} | {error:.4f} |"
    assert row in capsys.readouterr().out

    kept = (tmp_path / "out" / "quiz.json").read_text()
    with monkeypatch.context() as patch:  # the same again: no model is loaded
        patch.setattr(evaluate, "load_model", lambda cfg: pytest.fail("a model was loaded"))
        evaluate.main(cfg)
        said = capsys.readouterr().out
        assert "quiz: taken from" in said and row in said
    evaluate.main(EvaluateSettings(str(letters_export), str(tmp_path / "out"), tasks=str(tasks), limit=2))
    assert "of another export or other settings; measured again" in capsys.readouterr().out
    assert (tmp_path / "out" / "quiz.json").read_text() != kept


def test_refusals(letters_export, tasks, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed: make extras")
    import datasets
    import huggingface_hub.constants

    def said(*argv: str) -> str:
        return refusal("evaluate", [str(letters_export), f"--out_dir={tmp_path}/out", *argv], monkeypatch, capsys)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as without a network, at once
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tasks / "far.yaml").write_text(TASK % ("far", "nobody/not_cached"))
    assert "task far cannot be loaded: " in said(f"--tasks={tasks}", "--names=('far',)")
    assert "no task is named 'quizz'; did you mean quiz?" in said(f"--tasks={tasks}", "--names=('quizz',)")
    assert "tasks = nowhere is no folder" in said("--tasks=nowhere")
    assert "has no config.json" in refusal("evaluate", [str(tmp_path), f"--out_dir={tmp_path}/out"], monkeypatch, capsys)
    quiz = (tasks / "quiz.yaml").read_text()
    for name, text, why in (("shots", quiz + "num_fewshot: 9\n", "does not fit its data"),
                            ("field", quiz.replace("{{question}}", "{{wonder}}"), "'wonder' is undefined")):
        (tasks / f"{name}.yaml").write_text(text.replace("task: quiz", f"task: {name}"))
        with pytest.raises(UserError, match=f"task {name} .*{why}"):
            evaluate.main(EvaluateSettings(str(letters_export), str(tmp_path / "out"), (name,), str(tasks)))
    assert not (tmp_path / "out").exists()


def test_held_out_loss_is_what_a_run_measures(source, pruned, data_dir, tmp_path, monkeypatch, capsys):
    """prune.py's first evaluation is of the source as it is."""
    convert.main(convert.ConvertSettings(to_hf=str(source), out_dir=str(tmp_path / "export")))
    argv = [str(tmp_path / "export"), f"--out_dir={tmp_path}/out", "--names=()", f"--data_dir={data_dir}"]
    said = refusal("evaluate", [*argv, "--seq_len=4096"], monkeypatch, capsys)
    assert said == "seq_len = 4096 is longer than the export's context of 64 tokens"
    assert "nothing to measure" in refusal("evaluate", argv[:3], monkeypatch, capsys)
    (tmp_path / "bad").mkdir()
    for text in ("[]", "{}", '{"max_position_embeddings": null, "vocab_size": 9}'):
        (tmp_path / "bad" / "config.json").write_text(text)
        said = refusal("evaluate", [str(tmp_path / "bad"), *argv[1:]], monkeypatch, capsys)
        assert "lacks a whole number max_position_embeddings or vocab_size" in said
    evaluate.main(EvaluateSettings(argv[0], str(tmp_path / "out"), names=(), data_dir=str(data_dir), seq_len=32,
                                   eval_sequences=5))
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "held_out.json").read_text())["result"]
    first = eval_lines(pruned)[0]
    assert found == pytest.approx({domain: first[f"eval_loss/{domain}"] for domain in DOMAINS}, abs=1e-5)
    assert all(f"| {domain} | {loss:.4f} | {math.exp(loss):.2f} |" in said for domain, loss in found.items())


def test_published_rows_stand_beside_a_full_average():
    results = {name: {"shots": shots, "metrics": {f"{metric},none": 0.5, f"{metric}_stderr,none": 0.11, "other,none": 0.1}}
               for name, (shots, metric) in TASKS.items()}
    said = evaluate.table(results, theirs=True)
    assert len(AVERAGED) == 11 and "other" not in said
    assert "| average of the paper's 11, in percent | | | 50.0 | 3.3 |" in said
    assert said.count("published: ") == len(PUBLISHED)
    del results["mmlu"]
    assert "average" not in evaluate.table(results, theirs=True)
