"""Tests of `tools/benchmark.py device` without torch: FLOPs, peaks, batches, JAX's half, table."""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from plan_jax.config import Config
from plan_jax.model import build_components
from plan_jax.state import init_state
from plan_jax.types import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import benchmark
import benchmark_device

TINY = {
    "data.size": "32",
    "data.max_tokens": "24",
    "data.max_words": "22",
    "text.name": "bert_tiny",
    "embed_dim": "16",
    "head_hidden_dim": "32",
}


def load_tiny(folder: Path, method: str, batch: int = 4, **fields: str) -> Config:
    vocabulary = benchmark_device.write_vocabulary(folder / "vocab.txt", 4000)
    overrides = {**TINY, **{name.replace("__", "."): value for name, value in fields.items()}}
    config = benchmark_device.load_paper_config(method, "float32", batch, vocabulary, overrides)
    return dataclasses.replace(config, vision={"name": "vit_tiny"})


def test_flops_of_a_step_are_those_of_towers_heads_and_loss(tmp_path):
    config = load_tiny(tmp_path, "convirt", batch=3)
    components = build_components(config)
    batch = benchmark_device.draw_batch(config, 5, 4)
    state, _ = init_state(components, config, batch)

    def transformer(tokens, width, depth):
        layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2
        return 2 * depth * layer

    image = transformer(17, 16, 1) + 2 * 16 * (8 * 8 * 3) * 16  # 16 patches and the class token
    heads = 2 * 2 * (16 * 32 + 32 * 16)
    pair = image + transformer(24, 16, 1) + heads
    expected = 3 * (3 * pair + 2 * 3 * 3 * 16)
    assert benchmark_device.count_step_flops(components, state, batch) == expected


def test_peaks_are_by_name_and_type():
    peak = benchmark_device.peak_flops
    assert peak("NVIDIA A100-SXM4-40GB", "bfloat16") == 312e12
    assert peak("NVIDIA A100-SXM4-40GB", "float32") == 156e12
    assert peak("NVIDIA A10G", "bfloat16") == 125e12
    assert peak("NVIDIA H100 PCIe", "bfloat16") < peak("NVIDIA H100 80GB HBM3", "bfloat16")
    assert peak("NVIDIA L4", "bfloat16") < peak("NVIDIA L40S", "bfloat16")
    assert peak("Tesla T4", "float32") == 8.1e12
    assert math.isnan(peak("cpu", "float32")) and math.isnan(peak("cpu", "bfloat16"))
    with pytest.raises(UserError, match="Tesla T4 does not compute in bfloat16; use --dtypes"):
        peak("Tesla T4", "bfloat16")


@pytest.mark.parametrize("method", ["mgca", "gloria", "asg"])
def test_texts_of_a_batch_are_consistent(method, tmp_path):
    config = load_tiny(tmp_path, method, batch=16, data__max_tokens="64", data__max_words="60")
    batch = benchmark_device.draw_batch(config, 5, 4)
    text = batch.text
    assert batch.image.shape == (16, 32, 32, 1) and batch.image.std() > 50
    lengths = (text.word_id > 0).sum(1)
    low, high = (5, 40) if method == "gloria" else (20, 60)
    assert low <= lengths.min() < lengths.max() <= high
    for row, length in enumerate(lengths):
        # Every word has pieces, in order; [CLS], [SEP] and padding belong to none.
        index = text.word_index[row]
        assert sorted(set(index[index >= 0])) == list(range(length))
        assert (np.diff(index[index >= 0]) >= 0).all()
        assert text.tokens[row, 0] == 2 and (text.tokens[row] == 3).sum() == 1
        assert ((text.sentence[row] >= 0) == (text.word_id[row] > 0)).all()
        assert (np.diff(text.sentence[row, :length]) >= 0).all()
    assert text.tokens.max() < benchmark_device.VOCAB_SIZE
    assert set(batch.extra) == ({"labels", "regions", "region_words"} if method == "asg" else set())
    if batch.extra:
        x0, y0, x1, y1 = np.moveaxis(batch.extra["regions"], -1, 0)
        assert (x0 < x1).all() and (y0 < y1).all()
        words = batch.extra["region_words"]
        assert words.any() and not (words & (text.word_id == 0)[:, None]).any()


