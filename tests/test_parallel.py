"""Devices: eight equal one, both implementations agree, mistakes are reported in a sentence."""

import functools
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import portpicker
import pytest
from flax import linen as nn
from jax._src import monitoring

from configs import testing
from plan_jax import parallel
from plan_jax.config import Config
from plan_jax.methods.contrastive import global_indices
from plan_jax.parallel import cluster, hosts
from plan_jax.train import train as train_config
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
OPTIMISER = optax.adamw(1e-2)


class Tower(nn.Module):
    """A tower with batch statistics, which must be those of all devices."""

    @nn.compact
    def __call__(self, x):
        # BatchNorm makes the gradient of a bias zero, and Adam would amplify its rounding error.
        x = nn.Dense(6, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=False, axis_name=parallel.AXIS)(x)
        return nn.Dense(4)(jnp.tanh(x))


def contrastive_loss(images, texts):
    """Returns the InfoNCE loss of this device's pairs against the pairs of all devices."""
    images, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    all_images, all_texts = (
        jax.lax.all_gather(x, parallel.AXIS, tiled=True) for x in (images, texts)
    )
    target = jax.lax.axis_index(parallel.AXIS) * len(images) + jnp.arange(len(images))
    scores = jnp.stack([images @ all_texts.T, texts @ all_images.T]) * 5
    return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.stack([target] * 2)).mean()


