"""The command `--mode compile` at test size, its report, and mistakes in a sentence."""

import dataclasses
import importlib.metadata
import json
import sys
import types

import jax
import numpy as np
import pytest

from configs import testing
from plan_jax import main, parallel, preflight
from plan_jax.command.config_files import load_config_file
from plan_jax.config import Config
from plan_jax.data import phantom
from plan_jax.preflight import compile as compilation
from plan_jax.preflight import topology
from plan_jax.preflight.compile import compile_step
from plan_jax.preflight.memory import tree_bytes
from plan_jax.preflight.shapes import local_batch, make_shapes
from plan_jax.types import UserError

# The smallest step: ConVIRT, which has the fewest equations.
CONFIG = "convirt:phantom"
SMALL = (
    *("--config.data.size=32", "--config.data.max_tokens=24", "--config.data.max_words=20"),
    *("--config.vision.name=resnet_tiny", "--config.text.name=bert_tiny", "--config.batch=8"),
    *("--config.embed_dim=8", "--config.head_hidden_dim=16"),
)
METHODS = ("convirt", "gloria", "mgca", "asg", "place", "plan")


def make_config(**values):
    content = testing.get_config().to_dict() | {"method": "convirt", "fine_map": False}
    return Config.from_dict(content | {"hyper": {}} | values)


@pytest.fixture(scope="module")
def result():
    """The preflight of a tiny step on four of the eight virtual devices."""
    return compile_step(make_config(), preflight.find_target(4))


def test_figures_of_a_step_on_four_devices(result):
    shapes = make_shapes(result.config)
    kinds = result.memory.kinds
    assert result.pairs == 2 and result.target.mesh.size == 4
    assert kinds["parameters"] == tree_bytes(shapes.state.params)
    assert kinds["optimiser state"] >= 2 * kinds["parameters"]
    assert kinds["batch"] == tree_bytes(shapes.batch) // 4
    assert kinds["temporaries"] > 0 and result.memory.fits
    assert result.flops > 0 and result.traffic > kinds["parameters"]
    # The gradients of parameters are averaged, and every device receives all texts.
    assert result.collectives["all-gather"].bytes >= 2 * result.config.embed_dim * 4
    assert result.compile_seconds > 0 < result.compile_cpu_seconds and not result.refusal
    for kind, size in result.minimum.items():
        assert 0.9 * result.collectives[kind].bytes <= size <= result.collectives[kind].bytes


def test_the_report_names_all_of_it(result):
    text = preflight.format_report(result)
    for part in (
        "convirt on this machine (4 devices of kind cpu): 8 pairs, 2 of them on each device",
        "parameters",
        "temporaries",
        "it fits",
        "FLOPs of matrix products",
        "all-reduce",
        "peak rates of a cpu are not known",
        "compiled in",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110
    values = json.loads(json.dumps(preflight.to_dict(result)))
    assert values["memory_total"] == result.memory.total
    assert values["collectives"]["all-reduce"]["count"] == result.collectives["all-reduce"].count


def test_the_command_prints_the_report_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def compile_nothing(config, target, effort):
        assert (config.batch, config.method, effort) == (16, "convirt", -1.0)
        return fake

    fake = object()
    monkeypatch.setattr(preflight, "compile_step", compile_nothing)
    monkeypatch.setattr(preflight, "format_report", lambda result: f"report {result is fake}")
    monkeypatch.setattr(preflight, "to_dict", lambda _: {"fits": True})
    command = ["--config", CONFIG, "--mode", "compile", *SMALL, "--batch=16", "--effort=-1"]
    assert main.run(command) == 0
    assert list(tmp_path.iterdir()) == []
    assert main.run([*command, "--workdir", "out"]) == 0
    assert capsys.readouterr().out == "report True\n" * 2
    assert json.loads((tmp_path / "out/preflight.json").read_text()) == {"fits": True}


def test_the_whole_command_for_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--config", CONFIG, "--mode", "compile", *SMALL, "--config.parallel.devices=2"]
    assert main.run(command) == 0
    output = capsys.readouterr()
    assert "it fits" in output.out and "4 of them on each device" in output.out
    assert "compiling convirt for this machine" in output.err
    assert list(tmp_path.iterdir()) == []


# Shapes from the config alone -------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, *(f"{name}:phantom" for name in METHODS)])
def test_every_config_has_shapes_without_data_weights_and_network(name):
    config = Config.from_dict(load_config_file(name))
    shapes = make_shapes(config)
    method = shapes.components.method
    assert shapes.batch.image.shape == (config.batch, config.data.size, config.data.size, 1)
    assert set(shapes.batch.extra) == set(method.REQUIRES)
    rows = shapes.state.params["encoders"]["text_tower"]["token"]["embedding"].shape[0]
    is_paper = ":" not in name
    assert (rows == 28996) == is_paper
    assert is_paper == any("28996 pieces" in sentence for sentence in shapes.assumptions)
    if name == "asg":
        assert shapes.batch.extra["regions"].shape == (288, 36, 4)
    if name == "asg:phantom":
        assert shapes.batch.extra["regions"].shape[1] == len(phantom.ANATOMY)


def test_a_part_of_a_batch():
    batch = local_batch(make_shapes(make_config()).batch, 4)
    assert batch.image.shape == (2, 32, 32, 1) and batch.text.tokens.shape == (2, 24)


def test_a_dataset_without_regions_is_a_sentence():
    content = testing.get_config().to_dict() | {"method": "asg", "hyper": {}, "fine_map": False}
    content["data"] |= {"name": "mimic_cxr", "builder": {"source": "x"}}
    with pytest.raises(UserError, match="method asg needs regions, which dataset mimic_cxr"):
        make_shapes(Config.from_dict(content))


# Memory that is not there -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (40.25G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.25G of 15.75G hbm.",
    ],
)
def test_a_refusal_of_the_compiler_is_a_report(monkeypatch, message):
    def refuse(self, compiler_options=None):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    result = compile_step(make_config(), preflight.find_target(1))
    assert result.memory.temporaries == int(40.25 * topology.GIB)
    assert result.memory.fits is False
    text = preflight.format_report(result)
    assert "it does NOT fit" in text and "config.microbatch=" in text
    assert preflight.to_dict(result)["refusal"] == message


