"""What a run will take: data, disk, memory, operations, hours.  The stages hand in the model and the masks they train.

    python prune.py configs/7b_to_1.3b.py --plan=8          # of a run on 8 GPUs; needs no GPU, and of the source its config

`preflight` says before every run what its data and checkpoints come to, and refuses one that cannot end.  `report`, behind
--plan, adds memory and hours, by cost.py's count of the real training step.
"""

import math
import shutil
import typing
from pathlib import Path

from run.cost import (DISK, FITS, LINKS, MACHINES, PRODUCTS, TRAFFIC, Parts, candidates, evaluations, is_compiled,
                      operations, per_device, run_seconds)
from run.metrics import PEAK_FLOPS
from run.processes import Processes, RunState
from run.settings import TrainSettings, UserError, by_domain, check, user_errors
from run.weights import all_checkpoints, let_go, step_of

CHECKPOINTING = typing.get_args(TrainSettings.__annotations__["checkpointing"])
GB = 1e9


def report(cfg: TrainSettings, shape, sets: dict, parts: Parts) -> str:
    """What --plan prints: a run of these settings on cfg.plan devices.  Raises UserError if the batch does not divide."""
    devices, accum = cfg.plan, cfg.global_batch_size / (cfg.micro_batch_size * cfg.plan)
    check(accum == int(accum), f"global_batch_size = {cfg.global_batch_size} does not divide by micro_batch_size x plan = "
          f"{cfg.micro_batch_size} x {devices}")
    tokens, domains = cfg.global_batch_size * cfg.seq_len, n_domains(cfg)
    flops = operations(shape, sets, cfg, parts)
    n, sequences = evaluations(cfg)
    beside = [f"; teacher {parts.teacher.n_params():,}"] if parts.teacher else []
    beside += [f"; masks {n} {s}" for n, (s, _) in sets.items()]
    lines = [f"parameters           {shape.n_params():,}{''.join(beside)}",
             f"tokens a step        {tokens:,} = {devices} devices x {int(accum)} micro-steps x {cfg.micro_batch_size} "
             f"sequences x {cfg.seq_len}",
             f"tokens in all        {tokens * cfg.max_steps:,} in {cfg.max_steps:,} steps, {flops:.3g} operations "
             f"a token; forward only {domains * sequences * cfg.seq_len:,} in {n} evaluations of {domains} domains",
             f"GB on each device    {''.join(f'{kind:>12}' for kind in CHECKPOINTING)}   (checkpointing, here "
             f"{cfg.checkpointing}; {cfg.parallel}; without the device's context and what its allocator loses)"]
    found = {kind: per_device(shape, sets, cfg, parts, devices, checkpointing=kind) for kind in CHECKPOINTING}
    names = list(found[cfg.checkpointing][0])
    lines += [f"  {name:<19}" + "".join(f"{bytes_of[name] / GB:>12.2f}" for bytes_of, _ in found.values()) for name in names]
    lines.insert(3, f"settled              {resolved(cfg)}")
    lines += hours(cfg, shape, sets, parts, found[cfg.checkpointing][1], domains, flops)
    n, size = checkpoints(cfg, 0, []), checkpoint_bytes(shape, sets, parts.frozen)
    lines += [f"disk                 {amount(n * size)}: checkpoints of {amount(size)}, at most {n} at once"]
    return "\n".join(lines)


def hours(cfg: TrainSettings, shape, sets: dict, parts: Parts, cost, domains: int, flops: float) -> list[str]:
    """The lines of time: of these settings on each GPU by what takes it, and the fastest settings that fit there."""
    devices, size = cfg.plan, checkpoint_bytes(shape, sets, parts.frozen)
    tokens = cfg.max_steps * cfg.global_batch_size * cfg.seq_len / devices

    def seconds(settings: TrainSettings, step, gpu: str) -> dict[str, float]:
        return run_seconds(shape, settings, step, devices, gpu, domains=domains, checkpoint_bytes=size, parts=parts)

    def row(name: str, cells: list[str]) -> str:
        return f"  {name:<19}" + "".join(f"{cell:>18}" for cell in cells)

    here = [seconds(cfg, cost, gpu) for gpu in MACHINES]
    lines = [row(f"hours on {devices} x", list(MACHINES))[2:]
             + f"     ({'compiled; ' * is_compiled(cfg)}on paper: products at {PRODUCTS:.0%} of the peak, memory at "
             f"{TRAFFIC:.0%}, links at {LINKS:.0%}, disk {DISK / GB:.0f} GB/s)"]
    lines += [row(name, [f"{each[name] / 3600:.2f}" for each in here]) for name in here[0]]
    rates = [tokens / (each["in all"] - each["evaluations"] - each["checkpoints"]) for each in here]
    lines.append(row("tokens/s a device", [f"{rate:,.0f} ({rate * flops / PEAK_FLOPS[gpu]:.0%} MFU)"
                                           for rate, gpu in zip(rates, MACHINES)]))
    kinds = CHECKPOINTING[1:] if is_compiled(cfg) else CHECKPOINTING  # compiled, none is what selective is
    tried, best = list(candidates(shape, sets, cfg, parts, devices, kinds)), []
    for gpu, machine in MACHINES.items():
        fit = [(seconds(each, step, gpu)["in all"], each) for each, peak, step in tried if peak <= FITS * machine.memory]
        best.append(min(fit, key=lambda pair: pair[0], default=(math.nan, None)))
    lines.append(row("fastest that fits", [f"{each.micro_batch_size}, {each.checkpointing}" if each else "nothing"
                                           for _, each in best]))
    lines.append(row("  its hours", [f"{total / 3600:.2f}" for total, _ in best]))
    return lines