def step(state, batch):
    """A training step like that of `step.py`: gradients, statistics and loss are averaged."""

    def loss(params):
        variables = {"params": params, "batch_stats": state["batch_stats"]}
        images, new = Tower().apply(variables, batch["image"], mutable=["batch_stats"])
        return contrastive_loss(images, batch["text"] @ params["Dense_1"]["kernel"][:3]), new

    (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(state["params"])
    value, gradients = parallel.mean((value, gradients))
    updates, opt_state = OPTIMISER.update(gradients, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    state = {**new, "params": params, "opt_state": opt_state}
    return state, {"loss": value, "gradients": gradients}


def make_batch():
    """Returns sixteen pairs."""
    rng = np.random.default_rng(0)
    shapes = {"image": (16, 5), "text": (16, 3)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def train(devices, implementation="shard_map", steps=3):
    """Returns state and metrics on the host, after some steps on the given number of devices."""
    mesh = parallel.make_mesh(devices)
    variables = Tower().init(jax.random.key(0), jnp.ones((2, 5)))
    state = {**variables, "opt_state": OPTIMISER.init(variables["params"])}
    state = parallel.replicate(state, mesh)
    parallel_step = parallel.parallelise(step, mesh, implementation=implementation)
    for _ in range(steps):
        state, metrics = parallel_step(state, parallel.shard(make_batch(), mesh))
    return parallel.to_host(state), parallel.to_host(metrics)


@pytest.mark.parametrize("implementation", parallel.IMPLEMENTATIONS)
def test_eight_devices_equal_one(implementation):
    on_one, on_eight = train(1, implementation), train(8, implementation)
    chex.assert_trees_all_close(on_one, on_eight, rtol=0, atol=2e-6)
    magnitudes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(on_one[1]["gradients"])]
    # Otherwise the tolerance would hide a gradient that is 8 times too large.
    assert max(magnitudes) > 1e-2


@pytest.mark.parametrize("devices", [1, 8])
def test_both_implementations_agree(devices):
    by_shard_map, by_pmap = train(devices, "shard_map"), train(devices, "pmap")
    chex.assert_trees_all_close(by_shard_map, by_pmap, rtol=0, atol=1e-7)


def test_eight_devices_equal_a_step_without_collectives():
    _, metrics = train(8, steps=1)
    variables = Tower().init(jax.random.key(0), jnp.ones((2, 5)))
    batch = make_batch()

    def loss(params):
        variables_of_step = {"params": params, "batch_stats": variables["batch_stats"]}
        images, _ = Tower().apply(variables_of_step, batch["image"], mutable=["batch_stats"])
        images = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
        texts = batch["text"] @ params["Dense_1"]["kernel"][:3]
        texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
        scores = images @ texts.T * 5
        rows, columns = (-jnp.diag(jax.nn.log_softmax(scores, axis)).mean() for axis in (0, 1))
        return (rows + columns) / 2

    value, gradients = jax.vmap(
        jax.value_and_grad(loss), axis_size=1, axis_name=parallel.AXIS, in_axes=None
    )(variables["params"])
    expected = jax.tree.map(lambda x: x[0], {"loss": value, "gradients": gradients})
    chex.assert_trees_all_close(metrics, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", parallel.IMPLEMENTATIONS)
def test_donation_deletes_the_state_but_not_its_source(implementation):
    source = jnp.arange(3.0)
    parallel_step = parallel.parallelise(
        lambda s, b: (s + b.sum(), {}), implementation=implementation
    )
    state = parallel.replicate(source)
    new_state, _ = parallel_step(state, parallel.shard(np.ones(8, np.float32)))
    assert state.is_deleted() and not source.is_deleted()
    assert new_state.sharding.is_fully_replicated and new_state.tolist() == [1, 2, 3]


def test_counters_of_compiled_programs_share_one_listener():
    first, event = parallel.CompilationCounter(), "/jax/compilation_cache/cache_misses"
    num_listeners = len(monitoring.get_event_listeners())
    jax.monitoring.record_event(event)
    second = parallel.CompilationCounter()
    jax.monitoring.record_event(event)
    assert (first.compiled, second.compiled, second.cache_hits) == (2, 1, 0)
    assert len(monitoring.get_event_listeners()) == num_listeners


def test_steps_are_compiled_once():
    @chex.assert_max_traces(n=1)
    def step(state, batch):
        return jax.tree.map(lambda x: x + batch.mean(), state), {}

    parallel_step = parallel.parallelise(step)
    state = parallel.replicate((jnp.zeros(3), 2.0, jnp.log(2.0)))  # the last two are weakly typed
    for _ in range(3):
        state, _ = parallel_step(state, parallel.shard(np.ones(16, np.float32)))
    assert parallel_step._cache_size() == 1


def test_the_key_of_a_step_is_the_same_everywhere_and_an_index_belongs_to_one_example():
    key = jax.random.key(1)

    def random_numbers(state, batch):
        same = jax.random.uniform(parallel.step_key(state, 3))
        index = global_indices(len(batch), parallel.AXIS)
        return state, {"same": same, "index": jax.lax.all_gather(index, parallel.AXIS)}

    metrics = parallel.parallelise(random_numbers)(
        parallel.replicate(key), parallel.shard(np.ones(16))
    )[1]
    assert metrics["same"] == jax.random.uniform(parallel.step_key(key, 3))
    assert metrics["index"].tolist() == np.arange(16).reshape(8, 2).tolist()
    assert global_indices(16, None).tolist() == list(range(16))
    assert (parallel.step_key(key, 3) != parallel.step_key(key, 4)).all()


def test_one_process():
    batch = parallel.shard({"a": np.arange(16)})
    assert batch["a"].sharding.shard_shape((16,)) == (2,)
    assert parallel.to_host(batch)["a"].tolist() == list(range(16))
    assert parallel.is_main() and parallel.any_process(True) and not parallel.any_process(False)
    assert parallel.gather_strings("ä") == ["ä"]
    agreement = parallel.Agreement(parallel.make_mesh())
    flags = [(False, True), (True, False)]
    assert [agreement.any_process(*pair) for pair in flags] == flags
    parallel.barrier()
    parallel.initialize()


def test_flags_that_take_two_steps_share_one_array():
    agreement = parallel.Agreement(parallel.make_mesh())
    agreement.is_alone = False  # as with several processes
    calls = [(False, True), (False, False), (True, False), (True, True), (False, False)]
    answers = [agreement.any_process(*pair) for pair in calls]
    assert answers == [(False, False)] * 2 + calls[:3]


def test_print_once(monkeypatch, capsys):
    parallel.print_once("a sentence")
    monkeypatch.setattr(parallel, "is_main", lambda: False)
    parallel.print_once("another process")
    assert capsys.readouterr() == ("", "a sentence\n")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: parallel.split_batch(30, 8),
            "batch 30 is not divisible by 8 devices; use 24 or 32",
        ),
        (lambda: parallel.split_batch(4, 8), "batch 4 is not divisible by 8 devices; use 8$"),
        (lambda: parallel.split_batch(0, 8), "batch 0 is not divisible by 8 devices; use 8$"),
        (lambda: parallel.split_batch(-3, 2), "batch -3 is not divisible by 2 devices; use 2$"),
        (
            lambda: parallel.shard(np.ones(12)),
            "batch 12 is not divisible by 8 devices; use 8 or 16",
        ),
        (
            lambda: parallel.make_mesh(9),
            "parallel.devices is 9 but there are 8; use 1 to 8, or 0 for all",
        ),
        (
            lambda: parallel.make_mesh(-1),
            "parallel.devices is -1 but there are 8; use 1 to 8, or 0 for all",
        ),
        (
            lambda: parallel.parallelise(step, implementation="xmap"),
            "'xmap'; use shard_map or pmap",
        ),
    ],
)
def test_mistakes(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_the_plugin_of_cuda_is_missing(monkeypatch):
    def fail():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="JAX_PLATFORMS is cuda: .*no NVIDIA GPU.*; unset it, or"):
        parallel.configure_backend(1, "programs")