def test_another_failure_of_the_compiler_stays_an_error(monkeypatch):
    def refuse(self, compiler_options=None):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(RuntimeError, match="a bug"):
        compile_step(make_config(), preflight.find_target(1))


def test_the_cache_of_programs_is_back_after_a_failure():
    before = jax.config.values["jax_enable_compilation_cache"]
    with pytest.raises(ValueError), compilation._without_cache():
        assert not jax.config.values["jax_enable_compilation_cache"]
        raise ValueError
    assert jax.config.values["jax_enable_compilation_cache"] == before


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--topology=v5e-9"], ("topology 'v5e-9' is unknown", "v5e-8", "v4-32", "v5e:2x4")),
        (["--topology="], ("topology '' is unknown", "v5e-8")),
        (["--topology=v5e:3x5"], ("topology 'v5e:3x5'", "not a shape")),
        (["--checkpoint=runs/x"], ("--checkpoint is for --mode eval",)),
        (["--effort=2"], ("effort", "2")),
        (["--batch=x"], ("batch", "x")),
        (["--batch=9", "--config.parallel.devices=2"], ("9 is not divisible by 2", "8 or 10")),
        (["--config.microbatch=3", "--config.parallel.devices=2"], ("the 4 pairs", "use 2 or 4")),
        (["--config.parallel.devices=99"], ("parallel.devices is 99", "8")),
        (["--workdir=file/x"], ("workdir file/x is inside", "a file")),
    ],
)
def test_a_mistake_is_one_sentence(arguments, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main.run(["--config", CONFIG, "--mode", "compile", *SMALL, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert all(part in error for part in parts), error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("flag", ["--topology=v5e-8", "--batch=8", "--effort=-1"])
def test_flags_of_compile_belong_to_it(flag, capsys):
    assert main.run(["--config", CONFIG, flag]) == 2
    assert f"{flag.partition('=')[0]} is for --mode compile" in capsys.readouterr().err


def test_an_evaluation_is_not_compiled(capsys):
    assert main.run(["--config", "eval/all_phantom", "--mode", "compile"]) == 2
    assert "only evaluates" in capsys.readouterr().err


def test_a_missing_compiler_is_a_sentence(monkeypatch, capsys):
    def miss(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", miss)
    command = ["--config", CONFIG, "--mode", "compile", *SMALL, "--topology=v5e-8"]
    assert main.run(command) == 2
    assert "pip install 'plan_jax[tpu]'" in capsys.readouterr().err


def test_the_preflight_checks_the_dtype_as_training_does():
    target = preflight.find_target(1)
    card = types.SimpleNamespace(device_kind="Tesla T4", compute_capability="7.5")
    mesh = types.SimpleNamespace(size=1, devices=np.array([card]))
    with pytest.raises(UserError, match="Tesla T4 .* does not have; use config.dtype=float32"):
        compile_step(make_config(dtype="bfloat16"), dataclasses.replace(target, mesh=mesh))


def test_fewer_devices_of_a_slice_can_be_used():
    devices = jax.devices()
    assert topology._make_mesh(devices, 2, "v5e-8").size == 2
    with pytest.raises(UserError, match="parallel.devices is 9 but topology v5e-8 has 8"):
        topology._make_mesh(devices, 9, "v5e-8")


@pytest.mark.parametrize(("effort", "has_axis"), [(-1.0, False), (0.0, True)])
def test_with_less_effort_one_device_has_no_collectives(effort, has_axis, monkeypatch):
    """XLA's compiler for TPUs would end the process at collectives of one device."""
    traced = []

    def stop(step, mesh):
        def trace(carry, batch):
            jaxpr = jax.make_jaxpr(step, axis_env=[(parallel.AXIS, 1)])(carry, batch)
            traced.append("psum" in str(jaxpr) or "all_gather" in str(jaxpr))
            raise UserError("traced")

        return types.SimpleNamespace(trace=trace)

    monkeypatch.setattr(parallel, "parallelise", stop)
    with pytest.raises(UserError, match="traced"):
        compile_step(make_config(), preflight.find_target(1), effort)
    assert traced == [has_axis]


def test_progress_is_printed_while_a_step_compiles(monkeypatch, capsys):
    monkeypatch.setattr(compilation, "PROGRESS_SECONDS", 0.01)
    with compilation._progress("x for y"):
        while capsys.readouterr().err.count("x for y: 0 s") < 1:
            sys.stderr.flush()
