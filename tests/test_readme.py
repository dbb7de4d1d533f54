"""What the README tells a reader to type exists and works."""

import ast
import os
import re
import shlex
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
from tools import bench, evaluate, finetune, gguf_to_hf, importance, plot, reference_loss, sample, scaling, shapes

README = Path("README.md").read_text(encoding="utf-8")
DOCS = README + "".join(p.read_text(encoding="utf-8") for p in sorted(Path("docs").glob("*.md")))
SETTINGS = {"prune.py": prune.PruneSettings, "pretrain.py": pretrain.PretrainSettings, "compact.py": compact.CompactSettings,
            "convert.py": convert.ConvertSettings, "prepare.py": prepare.PrepareSettings,
            "-m tools.gguf_to_hf": gguf_to_hf.GgufSettings, "-m tools.importance": importance.ImportanceSettings,
            "-m tools.sample": sample.SampleSettings, "-m tools.reference_loss": reference_loss.ReferenceSettings,
            "-m tools.bench": bench.BenchSettings, "-m tools.scaling": scaling.ScalingSettings,
            "-m tools.plot": plot.PlotSettings, "-m tools.shapes": shapes.ShapeSettings,
            "-m tools.evaluate": evaluate.EvaluateSettings, "-m tools.finetune": finetune.FinetuneSettings}
COMMANDS = [c for c in re.findall(r"(?:python|torchrun [^\n`]*?) ?((?:-m tools\.\w+|\w+\.py) [^\n`]*)",
                                  DOCS.replace("\\\n", " ")) if not c.startswith("-m tools.demo")]


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


def shell(script: str, folder: Path, path: Path | str) -> subprocess.CompletedProcess:
    """`bash configs/NAME.sh ...` in a folder, with `python` and `torchrun` of this path."""
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "2"}
    name, *arguments = script.split()
    return subprocess.run(["bash", Path("configs", name).resolve(), *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True)


def test_the_recipe_runs_its_stages_in_order_and_each_one_once(tmp_path):
    """With programs that only make the folder a stage would make, and fail where they are told to."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!{sys.executable}\n" + """import pathlib, sys
arguments = " ".join(sys.argv[1:])
with open("log", "a") as log:
    log.write(arguments + "\\n")
if pathlib.Path("stop").exists() and "prune.py" in arguments:
    sys.exit(75)
for words, folder in (("--from_hf", "models/llama2-7b"), ("prune.py configs", "out/7b_to_1.3b/step_0003200"),
                      ("compact.py", "out/1.3b_compact"), ("pretrain.py", "out/pretrain_1.3b/step_0048000"),
                      ("--to_hf", "export/1.3b")):
    if words in arguments:
        pathlib.Path(folder).mkdir(parents=True)
        (pathlib.Path(folder) / "model.safetensors").touch()
""")
        program.chmod(0o755)
    (tmp_path / "stop").touch()
    first = shell("7b_to_1.3b.sh", tmp_path, tmp_path / "bin")
    assert first.returncode == 75 and not (tmp_path / "out").exists()  # it stops where a stage was stopped
    (tmp_path / "stop").unlink()
    second = shell("7b_to_1.3b.sh", tmp_path, tmp_path / "bin")
    assert second.returncode == 0, second.stderr
    runs = (tmp_path / "log").read_text().splitlines()
    stages = [re.search(r"(\w+)\.py", run)[1] for run in runs]
    assert stages == ["prepare", "convert", "prune", "prepare", "prune", "compact", "pretrain", "convert"]
    assert all("--resume" in run for run, stage in zip(runs, stages) if stage in ("prune", "pretrain"))
    shell("7b_to_1.3b.sh", tmp_path, tmp_path / "bin")
    assert len((tmp_path / "log").read_text().splitlines()) == len(runs) + 1  # prepare.py finds by itself that it is done
    for run in runs:  # the flags are those of the stages
        words = shlex.split(run)
        at = next(i for i, word in enumerate(words) if word.endswith(".py") and "/" not in word)
        parse_args(SETTINGS[words[at]], words[at + 1:])


@pytest.mark.parametrize("stage", SETTINGS)
def test_help(stage):
    result = subprocess.run([sys.executable, *stage.split(), "--help"], capture_output=True, text=True, check=True)
    for name in SETTINGS[stage].__dataclass_fields__:
        assert f"--{name}=" in result.stdout


def test_what_is_started_exists():
    """Each make target, each script of bash, each module and each file that Python is to run."""
    makefile = Path("Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make (\w+)", DOCS, flags=re.M))
    assert {"demo", "test", "gpu"} <= targets <= set(re.findall(r"^(\w+):", makefile, flags=re.M))
    scripts = {*re.findall(r"bash (\S+\.sh)", DOCS),
               *re.findall(r"(?:python3?|torchrun)(?: --?[\w=.:-]+)* (\S+\.py)", DOCS)}
    modules = re.findall(r"-m (tools\.\w+)", DOCS)
    listed = re.search(r"python -m tools\.demo, ([\w, ]+), \.\.\.", README)[1].split(", ")
    assert {"configs/smollm2.sh", "prune.py"} <= scripts and len(modules) > 9 and "plot" in listed
    for path in [*scripts, *(m.replace(".", "/") + ".py" for m in modules), *(f"tools/{name}.py" for name in listed)]:
        assert Path(path).is_file(), path


def test_the_small_real_model_runs_its_stages_and_goes_on_where_it_was(tmp_path):
    """With a `python` that only makes the folder a stage would make; the training is interrupted once."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "python"
    program.write_text(f"#!{sys.executable}\n" + """import pathlib, sys
words = sys.argv[1:]
if words[0] == "-c":
    sys.exit(print("package"))
with open("log", "a") as log:
    log.write(repr(words) + "\\n")
if pathlib.Path("stop").exists() and words[0] == "pretrain.py":
    sys.exit(75)
out = next((w.partition("=")[2] for w in words if w.startswith("--out_dir=")), words[3] if "gather" in words else "")
steps = next((int(w.partition("=")[2]) for w in words if w.startswith("--max_steps=")), 0)
if out:
    folder = f"/step_{steps:07d}" if words[0] == "pretrain.py" or "tools.importance" in words else ""
    pathlib.Path(out + folder).mkdir(parents=True, exist_ok=True)
""")
    program.chmod(0o755)

    def runs() -> list[list[str]]:
        return [ast.literal_eval(line) for line in (tmp_path / "log").read_text().splitlines()]

    (tmp_path / "stop").touch()
    assert shell("smollm2.sh", tmp_path, tmp_path / "bin").returncode == 75
    begun = len(runs())
    (tmp_path / "stop").unlink()
    done = shell("smollm2.sh", tmp_path, tmp_path / "bin")
    assert done.returncode == 0, done.stderr
    names = [words[1] if words[0] == "-m" else words[0] for words in runs()]
    assert names[:begun] == ["tools.demo", "tools.gguf_to_hf", "convert.py", "prepare.py", "tools.importance", "compact.py",
                             "pretrain.py"]
    assert names[begun:] == ["prepare.py", "pretrain.py", "convert.py", *3 * ["tools.sample"]]
    assert "--resume" in runs()[begun + 1]
    for first, *rest in runs():
        name, arguments = (first, rest) if first != "-m" else (f"-m {rest[0]}", rest[1:])
        if name != "-m tools.demo":
            parse_args(SETTINGS[name], arguments)
    wrong = shell("smollm2.sh gpu", tmp_path, tmp_path / "bin")
    assert wrong.returncode == 2 and wrong.stderr == "smollm2.sh: unknown argument gpu; there is only full\n"
