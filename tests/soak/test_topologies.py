"""Compilation for TPUs that are not there: `--mode compile` with a real libtpu, in a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = (
    *("--config.data.size=32", "--config.data.max_tokens=24", "--config.data.max_words=20"),
    *("--config.vision.name=resnet_tiny", "--config.text.name=bert_tiny", "--config.batch=8"),
    *("--config.embed_dim=8", "--config.head_hidden_dim=16"),
)


def run_command(*arguments, folder):
    """Returns the finished command, in a fresh process without settings of the tests."""
    ours = ("JAX_", "XLA_", "TPU_")
    environment = {name: x for name, x in os.environ.items() if not name.startswith(ours)}
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "plan_jax.main", "--mode=compile", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": python_path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("topology", "devices"), [("v5e-8", 8), ("v6e-1", 1)])
def test_a_step_compiles_for_a_tpu_that_is_not_there(topology, devices, tmp_path):
    arguments = ("--config=convirt:phantom", *SIZES, f"--topology={topology}", "--workdir=out")
    finished = run_command(*arguments, "--effort=-1", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "it fits" in finished.stdout and "images/s" in finished.stdout
    # Nothing of libtpu's own messages.
    lines = finished.stderr.strip().splitlines()
    assert all(line.startswith("compiling convirt for") for line in lines), finished.stderr
    figures = json.loads((tmp_path / "out/preflight.json").read_text())
    assert figures["devices"] == devices and figures["fits"] is True
    assert figures["memory_total"] > figures["memory"]["parameters"] > 0
    assert 0 < figures["step_seconds"] < 1
    if devices > 1:
        reduced = figures["collectives"]["all-reduce"]["bytes"]
        assert reduced >= 0.95 * figures["minimum"]["all-reduce"] > 0


def test_a_batch_that_does_not_divide_is_a_sentence(tmp_path):
    arguments = ("--config=mgca", "--topology=v5e-256")
    finished = run_command(*arguments, folder=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == "batch 144 is not divisible by 256 devices; use 256\n"