def test_the_device_that_is_used_instead_is_named(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    parallel.configure_backend(1, "programs")
    error = capsys.readouterr().err
    assert error.startswith("JAX_PLATFORMS is cuda,cpu: ") and error.endswith("; using cpu\n")


@pytest.mark.parametrize(
    ("has_gpu", "num_tpus", "sentence"),
    [
        (True, 0, r"this machine has an NVIDIA GPU, and JAX uses its CPU; .*jax\[cuda12\]'.*=cpu"),
        (False, 4, r"this machine has a TPU, and JAX uses its CPU; pip install -U 'jax\[tpu\]'"),
        (False, 0, ""),
    ],
)
def test_an_accelerator_that_is_not_used_is_a_mistake(
    has_gpu, num_tpus, sentence, monkeypatch, tmp_path
):
    (tmp_path / "nvidia0").touch()
    path = tmp_path / ("nvidia0" if has_gpu else "none")
    monkeypatch.setattr(parallel, "NVIDIA_DEVICES", str(path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    count = (num_tpus, "0x0063")
    monkeypatch.setattr(
        parallel.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: count
    )
    parallel.configure_backend(1, "programs")  # JAX_PLATFORMS is cpu in tests
    if not sentence:
        return parallel._require_accelerators()
    with pytest.raises(UserError, match=sentence):
        parallel._require_accelerators()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    if has_gpu:
        parallel._require_accelerators()


CACHE = """
import os, sys, jax
from plan_jax import parallel
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
for cache in sys.argv[1:]:
    parallel.configure_backend(1, cache)
    jax.jit(lambda x: x @ x.T)(jax.numpy.ones((3, 3))).block_until_ready()
    assert any(name.endswith("-cache") for name in os.listdir(cache)), cache
"""


def test_programs_are_cached_whatever_ran_before(tmp_path):
    """A notebook loads a model, then trains: JAX would ignore the folder of the run."""
    environment = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    # JAX stores no program that compiles within a second.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-c", CACHE, str(tmp_path / "a"), str(tmp_path / "b")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(("name", "value"), [("JAX_PROCESS_ID", "one"), ("JAX_NUM_PROCESSES", "")])
def test_incomplete_cluster_variables(monkeypatch, name, value):
    variables = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    for variable, setting in {**variables, name: value}.items():
        monkeypatch.setenv(variable, setting)
    with pytest.raises(
        UserError, match=f"{name} is (one|not set); a run on several hosts needs JAX_COO"
    ):
        parallel.initialize()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2 and JAX_NUM_PROCESSES is 2; use 0 to 1"),
        ({"JAX_COORDINATOR_ADDRESS": "h"}, "JAX_COORDINATOR_ADDRESS is h; must be the host 0 and"),
        ({"PLAN_JAX_START_TIMEOUT": "soon"}, "PLAN_JAX_START_TIMEOUT is soon; must be a number"),
        ({"JAX_DISTRIBUTED": "yes"}, "JAX_DISTRIBUTED is yes; use auto or off, or unset it"),
    ],
)
def test_wrong_cluster_variables(monkeypatch, changes, sentence):
    variables = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    for variable, setting in {**variables, **changes}.items():
        monkeypatch.setenv(variable, setting)
    with pytest.raises(UserError, match=sentence):
        parallel.initialize()
    monkeypatch.setenv("JAX_DISTRIBUTED", "off")
    parallel.initialize()  # this process is alone


SLURM = {
    **{"SLURM_JOB_ID": "5", "SLURM_STEP_NODELIST": "node[3-4],other", "SLURM_STEP_NUM_NODES": "3"},
    **{"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
}
SLURM_SCRIPT = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NUM_TASKS"}
OPEN_MPI = {
    **{"OMPI_MCA_orte_hnp_uri": "9732096.0;tcp://10.0.0.1,10.1.0.1:34911"},
    **{"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (SLURM, ("node3:61445", 4, 1)),
        ({**SLURM, "JAX_COORDINATOR_PORT": "777"}, ("node3:777", 4, 1)),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "h:1"}, ("h:1", 4, 1)),
        # The script of a job before it calls srun, and the shell of salloc: one task of four.
        (SLURM_SCRIPT, None),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ("", 1, 0)),
        ({**SLURM_SCRIPT, **OPEN_MPI}, ("10.0.0.1:63816", 2, 1)),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "odd"}, ("", 1, 0)),
        ({"TPU_PROCESS_ADDRESSES": "local"}, ("", 1, 0)),
    ],
)
def test_clusters_are_found_without_a_variable(monkeypatch, variables, expected):
    for variable, setting in variables.items():
        monkeypatch.setenv(variable, setting)
    assert cluster._find_cluster(False) == (expected and cluster._Cluster(*expected))