def test_the_step_of_training_is_measured(tmp_path):
    config = load_tiny(tmp_path, "convirt")
    result = benchmark_device.measure_method(config, ("jax",), repeats=3, steps=2)
    (row,) = result["rows"]
    assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
    assert 0 < result["first_losses"]["jax"] < 20 and result["flops"] > 0
    (line,) = benchmark_device.format_rows(result)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["convirt", "float32", "4", "jax"]
    assert len(cells) == benchmark_device.HEADER.split("\n")[0].count("|") - 1


def test_rows_compare_jax_with_each_side():
    result = {
        "method": "plan",
        "dtype": "bfloat16",
        "batch": 8,
        "device": "NVIDIA L4",
        "flops": 3e12,
        "peak_flops": 121e12,
        "rows": [
            benchmark_device.Row("jax", [0.05, 0.1, 0.06], 20.0, 2_000_000_000)._asdict(),
            benchmark_device.Row("torch", [0.1, 0.1, 0.2], 1.0, 3_000_000_000)._asdict(),
            benchmark_device.Row("compile", [], failure="out of memory")._asdict(),
        ],
    }
    ours, theirs, failed = benchmark_device.format_rows(result)
    # 3 TFLOP in 60 ms are 50 TFLOP/s of 121.
    expected = "| plan | bfloat16 | 8 | jax | 50 | 60 | 133.3 | 3.00 | 41% | 2.0 | - | - | 20 |"
    assert ours == expected
    assert theirs.endswith("| 100 | 100 | 80.0 | 3.00 | 25% | 3.0 | 0.50 | 0.60 | 1 |")
    assert "| compile | out of memory | - |" in failed
    assert failed.count("|") == ours.count("|")


def test_each_method_is_a_process_and_a_failure_is_a_line(monkeypatch, capsys):
    commands = []

    def run(command, **options):
        commands.append(command)
        method = command[-3]
        if method == "plan":
            return subprocess.CompletedProcess(command, 1, "jax 0.10.2\n", "progress\nno memory\n")
        output = f"jax 0.10.2\n\n| method |\n|---|\n| {method} | float32 |\nother processes\n"
        return subprocess.CompletedProcess(command, 0, output, "")

    monkeypatch.setattr(benchmark_device.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["tools/benchmark.py", "device"])
    parser = argparse.ArgumentParser()
    benchmark_device.add_arguments(parser)
    args = parser.parse_args(["--platform", "cpu", "--methods", "mgca", "plan", "asg"])
    benchmark_device.main(args, {})
    assert capsys.readouterr().out == (
        "jax 0.10.2\n\n| method |\n|---|\n| mgca | float32 |\n"
        "plan, float32: no memory\n| asg | float32 |\n"
    )
    assert [command[-4:] for command in commands][0] == ["--methods", "mgca", "--dtypes", "float32"]
    assert all("--anyway" in command for command in commands)


def test_a_missing_torch_is_one_sentence(monkeypatch):
    def fail(args, overrides):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(benchmark_device, "main", fail)
    with pytest.raises(SystemExit, match="device needs torch; make parity, or .* --sides jax"):
        benchmark.measure_device(argparse.Namespace(), [])


@pytest.mark.parametrize(("found", "expected"), [("nvidia-smi", "cuda"), (None, "cpu")])
def test_the_gpu_is_measured_where_there_is_one(found, expected, monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "before")  # restored after the test
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    monkeypatch.setattr(benchmark_device.shutil, "which", lambda name: found)
    benchmark_device.prepare_environment(argparse.Namespace(platform=None))
    assert os.environ["JAX_PLATFORMS"] == expected
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"  # memory is left to torch


def test_out_of_memory_is_told_from_other_errors():
    assert benchmark_device.is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: allocating 9 GB"))
    assert benchmark_device.is_out_of_memory(RuntimeError("CUDA out of memory. Tried to"))
    assert not benchmark_device.is_out_of_memory(ValueError("shapes do not fit"))
