"""Every task on eight devices, and on two hosts with two devices each, has the numbers of one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import portpicker
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TASKS = {
    "grounding": {"bootstrap_samples": 20, "smooth": 1.0},
    "retrieval": {"bootstrap_samples": 20},
    "zero_shot": {"bootstrap_samples": 20, "validate": True},
    "classification": {"bootstrap_samples": 20, "fractions": [1.0, 0.5], "epochs": 2, "batch": 12},
    "segmentation": {
        **{"bootstrap_samples": 20, "targets": ["lungs", "findings"], "epochs": 2},
        **{"unet_widths": [8, 8, 8, 8, 8], "num_examples": 1},
    },
    "detection": {"bootstrap_samples": 20, "epochs": 2, "widths": [8, 8, 8], "min_score": 0.0},
    "report_generation": {
        **{"epochs": 2, "width": 16, "feed_forward": 16, "heads": 2, "layers": 1},
        **{"encoder_layers": 1, "max_length": 12, "min_count": 1},
    },
}
RUNS = {
    "frozen": TASKS,
    "finetune": {
        name: TASKS[name] | {"mode": "finetune"}
        for name in ("classification", "segmentation", "detection", "report_generation")
    },
}
SCRIPT = """
import dataclasses, json, pathlib, sys
sys.path.insert(0, "tests")
from plan_jax import parallel
parallel.initialize()
import jax
from configs import testing
from plan_jax import evaluate
from plan_jax.config import Config
from tiny_models import make_tiny_model

folder, devices, tasks = pathlib.Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
values = testing.get_config().to_dict()
values["data"]["dir"] = sys.argv[4]
values["eval"] |= {"tasks": tuple(tasks), "random_baseline": False} | tasks
config = Config.from_dict(values)
config = dataclasses.replace(
    config, parallel=dataclasses.replace(config.parallel, devices=devices)
)
with parallel.report_lost_host():
    result = evaluate.evaluate_model(make_tiny_model(), config, "test", folder)
    parallel.barrier()
metrics = {key: value for key, value in result.metrics.items() if "seconds" not in key}
print(json.dumps({"metrics": metrics, "devices": len(jax.devices()), "rows": len(result.rows)}))
"""
HOSTS, DEVICES = 2, 2


def launch(data, folder, tasks, devices, visible, **environment):
    """Starts an evaluation in its own process."""
    flags = f"--xla_force_host_platform_device_count={visible}"
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(devices), json.dumps(tasks), str(data)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_result(run):
    """Waits for an evaluation, and returns what it printed."""
    out, err = run.communicate(timeout=1200)
    assert run.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def compare(actual, expected):
    """Checks that metrics are equal to 1e-5; the longest list of those that are not is shown."""
    assert actual.keys() == expected.keys()
    different = {
        key: (actual[key], value)
        for key, value in expected.items()
        if not math.isclose(actual[key], value, rel_tol=1e-5, abs_tol=1e-5)
        and not (math.isnan(actual[key]) and math.isnan(value))
    }
    assert not different


@pytest.mark.parametrize("name", RUNS)
def test_eight_devices_and_two_hosts_have_the_numbers_of_one_device(name, tmp_path):
    tasks, data = RUNS[name], tmp_path / "data"
    alone = read_result(launch(data, tmp_path / "alone", tasks, 1, 1))
    eight = read_result(launch(data, tmp_path / "eight", tasks, 0, 8))
    port = portpicker.pick_unused_port()
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(HOSTS)}
    runs = [
        launch(data, tmp_path / "hosts", tasks, 0, DEVICES, JAX_PROCESS_ID=str(index), **cluster)
        for index in range(HOSTS)
    ]
    hosts = [read_result(run) for run in runs]
    assert [result["devices"] for result in (alone, eight, *hosts)] == [1, 8, 4, 4]
    assert hosts[0] == hosts[1]
    for result in (eight, hosts[0]):
        compare(result["metrics"], alone["metrics"])
        assert result["rows"] == alone["rows"]
    # Of several hosts, one writes.
    names = [path.name.partition("-")[0] for path in (tmp_path / "hosts/fits").iterdir()]
    assert sorted(names) == sorted(
        path.name.partition("-")[0] for path in (tmp_path / "alone/fits").iterdir()
    )