def test_a_cluster_that_does_not_answer_is_named(monkeypatch, capsys):
    def ask(count, address, *_):
        if address is None or not count:
            raise RuntimeError(f"Failed to recognize {address}\nmore")
        return address, count, 0, []

    def answer(count):
        detect = functools.partial(ask, count)
        monkeypatch.setattr(
            cluster.clusters.ClusterEnv, "auto_detect_unset_distributed_params", detect
        )

    answer(0)
    parallel.initialize()  # as in a pod that may not ask Kubernetes
    error = capsys.readouterr().err
    assert re.search(
        r"cannot count .* \(Failed to recognize \), and this one .*DISTRIBUTED=off", error
    )
    monkeypatch.setenv("JAX_DISTRIBUTED", "auto")
    with pytest.raises(UserError, match=r"cannot count .* \(Failed to recognize \); set JAX_COOR"):
        parallel.initialize()
    answer(1)
    parallel.initialize()  # alone, it needs no address
    answer(4)
    with pytest.raises(UserError, match=rf"{hosts.LOST}: JAX cannot find host 0 of 4 \(Failed"):
        parallel.initialize()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"JAX_DISTRIBUTED": "auto"}, "JAX_DISTRIBUTED is auto, and JAX finds neither SLURM, Open"),
        ({**SLURM, "JAX_COORDINATOR_PORT": "x"}, "JAX_COORDINATOR_PORT is x; must be a number"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES is not set; a run on several ho"),
    ],
)
def test_clusters_that_cannot_be_joined(monkeypatch, variables, sentence):
    for variable, setting in variables.items():
        monkeypatch.setenv(variable, setting)
    with pytest.raises(UserError, match=sentence):
        parallel.initialize()


