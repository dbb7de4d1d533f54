"""Settings: where a value comes from, what is refused and in which words, and that they are all explained."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import module_of, pretrain_settings, prune_settings

import pretrain
from pretrain import PretrainSettings
from prune import PruneSettings
from run.metrics import Metrics
from run.processes import Processes, RunState
from run.settings import UserError, parse_args, setting_docs

NEEDED = ["--data_dir=data", "--out_dir=out", "--init_from=source"]
STAGES = {"prepare": "PrepareSettings", "convert": "ConvertSettings", "prune": "PruneSettings", "compact": "CompactSettings",
          "pretrain": "PretrainSettings", "sample": "SampleSettings"}


def parse(*argv: str) -> PruneSettings:
    return parse_args(PruneSettings, [*NEEDED, *argv])


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(*argv)
    message = str(error.value)
    assert "\n" not in message
    return message


def config(tmp_path, text: str, name: str = "a.py") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_flags_come_before_files_and_later_files_before_earlier(tmp_path):
    a = config(tmp_path, "seed = 1\nlearning_rate = 0.1\nseq_len = 7\n", "a.py")
    b = config(tmp_path, "learning_rate = 0.2\nseq_len = 8\n", "b.py")
    cfg = parse(a, "--seq_len=9", b)  # wherever the flag stands
    assert (cfg.seed, cfg.learning_rate, cfg.seq_len, cfg.max_steps) == (1, 0.2, 9, 3200)
    assert parse(b, a, "--seq_len=9").learning_rate == 0.1
    assert parse("--seed=5", "--seed=6").seed == 6


def test_stages_have_defaults_of_their_own():
    prune, pre = parse(), parse_args(PretrainSettings, [*NEEDED, "--update=constant"])
    assert (prune.max_steps, prune.global_batch_size, prune.eval_interval) == (3200, 32, 50)
    assert (prune.split, pre.split) == ("prune", "train")
    assert (pre.max_steps, pre.global_batch_size, pre.eval_interval) == (48000, 256, 400)


def test_warm_ups_are_shares_of_the_steps_unless_given():
    def steps(*argv):
        cfg = parse(*argv)
        return cfg.warmup_steps, cfg.lagrangian_warmup_steps

    assert steps() == (320, 640) and steps("--max_steps=100") == (10, 20) and steps("--max_steps=1") == (0, 0)
    assert steps("--max_steps=100", "--warmup_steps=0") == (0, 20)
    assert steps("--max_steps=100", "--lagrangian_warmup_steps=100") == (10, 100)
    more = [*NEEDED, "--update=constant"]
    assert parse_args(PretrainSettings, more).warmup_steps == 1440  # as published, 3% of 48,000
    assert parse_args(PretrainSettings, [*more, "--max_steps=1000"]).warmup_steps == 30


@pytest.mark.parametrize("name, share", [("warmup_steps", "10%"), ("lagrangian_warmup_steps", "20%")])
def test_what_cannot_end_within_the_run_is_refused(name, share):
    assert refused("--max_steps=100", f"--{name}=101") == (
        f"{name} = 101 would not end within max_steps = 100; lower it, raise max_steps, or in a new run leave it out, "
        f"for {share} of max_steps")


def test_a_micro_batch_that_was_not_given_fits(monkeypatch):
    def micro(*argv):
        return parse_args(PretrainSettings, [*NEEDED, "--update=constant", *argv]).micro_batch_size

    assert parse().micro_batch_size == 4 and micro() == 16
    assert [micro(f"--global_batch_size={n}") for n in (8, 20, 34, 17, 1)] == [8, 10, 2, 1, 1]
    assert micro("--global_batch_size=32", "--plan=8") == 4
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert micro("--global_batch_size=32") == 2 and micro("--global_batch_size=32", "--micro_batch_size=1") == 1
    assert "leave micro_batch_size out" in refused("--global_batch_size=8", "--micro_batch_size=16")


def test_a_resumed_run_keeps_what_was_not_given(tmp_path):
    """Not what its own settings would lead to, once there is a checkpoint."""
    began = ["--max_steps=100", "--global_batch_size=6", f"--out_dir={tmp_path}"]
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(parse(*began))))
    longer = [*began, "--max_steps=300", "--resume"]

    def settled(*argv):
        cfg = parse(*longer, *argv)
        return cfg.warmup_steps, cfg.lagrangian_warmup_steps, cfg.micro_batch_size

    assert settled() == (30, 60, 3)
    (tmp_path / "step_0000050.tmp").mkdir()
    assert settled() == (30, 60, 3)
    (tmp_path / "step_0000050").mkdir()
    assert settled() == (10, 20, 3) and settled("--warmup_steps=7") == (7, 20, 3)
    assert settled("--global_batch_size=32") == (10, 20, 4)  # three do not fit
    (tmp_path / "config.json").write_text("[]")
    assert "config.json is not a JSON object" in refused(*longer)


def test_config_files_are_python(tmp_path):
    text = ("import math\n_steps = 20\nmax_steps = 2 * _steps\nlearning_rate = math.sqrt(4)\n"
            "domain_weights = {d: 0.5 for d in ('a', 'b')}\npruning_modules = ['hidden']\ntarget_hidden_size = 5\n")
    cfg = parse(config(tmp_path, text))
    assert (cfg.max_steps, cfg.learning_rate, cfg.domain_weights, cfg.pruning_modules) == (
        40, 2.0, {"a": 0.5, "b": 0.5}, ("hidden",))  # names with an underscore and modules are no settings


@pytest.mark.parametrize("text, said", [
    ("seed = 1 / 0", "ZeroDivisionError"), ("seed = ", "SyntaxError"), ("import sys; sys.exit(3)", "SystemExit"),
    ("import no_such_module", "ModuleNotFoundError"), ("raise SystemExit", "SystemExit"),
])
def test_config_files_that_do_not_run_are_refused(tmp_path, text, said):
    path = config(tmp_path, text)
    assert (message := refused(path)).startswith(f"config file {path}") and said in message


def test_a_config_file_must_exist(tmp_path):
    assert "nowhere.py does not exist" in refused(f"{tmp_path}/nowhere.py")


@pytest.mark.parametrize("flag, near", [("--learning_rat=1", "learning_rate"), ("--seqlen=4", "seq_len"),
                                        ("--target_heads=4", "target_n_heads"), ("-seed=4", "")])
def test_unknown_names_are_refused_with_the_nearest(flag, near):
    message = refused(flag)
    assert message.startswith(f"unknown setting {flag.removeprefix('--').split('=')[0]} ") and near in message


def test_unknown_names_in_files_name_the_file(tmp_path):
    path = config(tmp_path, "max_step = 3")
    assert refused(path) == f"unknown setting max_step in {path}; did you mean max_steps?"
    assert "--help" in refused("--qqqqqq=1")


@pytest.mark.parametrize("flag, kind", [
    ("--seed=abc", "int"), ("--seed=1.0", "int"), ("--seed=True", "int"), ("--seed=None", "int"), ("--seed=", "int"),
    ("--learning_rate=fast", "float"), ("--learning_rate=True", "float"), ("--learning_rate='1e-4'", "float"),
    ("--learning_rate=nan", "float"), ("--resume=1", "bool"), ("--resume=yes", "bool"), ("--resume=true", "bool"),
    ("--update=never", '"doremi" or "constant"'), ("--count=1", '"expected" or "rescaled"'),
    ("--target_n_heads=4.0", "int or None"), ("--pruning_modules=(1, 2)", "tuple of str or None"),
    ("--pruning_modules=hidden", "tuple of str or None"), ("--target_n_heads=[4]", "int or None"),
])
def test_wrong_types_are_refused(flag, kind):
    name, value = flag.removeprefix("--").split("=")
    message = refused(flag)
    assert message.startswith(f"{name} = ") and value.strip("'") in message and f"is not {kind}" in message


@pytest.mark.parametrize("text, kind", [
    ("seed = '3'", "int"), ("data_dir = 3", "str"), ("learning_rate = '3e-4'", "float"), ("resume = 1", "bool"),
    ("domain_weights = {'a': '1'}", "dict of str to float or str"), ("domain_weights = {1: 1.0}", "dict of str"),
    ("pruning_modules = 'hidden'", "tuple of str or None"), ("update = 1", '"doremi" or "constant"'),
    ("seed = None", "int"), ("def seed(): pass", "int"),
])
def test_wrong_types_in_files_are_refused(tmp_path, text, kind):
    path = config(tmp_path, text)
    message = refused(path)
    assert f"in {path} is not {kind}" in message


def test_int_becomes_float_and_nothing_else_is_converted():
    cfg = parse("--learning_rate=1", "--domain_weights={'a': 1}", "--data_dir=7", "--pruning_modules=['hidden', 'mlp']")
    assert type(cfg.learning_rate) is float and type(cfg.domain_weights["a"]) is float
    assert cfg.data_dir == "7" and cfg.pruning_modules == ("hidden", "mlp")  # a flag's text is a string where one may be
    assert parse("--resume").resume is True and parse("--resume=False").resume is False
    assert parse("--pruning_modules=()").pruning_modules == () and parse("--pruning_modules=None").pruning_modules is None
    assert parse("--out_dir=a=b").out_dir == "a=b"


def test_a_flag_needs_a_value():
    assert refused("--seed") == "flag --seed has no value; write --seed=..."


@dataclasses.dataclass(frozen=True)
class OfAFolder:
    folder: str  # what it is about
    deep: bool = False  # a switch

    positional = "folder"


def test_bare_arguments_go_where_the_settings_say():
    assert parse_args(OfAFolder, ["a", "--deep"]) == parse_args(OfAFolder, ["--deep", "a"]) == OfAFolder("a", deep=True)
    for argv, said in ((["a", "b"], "folder is one argument, not a b"), ([], "; give FOLDER"),
                       (["--folder", "a"], "write --folder=a"), (["a", "b.py"], "config file b.py does not exist")):
        with pytest.raises(UserError, match=re.escape(said)):
            parse_args(OfAFolder, argv)
    assert "is neither a config file (.py) nor a setting" in refused("a")  # nothing takes it


def test_required_settings_are_asked_for():
    with pytest.raises(UserError, match=r"^no value for data_dir, out_dir: folder that prepare\.py wrote; give --data_dir"):
        parse_args(PruneSettings, ["--init_from=x"])
    with pytest.raises(UserError, match="init_from"):
        parse_args(PruneSettings, NEEDED[:2])
    for given in (NEEDED[:2], [*NEEDED, "--shape={'vocab_size': 3}"]):
        with pytest.raises(UserError, match=r"either init_from.*or shape"):
            parse_args(PretrainSettings, [*given, "--update=constant"])
    with pytest.raises(UserError, match="reference_loss"):
        parse_args(PretrainSettings, NEEDED)


@pytest.mark.parametrize("flag", [
    "--seq_len=0", "--max_steps=-1", "--learning_rate=0", "--learning_rate=1e999", "--warmup_steps=-1", "--min_lr_ratio=1.5",
    "--weight_decay=-0.1", "--grad_clip=0", "--seed=-1", "--eval_interval=0", "--eval_sequences=0", "--save_interval=0",
    "--log_interval=0", "--max_skipped=0", "--micro_batch_size=0", "--global_batch_size=0", "--min_weight=-0.1",
    "--lagrangian_warmup_steps=-1", "--start_sparsity=1.0", "--mask_learning_rate=0", "--multiplier_learning_rate=-1",
    "--target_hidden_size=0", "--target_n_layers=-1", "--target_n_heads=0", "--target_n_kv_heads=0",
    "--target_intermediate_size=0",
])
def test_values_out_of_range_are_refused(flag):
    name, value = flag.removeprefix("--").split("=")
    found = re.match(rf"{name} = (\S+) ", message := refused(flag))
    assert found and float(found[1]) == float(value), message


@pytest.mark.parametrize("flags, said", [
    (["--domain_weights={'a': 0.5, 'b': 0.6}"], "domain_weights sum to 1.1, not 1"),
    (["--domain_weights={'a': -0.5, 'b': 1.5}"], "domain_weights of a = -0.5"),
    (["--domain_weights={'a': 1e999}"], "domain_weights of a = inf"),
    (["--domain_weights={}"], "sum to 0"),
    (["--domain_weights={'a': 0.5, 'b': 0.5}", "--min_weight=0.5"], "min_weight = 0.5"),
    (["--domain_weights={'github': 0.5, 'b': 0.5}", "--reference_loss={'githb': 1, 'b': 1}"], "githb.*github"),
    (["--reference_loss={'a': -1}"], "reference_loss of a = -1.0"),
    (["--global_batch_size=10", "--micro_batch_size=4"], "global_batch_size = 10.*micro_batch_size = 4"),
])
def test_values_that_do_not_fit_together_are_refused(flags, said):
    assert re.search(said, refused(*flags))


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_setting(stage, capsys):
    module = module_of(stage)
    cls = getattr(module, STAGES[stage], None) or next(
        c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == stage)
    docs = setting_docs(cls)
    with pytest.raises(SystemExit) as stop:
        parse_args(cls, ["--help"])
    printed = capsys.readouterr().out
    launch = f"python {stage}.py" if module.__name__ == stage else f"python -m {module.__name__}"
    assert not stop.value.code and launch in printed  # the launch commands of the docstring
    for field in dataclasses.fields(cls):
        assert len(docs.get(field.name, "")) > 10, f"{field.name} has no comment"
        default = "required" if field.default is dataclasses.MISSING else repr(field.default)
        assert f"--{field.name}={default} " in printed and docs[field.name] in printed


def test_help_works_beside_other_arguments(capsys):
    with pytest.raises(SystemExit):
        parse_args(PretrainSettings, ["--seq_len=abc", "-h"])
    assert "48000" in capsys.readouterr().out and pretrain.__doc__  # its own default, not the base's


@pytest.mark.parametrize("make", [prune_settings, pretrain_settings])
def test_the_settings_are_saved_beside_the_run_and_make_it_again(tmp_path, make):
    cfg = make(tmp_path, tmp_path, tmp_path, domain_weights={"a": 0.25, "b": 0.75}, min_weight=0.1)
    Metrics(cfg, Processes(0, 1, torch.device("cpu"), torch.float32), RunState(0, {}, {}, {}), flops_per_token=1.0).close()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == json.loads(json.dumps(dataclasses.asdict(cfg)))
    again = config(tmp_path, "\n".join(f"{name} = {value!r}" for name, value in saved.items()))
    assert parse_args(type(cfg), [again]) == cfg
