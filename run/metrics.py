"""The metrics of a run: metrics.jsonl, TensorBoard or W&B beside it, the progress bar, and a line for people."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from run.processes import Processes, RunState, lr_factor
from run.settings import TrainSettings, UserError

# Peak dense bf16 operations a second, by a part of the device's name (vendors' data sheets)
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A10G": 70e12,
              "L40S": 362e12, "L4": 121e12, "V100": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12}

OF_TOKENS = "loss", "loss/ce", "loss/kl"  # each rank has those of its own tokens


def peak_flops(processes: Processes) -> float | None:
    """Peak operations a second of all devices of the run, None for a device that PEAK_FLOPS does not know."""
    if processes.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(processes.device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    return None if peak is None else peak * processes.world


def replace(new: Path, old: Path) -> None:
    """Give a file the name of another, which after a crash is the one or the other."""
    with new.open() as file:
        os.fsync(file.fileno())
    os.replace(new, old)


class Metrics:
    """metrics.jsonl of a run, TensorBoard or W&B beside it, and the progress bar.  Only rank 0 writes.

    A line holds "step", the number of optimizer steps done, so a run that resumes at step s cuts the lines past s.
    Between lines everything is added up on the device: one sync a line.  A checkpoint between two lines holds the sums.
    """

    def __init__(self, settings: TrainSettings, processes: Processes, state: RunState, *, flops_per_token: float):
        self.settings, self.processes, self.state, self.flops_per_token = settings, processes, state, flops_per_token
        held = dict(state.unlogged)
        self.steps = int(held.pop("steps", 0))  # since the last line
        self.seconds, self.started = held.pop("seconds", 0.0), None
        self.in_row = torch.tensor(held.pop("in_row", 0.0), device=processes.device)  # skipped steps up to now
        self.sums = {name: torch.tensor(value, device=processes.device) for name, value in held.items()}
        self.stop: UserError | None = None  # the reason, after too many skipped steps
        self.bar = tqdm(total=settings.max_steps, initial=state.step, disable=True if processes.rank else None)
        self.file = self.board = None
        if processes.rank == 0:
            self.open()

    def open(self) -> None:
        path = Path(self.settings.out_dir) / "metrics.jsonl"
        step, logger = self.state.step, self.settings.logger
        try:
            old = path.read_text().splitlines(keepends=True) if path.exists() and step else []
            cut = path.with_suffix(".tmp")
            cut.write_text("".join(x for x in old if x.endswith("\n") and json.loads(x)["step"] <= step))
            replace(cut, path)
            config = path.with_name("config.json")
            config.with_suffix(".tmp").write_text(json.dumps(dataclasses.asdict(self.settings), indent=2) + "\n")
            replace(config.with_suffix(".tmp"), config)
            self.file = path.open("a", buffering=1)  # by line
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} has a line that is not ours; move the file away") from None
        if logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.settings.out_dir, purge_step=step + 1)
        elif logger == "wandb":
            import wandb

            self.board = wandb.init(project="nanoshear", name=Path(self.settings.out_dir).name,
                                    dir=self.settings.out_dir, config=dataclasses.asdict(self.settings))

    def start_clock(self) -> None:
        """Time counts from here to the next line: called before each step's work, evaluation and saving left out."""
        if self.started is None:
            self.started = time.perf_counter()

    def stop_clock(self) -> None:
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def add(self, found: dict[str, Tensor]) -> None:
        """What a step found, 0-d tensors on the device: the next line reports the mean over steps."""
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.in_row = (self.in_row + found["skipped"]) * found["skipped"]
        self.steps += 1

    def hold(self) -> None:
        """Put what no line holds yet into the state that is about to be saved, and the lines onto the disk."""
        if self.file is not None:
            os.fsync(self.file.fileno())
        self.state.unlogged = {"in_row": float(self.in_row)} if self.in_row else {}
        if self.steps:
            self.state.unlogged |= {name: float(v) for name, v in (self.sums | self.over_ranks(self.sums)).items()}
            self.state.unlogged |= {"steps": self.steps, "seconds": self.seconds}

    def over_ranks(self, values: dict[str, float | Tensor]) -> dict[str, Tensor]:
        """Of what each rank has its own value: the means."""
        names = [name for name in OF_TOKENS if name in values]
        means = self.processes.sum(torch.stack([values[name] for name in names])) / self.processes.world
        return dict(zip(names, means))

    def log(self, values: dict[str, float | Tensor]) -> None:
        """One line of training: means since the last one, and `values`.  Sets `stop` after too many skipped steps."""
        cfg, processes = self.settings, self.processes
        values = {name: value / self.steps for name, value in self.sums.items()} | values
        values |= self.over_ranks(values)
        values |= {"in_row": self.in_row, "skipped": values["skipped"] * self.steps}
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        numbers = torch.stack([v.float().to(processes.device) for v in tensors.values()]).tolist()  # the one sync
        self.stop_clock()
        values |= dict(zip(tensors, numbers))
        in_row = int(values.pop("in_row"))
        self.state.skipped += int(values["skipped"])
        rate = self.steps * cfg.global_batch_size * cfg.seq_len / self.seconds
        peak = peak_flops(processes)
        self.write(values | {"lr_factor": lr_factor(self.state.step - 1, cfg), "tokens_per_second": rate,
                             "mfu": None if peak is None else rate * self.flops_per_token / peak,
                             "skipped": self.state.skipped})
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update(self.state.step - self.bar.n)
        self.sums, self.steps, self.seconds = {}, 0, 0.0
        if in_row >= cfg.max_skipped:
            self.stop = UserError(f"the gradient was not finite in {in_row} steps in a row, up to step {self.state.step}; "
                                  f"{cfg.out_dir} holds the weights as they were before those: look for the cause in the "
                                  "data, or --resume with a lower learning_rate")

    def evaluation(self, losses: dict[str, float | None], bits_per_byte: dict[str, float],
                   values: dict[str, float | Tensor] | None = None) -> None:
        """One line of an evaluation, and the same for people, with the sparsities and their targets among `values`.

        losses: nats a token; times bits_per_byte, by domain, they are bits a byte of text, which tokenizers share.
        """
        state, known = self.state, [v for v in losses.values() if v is not None]
        sparse = {name.removeprefix("target_sparsity/"): float(v) for name, v in (values or {}).items()
                  if name.startswith("target_sparsity/")}
        shown = ", ".join(f"{name} {float(values[f'sparsity/{name}']):.3f} of {v:.3f}" for name, v in sparse.items())
        bits = {d: v * bits_per_byte[d] for d, v in losses.items() if v is not None and d in bits_per_byte}
        values = {f"eval_loss/{d}": v for d, v in losses.items()}
        values |= {f"eval_bits_per_byte/{d}": bits.get(d) for d in losses}
        values |= {f"domain_weight/{d}": w for d, w in state.domain_weights.items()}
        self.write(values | {"eval_loss": sum(known) / len(known) if known else None})
        self.processes.say(f"step {state.step}, nats a token, bits a byte, weight: " + ", ".join(
            f"{d} {'n/a' if v is None else f'{v:.4f}'} {f'{bits[d]:.3f}' if d in bits else 'n/a'} "
            f"{state.domain_weights[d]:.3f}" for d, v in losses.items())
            + f".  Expected sparsity and its target: {shown}" * bool(shown))

    def write(self, values: dict[str, float | None]) -> None:
        """One line: the step and flat names with their values; None, as for any that is not finite, where there is none."""
        if self.file is None:
            return
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        try:
            self.file.write(json.dumps({"step": self.state.step} | values) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.file.name}: {error.strerror}; then go on with --resume") from None
        numbers = {name: value for name, value in values.items() if value is not None}
        if self.settings.logger == "tensorboard":
            for name, value in numbers.items():
                self.board.add_scalar(name, value, self.state.step)
        elif self.settings.logger == "wandb":
            self.board.log(numbers, step=self.state.step)

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.finish() if self.settings.logger == "wandb" else self.board.close()