CLUSTER_SCRIPT = """
    import jax, numpy as np
    from plan_jax import parallel
    from plan_jax.types import UserError
    parallel.initialize()
    process = jax.process_index()
    def step(state, batch):
        gathered = jax.lax.all_gather(batch, parallel.AXIS, tiled=True)
        return state + parallel.mean(batch.mean()), {"all": gathered}
    for implementation in parallel.IMPLEMENTATIONS:
        state = parallel.replicate(np.zeros(2, np.float32))
        parallel_step = parallel.parallelise(step, implementation=implementation)
        batch = np.arange(4, dtype=np.float32) + 4 * process
        for _ in range(2):
            state, metrics = parallel_step(state, parallel.shard(batch))
        assert parallel.to_host(state).tolist() == [7, 7]
        assert parallel.to_host(metrics)["all"].tolist() == list(range(8))
        assert parallel.to_host(parallel.shard(batch)).tolist() == list(range(8))
    assert parallel.any_process(process == 1) and not parallel.any_process(False)
    agreement = parallel.Agreement(parallel.make_mesh())
    raised = [(process == 1 and call == 3, process == 0 and call == 2) for call in range(7)]
    flags = [agreement.any_process(*pair) for pair in raised]
    expected = [(False, False)] * 4 + [(False, True), (True, False), (False, False)]
    assert flags == expected, flags
    assert parallel.gather_strings("x" * (process + 1)) == ["x", "xx"]
    assert parallel.ask_main(lambda: [process, "x"]) == [0, "x"]
    refusal = ""
    try:
        parallel.ask_main(lambda: parallel.split_batch(process, 0 * process + 2))
    except UserError as error:
        refusal = str(error)
    assert refusal == "batch 0 is not divisible by 2 devices; use 2"
    arrays = {
        "bits": np.array([-0.0, np.nan, 2.0**-149, process], np.float32),
        "large": np.full(9_000_000, 1.5 + process, jax.numpy.bfloat16),  # of two pieces
        "number": np.int32(3 + process),
    }
    sent = parallel.broadcast(arrays)
    assert sent["bits"].tobytes() == np.array([-0.0, np.nan, 2.0**-149, 0], np.float32).tobytes()
    assert sent["large"].dtype == "bfloat16" and (sent["large"] == 1.5).all()
    assert sent["number"] == 3
    parallel.barrier()
    print("done", parallel.is_main())
"""


LOST_HOST_SCRIPT = """
    import sys, time, numpy as np
    from plan_jax import command, parallel

    def run():
        parallel.initialize()
        parallel.any_process(False)  # compiles, and connects the hosts
        print("ready", flush=True)
        if sys.argv[1] == "waits":
            time.sleep(60)  # without a word from JAX to this thread
        with parallel.report_lost_host():
            while True:
                parallel.any_process(False)

    parallel.leave(command.run(run))
"""


