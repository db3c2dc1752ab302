"""Killed, stopped and multi-process runs end with the parameters of an uninterrupted run."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import portpicker
import pytest

from plan_jax import checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 40
TWO_PROCESSES = """
from configs import testing


def get_config():
    config = testing.get_config()
    config.steps = 3
    return config
"""
# XLA as users have it. Runs are alike: all but the first find every program in the cache.
ENVIRONMENT = {"XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
TIMEOUT = 600  # seconds; the machine may be busy with other tests


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Yields a function that starts a tiny run; runs share data and are killed at the end."""
    data, runs = tmp_path_factory.mktemp("data"), []

    def start_run(*args, **options):
        runs.append(launch(data, *args, **options))
        return runs[-1]

    yield start_run
    for run in runs:
        run.kill()


def launch(data, workdir, *overrides, config="configs/testing.py", **environment):
    """Starts a tiny run in its own process, with one device, and returns the process."""
    fields = {"data.dir": data, "log_every": 1, "checkpoint.every": 5, "eval.tasks": "()"}
    argv = [f"--config.{name}={value}" for name, value in fields.items()]
    argv += [f"--config.{override}" for override in overrides]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "plan_jax.main",
            f"--config={config}",
            f"--workdir={workdir}",
            *argv,
        ],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_exit(run):
    """Waits until a run ends, and returns its exit code and output."""
    out, err = run.communicate(timeout=TIMEOUT)
    return run.returncode, out + err


