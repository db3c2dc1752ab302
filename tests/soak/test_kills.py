"""Runs that are killed again and again, at any moment, end like an uninterrupted one.

`KILLS=20 make soak` kills a run twenty times; without it there are four kills, one of each kind.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from plan_jax import checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
KILLS = int(os.environ.get("KILLS", "4"))
STEPS = 12
FIELDS = {
    **{"steps": STEPS, "log_every": 1, "checkpoint.every": 3, "checkpoint.minutes": 0.02},
    **{"eval.tasks": "('retrieval','grounding')", "data.workers": 1},
}
ENVIRONMENT = {"XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
TIMEOUT = 600  # seconds
# Not results: they depend on the clock and on how often a run was started.
TIMES = ("per_s", "_s", "seconds", "images_per", "compiled", "cache")


def start(folder, data):
    """Starts a run in a process group of its own."""
    argv = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    command = [sys.executable, "-m", "plan_jax.main", "--config=configs/testing.py"]
    return subprocess.Popen(
        [*command, f"--workdir={folder}", f"--config.data.dir={data}", *argv],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(run, condition):
    """Waits until a condition holds, or the run has ended."""
    deadline = time.monotonic() + TIMEOUT
    while not condition() and run.poll() is None:
        assert time.monotonic() < deadline, "the moment for the kill did not come"
        time.sleep(0.002)


def list_children(run):
    """Returns the processes that a run has started and that still run."""
    try:
        return psutil.Process(run.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def read_results(folder):
    """Returns the fingerprint and all metrics of a run that do not depend on the clock."""

    def drop_times(value):
        if not isinstance(value, dict):
            return value
        return {k: drop_times(v) for k, v in value.items() if not k.endswith(TIMES)}

    return drop_times(json.loads((folder / "metrics.json").read_text()))


def kill(run, name, folder, data, moment, delay):
    """Kills a run at a moment of a kind; returns whether it still ran."""
    checkpoints = folder / checkpoint.FOLDER
    conditions = {
        "preparation": lambda: any(data.rglob("*incomplete*")),
        "save": lambda: any("tmp" in path.name for path in checkpoints.glob("*")),
        "evaluation": lambda: (checkpoints / str(STEPS)).exists(),
        "any": lambda: time.monotonic() > moment,
    }
    wait_until(run, conditions[name])
    if name != "any":
        time.sleep(delay)
    children = list_children(run)
    is_killed = run.poll() is None
    run.send_signal(signal.SIGKILL)
    output = run.communicate(timeout=TIMEOUT)[0]
    assert "Traceback" not in output, output
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, f"{alive} outlived a killed run ({name})"
    return is_killed


def test_a_run_that_is_killed_at_any_moment_ends_like_one_that_is_not(tmp_path):
    whole, data, rng = tmp_path / "whole", tmp_path / "data", random.SystemRandom()
    began = time.monotonic()
    output = start(whole, data).communicate(timeout=TIMEOUT)[0]
    duration = time.monotonic() - began
    expected = read_results(whole)
    log, num_kills, num_runs = [], 0, 0
    while num_kills < KILLS:
        # A run that comes to its end is compared, and another one begins.
        num_runs += 1
        folder, is_killed = tmp_path / f"killed_{num_runs}", True
        while is_killed and num_kills < KILLS:
            name = ("preparation", "save", "evaluation", "any")[num_kills % 4]
            if name == "preparation":
                shutil.rmtree(data)  # it is drawn again, the same
            moment = time.monotonic() + rng.uniform(0, duration)
            is_killed = kill(start(folder, data), name, folder, data, moment, rng.uniform(0, 0.3))
            num_kills += is_killed
            log.append((num_runs, name, "killed" if is_killed else "ended"))
        run = start(folder, data)
        output = run.communicate(timeout=TIMEOUT)[0]
        assert run.returncode == 0, (output, log)
        assert read_results(folder) == expected, log
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == sorted(set(steps)), log
    print(*log, sep="\n")
