"""The command line: parsing, what is passed to training and evaluation, and exit codes."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from configs import testing
from plan_jax import checkpoint, evaluate, main, parallel, train
from plan_jax.config import Config, flatten
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs/testing.py")


@pytest.fixture(autouse=True)
def at_root(monkeypatch, tmp_path):
    """Run in an empty folder, from where configs can import each other."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """Records the arguments of training and evaluation, and runs neither."""
    calls = []
    for module, name in ((train, "train"), (evaluate, "evaluate_checkpoint")):
        monkeypatch.setattr(
            module, name, lambda *args, name=name: calls.append((name, *args)) or {}
        )
    return calls


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("steps", "7", 7),
        ("optim.learning_rate", "1e-4", 1e-4),
        ("optim.learning_rate", "1", 1.0),
        ("data.cache", "false", False),
        ("data.cache", "no", False),
        ("data.tokenizer", "12", "12"),
        ("eval.tasks", "grounding,retrieval", ("grounding", "retrieval")),
        ("eval.tasks", "('zero_shot',)", ("zero_shot",)),
        ("eval.tasks", "zero_shot", ("zero_shot",)),
        ("optim.freeze", "()", ()),
        ("hyper.tau", "0.2", 0.2),
        ("vision.widths", "(8, 16)", (8, 16)),
        ("text.dropout", "0.1", 0.1),
        ("data.builder.findings", "nodule", ("nodule",)),
    ],
)
def test_a_field_is_set(field, text, value, calls):
    assert main.run(["--config", CONFIG, f"--config.{field}={text}"]) == 0
    assert main.run(["--config", CONFIG, f"--config.{field}", text]) == 0
    assert len(calls) == 2
    for name, config, workdir in calls:
        assert (name, str(workdir)) == ("train", "runs/testing")
        result = dict(flatten(config.to_dict()))[field]
        assert result == (list(value) if isinstance(value, tuple) else value)
        assert isinstance(result, list if isinstance(value, tuple) else type(value))


def test_overrides_know_the_fields_of_the_chosen_method(calls):
    argv = ["--config", CONFIG, "--config.hyper.image_to_text=0.5", "--config.method=convirt"]
    assert main.run(argv) == 2  # testing sets constants of PLAN, which ConVIRT does not have
    content = main.load_config_file(CONFIG) | {"hyper": {}}
    overrides = {"hyper.image_to_text": "0.5", "method": "convirt"}
    config = Config.from_dict(main.apply_overrides(content, overrides))
    assert config.method == "convirt" and config.hyper.image_to_text == 0.5


@pytest.mark.parametrize("text", ["{'text': 'report'}", "{'text': 'a.b'}", "{'a.b': 'c'}", "{}"])
def test_a_dict_is_replaced(text):
    pairs = main.load_config_file(str(ROOT / "configs/pairs.py"))
    pairs["data"]["builder"]["columns"] = {"image": "file.name"}
    values = main.apply_overrides(pairs, {"data.builder.columns": text})
    assert values["data"]["builder"]["columns"] == ast.literal_eval(text)
    kept = main.apply_overrides(pairs, {"steps": "3"})
    assert kept["data"]["builder"]["columns"] == {"image": "file.name"}


def test_an_override_does_not_need_the_value_in_the_file():
    content = main.load_config_file(CONFIG)
    content["data"]["workers"] = None
    assert main.apply_overrides(content, {"data.workers": "3"})["data"]["workers"] == 3


@pytest.mark.parametrize("text", ["[1]", '{"seed": 0, "colour": 1}', '{"data": 3}'])
def test_a_folder_with_another_config_is_refused(text, calls, capsys):
    Path("run").mkdir()
    Path("run/config.json").write_text(text)
    assert main.run(["--config", CONFIG, "--workdir", "run"]) == 2
    error = capsys.readouterr().err
    assert "run" in error and "pass another --workdir" in error and not calls


def test_the_same_run_is_resumed_and_another_is_refused(calls, capsys):
    Path("run").mkdir()
    config = Config.from_dict(main.load_config_file(CONFIG))
    stored = config.to_dict()
    del stored["checkpoint"]["minutes"]  # as of a version without the field
    Path("run/config.json").write_text(json.dumps(stored))
    same = ["--config", CONFIG, "--workdir", "run"]
    assert main.run([*same, "--config.eval.limit=4", "--config.log_every=2"]) == 0
    assert main.run([*same, "--config.checkpoint.minutes=5"]) == 0
    assert main.run([*same, "--config.steps=9"]) == 2
    assert (
        "workdir run holds a run of config.steps 6, not 9; pass another --workdir"
        in capsys.readouterr().err
    )
    assert [config.checkpoint.minutes for _, config, _ in calls] == [15, 5]


MOVED = "--config.data.builder.manifest=new/manifest.csv"


def stored_pairs():
    """Returns the stored config of a run on pairs, whose data have a fingerprint."""
    content = main.load_config_file(CONFIG)
    builder = {"manifest": "old/manifest.csv", "size": 32}
    content["data"] |= {"name": "pairs", "builder": builder, "fingerprint": "a-b"}
    return Config.from_dict(content).to_dict()


def write_pairs_config():
    Path("mine.py").write_text(
        "from configs import testing\n\n\ndef get_config():\n    config = testing.get_config()\n"
        "    config.data.name = 'pairs'\n    config.data.builder = {'size': 32}\n"
        "    return config\n"
    )
    return ["--config", "mine.py"]


@pytest.mark.parametrize(
    ("flags", "fingerprint"),
    [([], "a-b"), (["--config.data.fingerprint="], ""), (["--config.data.fingerprint=c"], "c")],
)
@pytest.mark.parametrize("mode", ["train", "eval", "eval without --config"])
def test_moved_data_are_accepted_by_their_fingerprint(mode, flags, fingerprint, calls, monkeypatch):
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(stored_pairs()))
    monkeypatch.setattr(checkpoint, "read_config", lambda folder: stored_pairs())
    monkeypatch.setattr(checkpoint, "locate", lambda folder: (Path("run/checkpoints"), 1))
    argv = [MOVED, *flags] if "without" in mode else [*write_pairs_config(), MOVED, *flags]
    place = ["--workdir", "run"] if mode == "train" else ["--mode", "eval", "--checkpoint", "run"]
    assert main.run([*argv, *place]) == 0
    ((_, config, *_),) = calls
    assert config.data.builder["manifest"] == "new/manifest.csv"
    assert config.data.fingerprint == fingerprint


def test_data_without_a_fingerprint_are_known_by_their_place(calls, monkeypatch, capsys):
    Path("run").mkdir()
    content = stored_pairs()
    content["data"]["fingerprint"] = ""
    monkeypatch.setattr(checkpoint, "read_config", lambda folder: content)
    assert main.run(["--mode", "eval", "--checkpoint", "run", MOVED]) == 2
    error = capsys.readouterr().err
    assert "config.data.builder.manifest old/manifest.csv, not new/manifest.csv" in error
    assert "leave --config.data.builder.manifest out" in error and not calls


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("batch 3 is odd; use 4"), 2, "batch 3 is odd; use 4\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues\n"),
    ],
)
def test_exit_codes(error, code, message, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "train", fail)
    assert main.run(["--config", CONFIG]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("flag", ["workdir", "config", "checkpoint"])
@pytest.mark.parametrize("parent", ["", "x/", "y" * 300 + "/"])
def test_a_name_that_is_too_long_is_one_sentence(flag, parent, capsys):
    argv = [f"--{flag}={parent}{'a' * 300}.py"]
    argv += {"workdir": [f"--config={CONFIG}"], "checkpoint": ["--mode=eval"]}.get(flag, [])
    if flag == "workdir" and parent == "x/":
        Path("x").mkdir()
    assert main.run(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(flag if flag != "config" else "config file ")
    remedies = (
        "pass another --workdir",
        "there are ",
        "pass the path",
        "pass the folder",
        "remove",
    )
    assert error.count("\n") == 1 and any(remedy in error for remedy in remedies), error


def test_a_workdir_in_a_folder_that_may_not_be_entered(monkeypatch, calls, capsys):
    stat = os.stat

    def refuse(path, *arguments, **options):
        if "closed" in Path(path).parts[:-1]:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr("os.stat", refuse)
    assert main.run(["--config", CONFIG, "--workdir", "closed/run"]) == 2
    assert capsys.readouterr().err == (
        "workdir closed/run cannot be written (Permission denied); pass another --workdir\n"
    )
    assert not calls


@pytest.mark.parametrize(
    ("field", "value", "difference"),
    [
        (
            "steps",
            7,
            r"host 1 does not have the config of host 0, which has config.steps \d+, not 7;",
        ),
        ("log_every", 7, "host 1 does not have the config of host 0, which has config.log_every"),
        ("data.dir", "elsewhere", ""),
    ],
)
def test_hosts_with_different_configs_are_refused(field, value, difference, monkeypatch):
    content = testing.get_config()
    own = Config.from_dict(content.to_dict())
    content.update_from_flattened_dict({field: value})
    texts = [json.dumps(config.to_dict()) for config in (own, Config.from_dict(content.to_dict()))]
    monkeypatch.setattr(parallel, "gather_strings", lambda text: texts)
    if not difference:
        return main.require_same_config(own)
    with pytest.raises(UserError, match=difference):
        main.require_same_config(own)


def test_hosts_with_other_workdirs_are_refused(monkeypatch):
    texts = ["runs/a", "runs/b"]
    monkeypatch.setattr(parallel, "gather_strings", lambda _: texts)
    with pytest.raises(UserError, match="^host 1 has workdir runs/b, and host 0 runs/a; pass the"):
        main.require_same_workdir("runs/a")
    texts.pop()
    main.require_same_workdir("runs/a")


def test_hosts_with_other_data_are_refused(monkeypatch):
    fingerprints = ["ab", "ab", "cd"]
    monkeypatch.setattr(parallel, "gather_strings", lambda _: fingerprints)
    with pytest.raises(UserError, match="host 2 has data of fingerprint cd, .* 0 of ab;"):
        evaluate.require_same_data("ab")
    fingerprints.pop()
    evaluate.require_same_data("ab")


def test_hosts_with_other_weights_are_refused(monkeypatch):
    texts = ["step 3 (ab)", "step 6 (cd)"]
    monkeypatch.setattr(parallel, "gather_strings", lambda _: texts)
    with pytest.raises(UserError, match=r"^host 1 has read step 6 .cd. .* host 0 step 3 .ab.;"):
        evaluate.require_same_weights(3, "ab")
    texts.pop()
    evaluate.require_same_weights(3, "ab")


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(ZeroDivisionError):
        main.run(["--config", CONFIG])


def test_help(capsys):
    assert main.run(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(flag in output for flag in ("--config", "--workdir", "--mode", "--checkpoint"))


def test_a_config_with_an_argument():
    Path("small.py").write_text(
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config(steps='1'):\n    return ConfigDict({'steps': int(steps)})\n"
    )
    assert main.load_config_file("small.py") == {"steps": 1}
    assert main.load_config_file("small.py:5") == {"steps": 5}
    assert [main.default_workdir(f"x/small.py{end}") for end in ("", ":5")] == [
        "runs/small",
        "runs/small_5",
    ]


@pytest.mark.parametrize("module", ["main", "predict"])
def test_as_a_program(module):
    argv = [sys.executable, "-m", f"plan_jax.{module}", "--nothing=1"]
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1 and "--help shows" in process.stderr


def test_results_are_printed_beside_their_baselines(capsys):
    metrics = {"grounding/cnr_signed": 1.5, "grounding/prior/cnr_signed": 1.1, "images_per_s": 99.6}
    metrics |= {"retrieval/i2t_r5": 0.5, "retrieval/chance/i2t_r5": 0.017, "params_sha256": "ab12"}
    main.print_results(metrics, Path("runs/x/report.html"))
    assert capsys.readouterr().out.splitlines() == [
        "grounding/cnr_signed           1.500  lung prior 1.1",
        "retrieval/i2t_r5               0.500  chance 0.017",
        "images_per_s                     100",
        "params_sha256 ab12",
        "all metrics, with pictures: runs/x/report.html",
    ]
    metrics = {"zero_shot/auroc_macro": float("nan"), "params_sha256": "ab12"}
    main.print_results(metrics)
    assert capsys.readouterr().out.splitlines() == [
        "zero_shot/auroc_macro            nan",
        "zero_shot: AUROC is undefined: no finding has known labels of both classes in the "
        "evaluated split",
        "params_sha256 ab12",
    ]
    main.print_results({}, Path("runs/x/report.html"))
    assert capsys.readouterr().out == ""


@pytest.fixture
def saved_run(tmp_path):
    """The folder of a run with a checkpoint of the testing config, which cannot be evaluated."""
    config = Config.from_dict(main.load_config_file(CONFIG))
    manager = checkpoint.open_manager(tmp_path / "run" / checkpoint.FOLDER)
    checkpoint.save(manager, 1, {"params": {"a": jnp.ones(2)}}, {}, config.to_dict())
    checkpoint.close(manager)
    return tmp_path / "run"


def test_results_that_cannot_be_written_are_refused_before_the_evaluation(saved_run, calls, capsys):
    (saved_run / "eval").write_text("a file where the folder should be")
    argv = ["--mode", "eval", "--checkpoint", str(saved_run)]
    assert main.run(argv) == 2 and not calls
    error = capsys.readouterr().err
    assert error.startswith(f"folder {saved_run / 'eval' / 'test'} is inside ")
    assert error.endswith("pass another for the results as --workdir\n")
    assert main.run([*argv, "--workdir", "results"]) == 0
    ((name, _, folder, out),) = calls
    assert (name, folder, out) == (
        "evaluate_checkpoint",
        str(saved_run),
        Path("results/eval/test"),
    )


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_metrics_that_cannot_be_written_are_printed(mode, saved_run, monkeypatch, capsys):
    def fail(*_):
        metrics = {"retrieval/i2t_r5": 0.5, "params_sha256": "ab12"}
        raise evaluate.UnwrittenResults("metrics.json cannot be written; free disk space", metrics)

    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", fail)
    argv = ["--config", CONFIG] if mode == "train" else ["--mode=eval", f"--checkpoint={saved_run}"]
    assert main.run(argv) == 2
    out, err = capsys.readouterr()
    assert err == "metrics.json cannot be written; free disk space\n"
    assert out.splitlines() == ["retrieval/i2t_r5               0.500", "params_sha256 ab12"]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("main", "--config=configs/testing.py --workdir=no"),
        ("predict", "--checkpoint=no --image=no.png --text=effusion"),
    ],
)
def test_there_is_no_such_device(module, arguments):
    argv = [sys.executable, "-W", "error", "-m", f"plan_jax.{module}", *arguments.split()]
    environment = {**os.environ, "JAX_PLATFORMS": "tpu"}
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr
    assert process.stderr.splitlines()[-1].startswith("JAX_PLATFORMS is tpu: Unable to initialize")
    assert not (ROOT / "no").exists()
