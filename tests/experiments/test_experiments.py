"""Cells run the stages within their budget; tables pair seeds; docs/results.md holds what the results say."""

import json
import shutil

import pytest
from conftest import TARGET

from experiments import run, tables

TINY_LADDER = run.Ladder(target=TARGET, seq_len=32, batch=8, budget=12, learning_rate=1e-3, seeds=(1,), eval_sequences=5,
                         ways={"learned": run.Way("gradient", 4, 1, steps=2, batch=4), "scratch": run.Way(""),
                               "random": run.Way("random", 8), "sampled": run.Way("", steps=2, batch=8, sampled="rescaled"),
                               "taught": run.Way("random", 8, kd_weight=0.5, budget=2)})


@pytest.mark.parametrize("way", TINY_LADDER.ways)
def test_a_cell_spends_its_budget(tmp_path, monkeypatch, data_dir, source, way):
    ladder, data = TINY_LADDER, tmp_path / "data"
    shutil.copytree(data_dir, data)
    (data / "tokenizer" / "tokenizer.json").unlink()  # the fixture's is none, which pretrain.py would refuse
    monkeypatch.setattr(run, "SPLIT", "train")  # the fixture's data has no other
    line = run.run_cell(ladder, "tiny", way, 1, data, source, tmp_path)
    sequences = {"learned": 4 * 2 / 3 + 2 * 4 * 2 / 3, "random": 0, "scratch": 0, "taught": 0, "sampled": 2 * 8}[way]
    assert line["spent_source_tokens"] == round(sequences * 32)
    shape, target = run.shapes(ladder, ladder.ways[way], source)
    whole, small = shape.train_flops_per_token(32), target.train_flops_per_token(32)
    each = small + whole / 3 if way == "taught" else small  # a teacher runs forward
    spent, step = sequences * 32 * whole + line["tokens"] * each, ladder.batch * 32
    assert abs(spent - ladder.budget * ladder.ways[way].budget * step * small) <= step * each / 2
    assert line["params"] == target.n_params() and set(line["domains"]) == {"code", "play", "wiki"}
    assert (tmp_path / "train" / f"step_{line['steps']:07d}").is_dir()


def test_a_table_pairs_seeds_with_those_of_the_rival(tmp_path, monkeypatch):
    def line(way, seed, loss):
        return json.dumps(dict(way=way, seed=seed, loss=loss, first_loss=loss + 1, steps=10, spent_source_tokens=seed * 100,
                               params=1_500_000, domains={"wiki": loss, "code": loss - 1}))

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "small.jsonl").write_text("\n".join([line("activation", 1, 4.0), line("activation", 2, 4.2),
                                                    line("learned", 2, 4.05), line("random", 3, 5.0)]) + "\n")
    ways = ["learned", "activation", "random", "magnitude"]
    rows = [row for row in tables.table("small", ways).splitlines() if row.startswith("| ")][1:]
    assert rows == ["| learned | 1 | 1.50 | 200 | 10 | 5.0500 | 4.0500 | -0.1500 (activation) |",
                    "| activation | 2 | 1.50 | 150 | 10 | 5.1000 (5.0000 to 5.2000) | 4.1000 (4.0000 to 4.2000) |  |",
                    "| random | 1 | 1.50 | 300 | 10 | 6.0000 | 5.0000 |  |"]
    assert tables.table("small", ways).endswith("Not run: magnitude.\n")
    assert "| activation | 3.1000 | 4.1000 |" in tables.domains("small", ways)


def test_the_document_holds_the_tables_of_the_results():
    text = tables.DOCS.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python -m experiments.tables"
    shown = {(ladder, way) for _, _, ladder, ways, _ in tables.MARKERS.findall(text) for way in ways.split(",")}
    assert shown == {(name, way) for name, ladder in run.LADDERS.items() for way in ladder.ways}
    for path in run.RESULTS.glob("*.jsonl"):
        lines = tables.results(path.stem)
        assert len({(line["way"], line["seed"]) for line in lines}) == len(lines), f"{path} has a cell twice"
