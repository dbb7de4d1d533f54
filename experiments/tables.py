"""The tables of docs/results.md, from experiments/results/*.jsonl and nothing else.

    python -m experiments.tables            # writes them between the markers of docs/results.md
    python -m experiments.tables --print    # prints them

A row is a way of choosing units, over all seeds that were run: mean and, in brackets, lowest to highest.  Against
activation: the mean over seeds of a way's loss less that of activation importance with the same seed.
"""

import json
import re
import sys
from pathlib import Path

from experiments.run import LADDERS, RESULTS

DOCS = Path("docs/results.md")
MARKERS = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(ladder: str) -> list[dict]:
    """The lines of a ladder's cells; none if it was not run."""
    path = RESULTS / f"{ladder}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ({min(values):.4f} to {max(values):.4f})"


def row(way: str, cells: dict[int, dict], rival: dict[int, dict]) -> str:
    """One line of a table.  cells, rival: seed -> line of results, of this way and of activation importance."""
    gaps = [cells[seed]["loss"] - rival[seed]["loss"] for seed in cells if seed in rival]
    against = f"{sum(gaps) / len(gaps):+.4f}" if gaps and way != "activation" else ""
    values = list(cells.values())
    spent, steps = sum(v["spent_source_tokens"] for v in values) / len(values), values[0]["steps"]
    return (f"| {way} | {len(values)} | {spent:,.0f} | {steps} | {spread([v['first_loss'] for v in values])} | "
            f"{spread([v['loss'] for v in values])} | {against} |")


def table(ladder: str) -> str:
    """A ladder's table in Markdown, the ways by their loss at the end."""
    cells: dict[str, dict[int, dict]] = {}
    for line in results(ladder):
        cells.setdefault(line["way"], {})[line["seed"]] = line
    order = sorted(cells, key=lambda way: sum(v["loss"] for v in cells[way].values()) / len(cells[way]))
    lines = ["| way | seeds | source tokens | steps after | loss after the cut | loss at the end | against activation |",
             "|---|---|---|---|---|---|---|"]
    lines += [row(way, cells[way], cells.get("activation", {})) for way in order]
    if missing := [way for way in LADDERS[ladder].ways if way not in cells]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """A document with what stands between its markers made anew."""
    return MARKERS.sub(lambda match: match[1] + table(match[2]) + match[3], text)


def main() -> None:
    if sys.argv[1:] not in ([], ["--print"]):
        sys.exit(f"tables.py: unknown argument {sys.argv[1]}; there is only --print")
    if sys.argv[1:]:
        return print("\n".join(f"{name}\n\n{table(name)}" for name in LADDERS))
    DOCS.write_text(filled(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {DOCS}")


if __name__ == "__main__":
    main()
