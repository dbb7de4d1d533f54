"""What the README tells a reader to type exists and works."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compact
import convert
import prepare
import pretrain
import prune
from run.settings import parse_args
from tools import bench, gguf_to_hf, importance, plot, reference_loss, sample, scaling, shapes

README = Path("README.md").read_text(encoding="utf-8")
DOCS = README + "".join(p.read_text(encoding="utf-8") for p in sorted(Path("docs").glob("*.md")))
SETTINGS = {"prune.py": prune.PruneSettings, "pretrain.py": pretrain.PretrainSettings, "compact.py": compact.CompactSettings,
            "convert.py": convert.ConvertSettings, "prepare.py": prepare.PrepareSettings,
            "-m tools.gguf_to_hf": gguf_to_hf.GgufSettings, "-m tools.importance": importance.ImportanceSettings,
            "-m tools.sample": sample.SampleSettings, "-m tools.reference_loss": reference_loss.ReferenceSettings,
            "-m tools.bench": bench.BenchSettings, "-m tools.scaling": scaling.ScalingSettings,
            "-m tools.plot": plot.PlotSettings, "-m tools.shapes": shapes.ShapeSettings}
COMMANDS = [c for c in re.findall(r"(?:python|torchrun [^\n`]*?) ?((?:-m tools\.\w+|\w+\.py) [^\n`]*)",
                                  DOCS.replace("\\\n", " ")) if not c.startswith("-m tools.demo")]
CPU_COMMANDS = next(block for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S) if "SMOLLM2" in block)


def command_of(line: str) -> tuple[str, list[str]]:
    """The stage or tool that a command runs, as SETTINGS names it, and its arguments."""
    first, *rest = shlex.split(line)
    return (first, rest) if first != "-m" else (f"-m {rest[0]}", rest[1:])


def test_there_are_commands_of_every_stage():
    assert {command_of(c)[0] for c in COMMANDS} >= SETTINGS.keys()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--help" not in c and "--verify`" not in c])
def test_command_is_accepted(command):
    stage, arguments = command_of(command)
    parse_args(SETTINGS[stage], arguments)


def test_every_setting_and_file_named_exists():
    names = {f for cls in SETTINGS.values() for f in cls.__dataclass_fields__}
    named = {n.replace("-", "_") for n in re.findall(r"`--([a-z_]+)[`= ]", DOCS)} - {"help"}
    assert named <= names
    for path in re.findall(r"`((?:configs/|tests/|tools/|run/)?\w+\.py)`", DOCS):
        assert Path(path).is_file(), path


@pytest.mark.slow
def test_cpu_commands_run(tmp_path):
    """The block about SmolLM2, typed in a copy of the repository: the masks move as asked, the export is checked there."""
    for path in (*Path(".").glob("*.py"), *map(Path, ("configs", "run", "tools"))):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-euc", CPU_COMMANDS], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/smollm2/prune/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 20
    for name in ("hidden", "layer", "intermediate", "kv_head"):
        sparsity = [line[f"sparsity/{name}"] for line in steps]
        assert sparsity[-1] > sparsity[9] > sparsity[0]  # it climbs with its target
    config = json.loads((tmp_path / "out/smollm2/export/config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"],
            config["intermediate_size"]) == (384, 26, 6, 2, 1024)


@pytest.mark.parametrize("stage", SETTINGS)
def test_help(stage):
    result = subprocess.run([sys.executable, *stage.split(), "--help"], capture_output=True, text=True, check=True)
    for name in SETTINGS[stage].__dataclass_fields__:
        assert f"--{name}=" in result.stdout


def test_make_targets_exist():
    makefile = Path("Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M)
