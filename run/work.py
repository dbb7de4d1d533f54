"""What a folder of tokens was begun with, so that prepare.py goes on with the same, and the model that they are for."""

import json
import math
import os
import shutil
from pathlib import Path

from run.documents import Source
from run.settings import check, read_json
from run.tokenizer import Tokenizer


def write_json(path: Path, value: dict) -> None:
    """Atomically: a reader sees the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def check_same_work(given: Tokenizer | None, cfg, sources: list[Source]) -> dict:
    """out_dir is new, or begun with the same settings and tokenizer, and each of its domains with the same files, or without
    a token yet.  cfg: PrepareSettings.  Returns the record of it, {"settings": ..., "sources": {name: ...}}, and writes it.
    Raises UserError.
    """
    out_dir, path = Path(cfg.out_dir), Path(cfg.out_dir) / f"prepare{cfg.suffix()}.json"
    fixed = ("tokenizer", "train_tokenizer", "train_mb", "eval_fraction", "prune_fraction")
    settings = {name: getattr(cfg, name) for name in fixed} | {"fingerprint": given.fingerprint if given else ""}
    work = read_json(path) if path.exists() else {"settings": settings, "sources": {}}
    check(isinstance(work, dict) and isinstance(work.get("sources"), dict), f"{path} is no record of this version of "
          f"prepare.py; choose another out_dir than {out_dir}, or remove it to start anew")
    if given and work["settings"].get("fingerprint") == given.fingerprint:
        work["settings"]["tokenizer"] = cfg.tokenizer  # it may have moved
    if odd := differences(work["settings"], settings):
        fresh = not any(p.stat().st_size for p in out_dir.glob("*/*.bin*")) and list(out_dir.glob("prepare*.json")) == [path]
        check(fresh, f"out_dir = {out_dir} was begun with other settings: {odd}; choose another, or remove it")
        if not Path(cfg.tokenizer).resolve().is_relative_to((out_dir / "tokenizer").resolve()):
            shutil.rmtree(out_dir / "tokenizer", ignore_errors=True)
        work = {"settings": settings, "sources": {}}
    for source in sources:
        names = {"text_field": source.text_field, "domain_field": source.domain_field, "domains": source.domains}
        if source.name and isinstance(source.text_field, dict):
            names["text_field"] = source.text_field.get(source.name, "text")
        begun = {"given": names | {f"file {file.name}": file.size for file in source.files}}  # bytes
        old = work["sources"].setdefault(source.name, begun)
        if odd := differences(old["given"], begun["given"]):
            folder = out_dir / (source.name or "*")
            check(not any(p.stat().st_size for p in out_dir.glob(f"{folder.name}/*.bin*")), f"{folder} was begun with other "
                  f"settings or files: {odd}; choose another out_dir, or remove it to do it anew")
            work["sources"][source.name] = begun
        other = work["sources"].get("", {}).get("done", ())
        check(source.name not in other, f"domain {source.name} of {out_dir} came from records; choose another out_dir")
        for domain in (source.domains or {}).values():
            check_new(domain, work, out_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, work)
    return work


def check_new(domain: str, work: dict, out_dir: Path) -> None:
    """Raises UserError if a domain that records name came from a folder before."""
    check(domain not in work["sources"], f"domain {domain}, which records name, came from a folder before; choose another "
          f"out_dir than {out_dir}, or another name with --domains")


def differences(old: dict, new: dict) -> str:
    odd = [f"{n} (was {old.get(n)!r}, is {new.get(n)!r})" for n in {**new, **old} if new.get(n) != old.get(n)]
    return ", ".join(odd[:3]) + ", ..." * (len(odd) > 3)


def model_vocabulary(model_dir: str) -> float:
    """How many tokens a model folder's config knows; infinite without one.  Raises UserError."""
    if not model_dir:
        return math.inf
    paths = [path for name in ("model_config.json", "config.json") if (path := Path(model_dir) / name).is_file()]
    check(bool(paths), f"model_dir = {model_dir} has neither model_config.json nor config.json")
    config = read_json(paths[0])
    size = config.get("vocab_size") if isinstance(config, dict) else None
    check(isinstance(size, int) and size > 0, f"{paths[0]} has no vocab_size")
    return size