def start_cluster(script, *arguments):
    """Starts two processes of one cluster, with two devices each."""
    port = portpicker.pick_unused_port()
    flags = "--xla_force_host_platform_device_count=2"
    variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *arguments],
            cwd=ROOT,
            env={**os.environ, **variables, "XLA_FLAGS": flags, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def test_two_processes():
    runs = start_cluster(CLUSTER_SCRIPT)
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [out.splitlines()[-1:] for out, _ in outputs] == [["done True"], ["done False"]], outputs


@pytest.mark.parametrize(("victim", "state"), [(0, "works"), (0, "waits"), (1, "works")])
def test_a_process_whose_host_is_lost_ends_with_a_sentence(victim, state):
    runs = start_cluster(LOST_HOST_SCRIPT, state)
    for run in runs:
        # Gloo prints too, and may do so in the middle of a line of an unbuffered stream.
        while (line := run.stdout.readline()) and "ready" not in line:
            pass
    runs[victim].kill()
    _, error = runs[1 - victim].communicate(timeout=60)
    runs[victim].communicate()
    name = f"host {victim} ({socket.gethostname()}, process {runs[victim].pid}) has ended"
    assert (runs[1 - victim].returncode, error.strip()) == (2, hosts.lost_sentence(name))


DONE_SCRIPT = """
    import os, time
    from plan_jax import parallel
    from plan_jax.parallel import hosts

    hosts.GRACE = 1.0
    parallel.initialize()
    parallel.barrier()
    is_failed = os.environ["JAX_PROCESS_ID"] == "0"
    time.sleep(2 * is_failed)
    parallel.leave(int(is_failed))
"""


def test_a_process_that_is_done_does_not_fail_with_another():
    """As when host 0 evaluates alone, and a head diverges: the others have nothing left to do."""
    runs = start_cluster(DONE_SCRIPT)
    outputs = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [1, 0], outputs
    assert hosts.LOST not in "".join(outputs)


KERNEL_SCRIPT = """
    import sys, time
    from plan_jax import command, parallel
    from plan_jax.parallel import hosts

    hosts.GRACE = 1.0

    def run():
        parallel.initialize()
        with parallel.report_lost_host():
            parallel.any_process(False)
            time.sleep(float(sys.argv[2]) if not parallel.is_main() else 0)

    assert command.run(run) == 0
    is_closed = parallel.is_main() == (sys.argv[1] == "0")
    print("closed" if is_closed else "open", flush=True)
    if not is_closed:
        time.sleep(6)
        print(command.run(run), flush=True)
"""


@pytest.mark.parametrize(("victim", "seconds"), [(0, 0), (0, 4), (1, 0)])
def test_a_kernel_that_is_closed_after_a_run_ends_no_other(victim, seconds):
    """Not while the other one is still at the end of the run, either."""
    runs = start_cluster(KERNEL_SCRIPT, str(victim), str(seconds))
    out, error = runs[1 - victim].communicate(timeout=90)
    lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
    assert runs[1 - victim].returncode == 0 and lines[-2:] == ["open", "2"], error
    name = f"host {victim} ({socket.gethostname()}, process {runs[victim].pid}) has ended"
    assert error.splitlines()[-1].endswith(f"{name}; restart the kernels of all hosts"), error
    runs[victim].kill()  # JAX waits for the others at its exit, as long as Jupyter lets it
    runs[victim].communicate()


def test_bfloat16_needs_a_card_that_has_it(tmp_path, monkeypatch):
    def device(**attributes):
        return SimpleNamespace(device_kind="Tesla T4", **attributes)

    t4 = device(compute_capability="7.5")
    with pytest.raises(UserError, match=r"Tesla T4 .*7\.5.* use config.dtype=float32"):
        parallel.require_dtype("bfloat16", [device(compute_capability="8.0"), t4])
    parallel.require_dtype("float32", [t4])
    for capability in ("8.0", "8.9", "9.0", "10.0", "12.1", "gfx90a"):
        parallel.require_dtype("bfloat16", [device(compute_capability=capability)])
    parallel.require_dtype("bfloat16", [device(), *jax.devices()])  # TPUs and CPUs

    # A run stops before it opens any data or writes anything.
    mesh = SimpleNamespace(devices=np.array([t4]), size=1)
    monkeypatch.setattr(parallel, "make_mesh", lambda count=None: mesh)
    config = Config.from_dict(testing.get_config().to_dict() | {"dtype": "bfloat16"})
    with pytest.raises(UserError, match="does not have"):
        train_config(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