def n_domains(cfg: TrainSettings) -> int:
    """As many as the settings or data_dir tell, 1 if nothing does."""
    for name in ("domain_weights", "reference_loss"):
        value = getattr(cfg, name)
        if value != "" and (isinstance(value, dict) or Path(value).exists()):
            return len(by_domain(name, value))
    return max(1, len(in_data_dir(cfg)))


def in_data_dir(cfg: TrainSettings) -> set[str]:
    """The domains that data_dir has of the split to train on."""
    return {path.parent.name for path in Path(cfg.data_dir).glob(f"*/{cfg.split}*.json")}


def checkpoint_bytes(shape, sets: dict, frozen: bool = False) -> int:
    """Of one checkpoint: weights and, unless they are frozen, both of AdamW's moments in fp32, of the masks too; what is
    small left out.
    """
    return (4 if frozen else 12) * shape.n_params() + 12 * sum(math.prod(s) for s, _ in sets.values())


def checkpoints(cfg: TrainSettings, first: int, there: list[int]) -> int:
    """The most checkpoints on the disk at once in a run from step `first`, those of the steps `there` counted too."""
    kept, most = list(there), len(there)
    steps = range((first // cfg.save_interval + 1) * cfg.save_interval, cfg.max_steps, cfg.save_interval)
    for step in [*steps, *[cfg.max_steps] * (first < cfg.max_steps)]:
        kept.append(step)
        most = max(most, len(kept))  # an old one goes when a new one is there
        gone = let_go(kept, cfg.keep_last, cfg.keep_every)
        kept = [s for s in kept if s not in gone]
    return most


def resolved(cfg: TrainSettings) -> str:
    """The settings that follow from others where they are not given."""
    names = ", ".join(f"{name} = {getattr(cfg, name):,}" for name in (*cfg.shares, "micro_batch_size"))
    return f"of {cfg.max_steps:,} steps of {cfg.global_batch_size:,} sequences: {names}"


def amount(n: float) -> str:
    """Bytes for people."""
    return f"{n / GB:,.1f} GB" if n >= GB else f"{n / 1e6:.1f} MB"


def preflight(cfg: TrainSettings, processes: Processes, shape, sets: dict, parts: Parts, data,
              state: RunState) -> float:
    """Before the first step: say what the run comes to.  For rank 0.  Raises UserError if it could not end.

    Returns the operations of a token.
    """
    sequences, flops = (cfg.max_steps - state.step) * cfg.global_batch_size, operations(shape, sets, cfg, parts)
    left_out = sorted(in_data_dir(cfg) - set(data.domains))
    if left_out:
        processes.say(f"note: domain_weights leaves out what {cfg.data_dir} has too: {', '.join(left_out)}")
    few = [f"{s.domain} {s.n_windows:,}" for s in data.eval if s.n_windows < cfg.eval_sequences]
    if few:
        processes.say(f"note: fewer held-out sequences than eval_sequences = {cfg.eval_sequences:,}: {', '.join(few)}")
    processes.say(data.budget_table(state.domain_weights, state.cursors, sequences))
    for s in data.train:
        epochs = (state.cursors[s.domain] + state.domain_weights[s.domain] * sequences) / s.n_windows
        if epochs > 1:
            moving = cfg.update == "doremi"  # the weights may yet leave enough of it: the run itself watches
            share = state.domain_weights[s.domain]
            found = f"domain {s.domain} has tokens for 1 of {epochs:.2f} epochs at its weight of {share:.4f}"
            check(cfg.on_exhausted == "wrap" or moving, f"{found}, and on_exhausted = error; prepare more of it, lower its "
                  "weight or max_steps, or take --on_exhausted=wrap")
            processes.say(f"note: {found}")
    if cfg.verify_data:
        processes.say("comparing the token files with their checksums")
        with user_errors():
            data.verify()
    processes.say(resolved(cfg))
    there = [step_of(path) for path in all_checkpoints(cfg.out_dir)]
    n, size = checkpoints(cfg, state.step, there) - len(there), checkpoint_bytes(shape, sets, parts.frozen)  # more, at most
    try:
        free = shutil.disk_usage(cfg.out_dir).free
    except OSError as error:
        raise UserError(f"cannot tell how much room {cfg.out_dir} has: {error.strerror}") from None
    check(free >= min(n, 1) * size, f"{Path(cfg.out_dir).resolve()} has {amount(free)} free, and a checkpoint takes "
          f"{amount(size)}; make room, or choose another out_dir")
    if free < n * size:
        processes.say(f"warning: {n} more checkpoints of {amount(size)} will not fit into the {amount(free)} free: make "
                      "room, save less often (save_interval), or let old ones go (keep_last)")
    tokens = cfg.global_batch_size * cfg.seq_len
    processes.say(f"steps {state.step:,} to {cfg.max_steps:,} of {tokens:,} tokens on {processes.world} x "
                  f"{processes.device.type} ({cfg.parallel if processes.world > 1 else 'alone'}, "
                  f"{str(processes.dtype).removeprefix('torch.')}): {sequences * cfg.seq_len:,} tokens, "
                  f"{flops * sequences * cfg.seq_len:.2g} operations, "
                  f"{n} more checkpoints of {amount(size)}, {amount(free)} free")
    return flops