def read_metrics(workdir):
    """Returns the metrics that a run has logged, without those that depend on the clock."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    # The last line may be half-written.
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in row.items() if "per_s" not in k} for row in rows]


def wait_for_step(run, workdir, step):
    """Waits until a run has logged a step."""
    deadline = time.monotonic() + TIMEOUT
    while not any(row["step"] >= step for row in read_metrics(workdir)[-1:]):
        if run.poll() is not None:
            code, output = wait_for_exit(run)
            pytest.fail(f"ended with {code} before step {step}:\n{output}")
        assert time.monotonic() < deadline, f"step {step} is not logged after {TIMEOUT} s"
        time.sleep(0.01)


def read_fingerprint(workdir):
    """Returns the fingerprint of the parameters at the end of a run."""
    return json.loads((Path(workdir) / "metrics.json").read_text())["params_sha256"]


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, start):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(whole, f"steps={STEPS}")
    stop_steps = [random.SystemRandom().randint(first, first + 9) for first in (3, 14, 26)]
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    for stop_step, signal_number in zip(stop_steps, signals, strict=True):
        run = start(killed, f"steps={STEPS}")
        wait_for_step(run, killed, stop_step)
        run.send_signal(signal_number)
        code, output = wait_for_exit(run)
        assert "Traceback" not in output, output
        if signal_number == signal.SIGTERM:
            assert code == 0 and "and saved; the same command resumes" in output, output
            saved = checkpoint.load_weights(killed)["step"]
            assert f"stopped at step {saved} " in output
        else:
            assert code == -signal.SIGKILL, output
    code, output = wait_for_exit(start(killed, f"steps={STEPS}"))
    assert code == 0 and "resumed at step" in output, output
    code, output = wait_for_exit(reference)
    assert code == 0, output
    assert read_fingerprint(killed) == read_fingerprint(whole), stop_steps
    by_step = {row["step"]: row for row in read_metrics(whole)}
    steps = [row["step"] for row in read_metrics(killed)]
    assert steps == sorted(set(steps)) and len(steps) > STEPS - 10, stop_steps
    assert all(row == by_step[row["step"]] for row in read_metrics(killed)), stop_steps


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, start):
    """Two at the same moment, and two more while the first one compiles and trains."""
    runs = [start(tmp_path, "steps=2000"), start(tmp_path, "steps=2000")]
    while all(run.poll() is None for run in runs):
        time.sleep(0.01)
    refused, first = sorted(runs, key=lambda run: run.poll() is None)
    results = [wait_for_exit(refused)]
    for delay in (0.5, 6):
        time.sleep(delay)
        results.append(wait_for_exit(start(tmp_path, "steps=2000")))
    for code, output in results:
        assert code == 2 and f"is in use by process {first.pid} on " in output, output
        assert "Traceback" not in output and "broken" not in output, output
    wait_for_step(first, tmp_path, 3)
    first.send_signal(signal.SIGTERM)
    code, output = wait_for_exit(first)
    assert code == 0 and "and saved; the same command resumes" in output, output
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps == sorted(set(steps)) and len(steps) == steps[-1]


def start_two(start, folder, *overrides):
    """Starts the two processes of one run."""
    port = portpicker.pick_unused_port()
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    config = folder / "two.py"
    config.write_text(TWO_PROCESSES)
    return [
        start(folder, *overrides, config=config, JAX_PROCESS_ID=str(i), **cluster) for i in range(2)
    ]


def test_two_processes_that_validate_can_be_resumed(tmp_path, start):
    options = ("steps=15", "eval.every=5", "eval.tasks=('retrieval',)")
    options += ("checkpoint.best=retrieval/i2t_r1",)
    runs = start_two(start, tmp_path, *options)
    wait_for_step(runs[0], tmp_path, 7)
    for run in runs:
        run.kill()
        wait_for_exit(run)
    results = [wait_for_exit(run) for run in start_two(start, tmp_path, *options)]
    assert [code for code, _ in results] == [0, 0], results
    assert "resumed at step" in results[0][1] and checkpoint.load_weights(tmp_path)["step"] == 15


def test_two_hosts_outlive_a_pause_a_signal_and_a_death(tmp_path, start):
    """Frozen for a minute, asked to stop, killed: no host waits for ever; the result is exact."""
    whole, hurt, options = tmp_path / "whole", tmp_path / "hurt", ("steps=400",)
    for folder in (whole, hurt):
        folder.mkdir()
    assert [wait_for_exit(run)[0] for run in start_two(start, whole, *options)] == [0, 0]

    runs = start_two(start, hurt, *options)
    wait_for_step(runs[0], hurt, 20)
    runs[1].send_signal(signal.SIGSTOP)
    time.sleep(60)
    runs[1].send_signal(signal.SIGCONT)
    wait_for_step(runs[0], hurt, 100)
    runs[1].send_signal(signal.SIGTERM)
    results = [wait_for_exit(run) for run in runs]
    assert [code for code, _ in results] == [0, 0], results

    runs = start_two(start, hurt, *options)
    wait_for_step(runs[0], hurt, 250)
    runs[1].kill()
    began = time.monotonic()
    code, output = wait_for_exit(runs[0])
    name = f"host 1 ({socket.gethostname()}, process {runs[1].pid}) has ended"
    assert code == 2 and name in output and "Traceback" not in output, output
    assert time.monotonic() - began < 60
    wait_for_exit(runs[1])

    results = [wait_for_exit(run) for run in start_two(start, hurt, *options)]
    assert [code for code, _ in results] == [0, 0], results
    assert read_fingerprint(hurt) == read_fingerprint(whole)
    assert read_metrics(hurt) == read_metrics(whole)


def test_hosts_with_different_commands_end_with_a_sentence(tmp_path, start):
    port = portpicker.pick_unused_port()
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    runs = [
        start(
            tmp_path,
            f"steps={3 + i}",
            config="configs/testing.py",
            JAX_PROCESS_ID=str(i),
            **cluster,
        )
        for i in range(2)
    ]
    for code, output in map(wait_for_exit, runs):
        assert code == 2 and "Traceback" not in output, output
        assert "does not have the config of host 0" in output and "config.steps 3, not 4" in output


def test_two_processes_train_and_save_one_checkpoint(tmp_path, start):
    runs = start_two(start, tmp_path)
    results = [wait_for_exit(run) for run in runs]
    assert [code for code, _ in results] == [0, 0], results
    weights = checkpoint.load_weights(tmp_path)
    steps = [path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()]
    assert (steps, weights["step"]) == (["3"], 3)
    assert checkpoint.fingerprint(weights["params"]) == read_fingerprint(tmp_path)
    assert len(read_metrics(tmp_path)) == 3
