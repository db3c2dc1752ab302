"""Tests of `tools/benchmark.py scale`: batches, resuming, and the tables."""

import json
import sys
from pathlib import Path

import pytest

from plan_jax.types import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import benchmark_scale
from benchmark_scale import GIB, Case

FIGURES = {
    "method": "convirt",
    "chip": "TPU v5e",
    "devices": 8,
    "pairs_per_device": 18,
    "memory": {"parameters": GIB, "optimiser state": 2 * GIB, "temporaries": 4 * GIB, "program": 0},
    "memory_total": 7 * GIB,
    "memory_limit": 14 * GIB,
    "fits": True,
    "flops": 3e12,
    "traffic": 50e9,
    # An all-reduce sends 2 (8 - 1) / 8 of its bytes, an all-gather 8 - 1 times its own.
    "collectives": {
        "all-reduce": {"count": 2, "bytes": 8_000_000},
        "all-gather": {"count": 1, "bytes": 1_000_000},
    },
    "minimum": {"all-reduce": 8_000_000},
    "step_seconds": 0.04,
    "images_per_second": 3600.0,
    "compile_cpu_seconds": 200.0,
    "refusal": "",
}


def list_two():
    return benchmark_scale.list_cases(("convirt", "plan"), ("v5e-8",), 0.0, {"batch": "144"})


def test_batches_are_the_papers_or_their_pairs_on_each_chip():
    cases = benchmark_scale.list_cases(
        ("gloria", "asg"), ("v5e-1", "v4-32", "v5e-256"), -1.0, {"dtype": "bfloat16"}
    )
    found = {(case.method, case.topology): case.batch for case in cases}
    assert found == {
        ("gloria", "v5e-1"): 48,
        ("gloria", "v4-32"): 48,
        ("gloria", "v5e-256"): 6 * 256,
        ("asg", "v5e-1"): 288,
        ("asg", "v4-32"): 288,
        ("asg", "v5e-256"): 36 * 256,
    }
    assert cases[0] == Case("gloria", "v5e-1", 48, -1.0, (("dtype", "bfloat16"),))
    fixed = benchmark_scale.list_cases(("asg",), ("v5e-8",), 0.0, {"batch": "16"})
    assert fixed == [Case("asg", "v5e-8", 16, 0.0)]
    with pytest.raises(UserError, match="v5e-9"):
        benchmark_scale.list_cases(("asg",), ("v5e-9",), 0.0, {})


def test_a_run_continues_where_it_was_interrupted(tmp_path, monkeypatch):
    path, compiled = tmp_path / "scale.jsonl", []

    def compile_case(case):
        compiled.append(case.method)
        return FIGURES if case.method == "convirt" else "it failed"

    monkeypatch.setattr(benchmark_scale, "compile_case", compile_case)
    benchmark_scale.run_cases(list_two(), path)
    path.open("a").write('{"case": {"method": "pl')  # killed while writing
    benchmark_scale.run_cases(list_two(), path)
    assert compiled == ["convirt", "plan", "plan"]  # what failed is tried again
    monkeypatch.setattr(benchmark_scale, "compile_case", lambda _: FIGURES)
    benchmark_scale.run_cases(list_two(), path)
    assert benchmark_scale.read_results(path) == dict.fromkeys(list_two(), FIGURES)


def test_the_table_states_shares_ratios_and_what_is_missing():
    convirt, plan = list_two()
    slow = {**FIGURES, "compile_cpu_seconds": 300.0}
    lines = list(benchmark_scale.format_tables([convirt, plan], {convirt: FIGURES, plan: slow}))
    assert lines[1] == "**v5e-8**: 8 chips of TPU v5e, 14 GiB each."
    row = (
        "144, 18 | 3.00 GiB | 4.00 GiB | 0.00 GiB | 50%, fits | 3.00 | 50 | 21.0 | 14.0 | 40 | 3600"
    )
    assert lines[-2] == f"| convirt | {row} | 200 | 1.00 |"
    assert lines[-1] == f"| plan | {row} | 300 | 1.50 |"
    assert len({line.count("|") for line in "\n".join(lines).splitlines() if "|" in line}) == 1
    # Without ConVIRT there is nothing to compare with.
    lines = list(benchmark_scale.format_tables([convirt, plan], {plan: FIGURES}))
    assert lines[-3].endswith("| 200 | - |") and lines[-1] == "Not compiled for v5e-8: convirt."


def test_a_step_that_the_compiler_refuses_has_only_its_memory():
    convirt, plan = list_two()
    names = ("traffic", "collectives", "step_seconds", "images_per_second")
    large = {**FIGURES, **dict.fromkeys(names), "fits": False, "memory_total": 28 * GIB}
    large["refusal"] = "it exceeds the memory"
    memory = "144, 18 | 3.00 GiB | 4.00 GiB | - | 200%, does not fit"
    for results, ratio in (({convirt: large, plan: FIGURES}, "-"), ({plan: FIGURES}, "-")):
        *_, last = benchmark_scale.format_tables(list(results), results)
        assert last.endswith(f"| 200 | {ratio} |")
    *_, last = benchmark_scale.format_tables([convirt, plan], {convirt: FIGURES, plan: large})
    assert last == f"| plan | {memory} | 3.00 | - | - | - | - | - | 200 | - |"


def test_a_failure_is_reported_by_its_last_line():
    """There is no config of this name, which the command says before it compiles."""
    message = benchmark_scale.compile_case(Case("nonsense", "v5e-8", 8, 0.0))
    assert isinstance(message, str)
    assert "config file nonsense does not exist" in message, message


def test_the_figures_are_those_of_the_preflight(monkeypatch):
    """The command is replaced by a program that writes what it was asked for."""
    real = benchmark_scale.subprocess.run

    def run(command, **options):
        folder = next(word for word in command if word.startswith("--workdir=")).partition("=")[2]
        (Path(folder) / "preflight.json").write_text(json.dumps({"command": command[3:]}))
        return real([sys.executable, "-c", ""], **options)

    monkeypatch.setattr(benchmark_scale.subprocess, "run", run)
    case = Case("plan", "v5e-8", 144, -1.0, (("dtype", "bfloat16"),))
    figures = benchmark_scale.compile_case(case)
    assert not isinstance(figures, str)
    expected = ["--config", "plan", "--mode", "compile", "--topology=v5e-8", "--batch=144"]
    assert figures["command"][:7] == [*expected, "--effort=-1.0"]
    assert figures["command"][-1] == "--config.dtype=bfloat16"
