"""The tables of docs/results.md, from experiments/results/*.jsonl and nothing else.

    python -m experiments.tables            # writes them between the markers of docs/results.md
    python -m experiments.tables --print    # prints what it would write

A marker in the document, `<!-- table LADDER WAY,WAY,... -->`, says which ways its table holds.  A row is a way over all
seeds that were run: mean and, in brackets, lowest to highest.  The last column is the mean over seeds of a way's loss less
that of its rival with the same seed.  `<!-- domains LADDER WAY,... -->` gives the losses by domain.
"""

import json
import re
import sys
from pathlib import Path

from experiments.ladders import LADDERS
from experiments.run import RESULTS

DOCS = Path("docs/results.md")
MARKERS = re.compile(r"(<!-- (table|domains) (\w+) ([\w.,]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(ladder: str) -> list[dict]:
    """The lines of a ladder's cells; none if it was not run."""
    path = RESULTS / f"{ladder}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ({min(values):.4f} to {max(values):.4f})"


def by_way(ladder: str) -> dict[str, dict[int, dict]]:
    """Way -> seed -> its line."""
    cells: dict[str, dict[int, dict]] = {}
    for line in results(ladder):
        cells.setdefault(line["way"], {})[line["seed"]] = line
    return cells


def ordered(ladder: str, ways: list[str]) -> tuple[list[str], list[str]]:
    """Of these ways, those that were run, by their loss at the end, and what to say of the others."""
    cells = by_way(ladder)
    means = {way: sum(v["loss"] for v in cells[way].values()) / len(cells[way]) for way in cells.keys() & ways}
    order = sorted(means, key=lambda way: (means[way], way))
    missing = [way for way in ways if way not in cells]
    return order, ["", f"Not run: {', '.join(missing)}."] if missing else []


def row(way: str, cells: dict[int, dict], rival: str, rivals: dict[int, dict]) -> str:
    """One line of a table.  cells, rivals: seed -> line of results, of this way and of the one it is compared with."""
    gaps = [cells[seed]["loss"] - rivals[seed]["loss"] for seed in cells if seed in rivals]
    against = f"{sum(gaps) / len(gaps):+.4f} ({rival})" if gaps and way != rival else ""
    values = list(cells.values())
    spent, steps = sum(v["spent_source_tokens"] for v in values) / len(values), values[0]["steps"]
    return (f"| {way} | {len(values)} | {values[0]['params'] / 1e6:.2f} | {spent:,.0f} | {steps} | "
            f"{spread([v['first_loss'] for v in values])} | {spread([v['loss'] for v in values])} | {against} |")


def table(ladder: str, ways: list[str]) -> str:
    """Ways of a ladder in Markdown, by their loss at the end."""
    cells, rival = by_way(ladder), {name: way.rival for name, way in LADDERS[ladder].ways.items()}
    order, rest = ordered(ladder, ways)
    lines = ["| way | seeds | M parameters | source tokens | steps after | loss after the cut | loss at the end "
             "| against its rival |", "|---" * 8 + "|"]
    lines += [row(way, cells[way], rival[way], cells.get(rival[way], {})) for way in order]
    return "\n".join(lines + rest) + "\n"


def domains(ladder: str, ways: list[str]) -> str:
    """The losses at the end by domain, means over seeds."""
    cells, (order, rest) = by_way(ladder), ordered(ladder, ways)
    names = sorted({domain for way in order for line in cells[way].values() for domain in line["domains"]})
    lines = ["| way | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for way in order:
        lines.append(f"| {way} | " + " | ".join(
            f"{sum(v['domains'][name] for v in cells[way].values()) / len(cells[way]):.4f}" for name in names) + " |")
    return "\n".join(lines + rest) + "\n"


def filled(text: str) -> str:
    """A document with what stands between its markers made anew."""
    kinds = {"table": table, "domains": domains}
    return MARKERS.sub(lambda m: m[1] + kinds[m[2]](m[3], m[4].split(",")) + m[5], text)


def main() -> None:
    if sys.argv[1:] not in ([], ["--print"]):
        sys.exit(f"tables.py: unknown argument {sys.argv[1]}; there is only --print")
    if sys.argv[1:]:
        return print("".join(m[0] + "\n\n" for m in MARKERS.finditer(filled(DOCS.read_text(encoding="utf-8")))))
    DOCS.write_text(filled(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {DOCS}")


if __name__ == "__main__":
    main()
