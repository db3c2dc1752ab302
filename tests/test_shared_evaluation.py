"""Evaluations on several devices and hosts: their numbers are those of one device."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_evaluations import evaluate_fake_model, evaluate_fits, evaluate_maps
from test_evaluate import make_config, without_seconds
from test_parallel import start_cluster
from tiny_models import make_tiny_model

from plan_jax import evaluate, parallel
from plan_jax.heads import examples
from plan_jax.tasks import grounding

ROOT = Path(__file__).resolve().parent.parent


def to_lists(tree):
    """Returns a tree of lists and numbers, as JSON holds it."""
    return json.loads(json.dumps(jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), tree)))


def assert_close(actual, expected, tolerance=1e-5):
    """Compares two trees; numbers that are not defined must be so in both."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, value), other in zip(
        jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(actual), strict=True
    ):
        np.testing.assert_allclose(
            other, value, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_every_device_computes_its_part_of_the_examples(devices):
    @parallel.ExampleFunction
    def function(constants, chunk):
        return {"sum": chunk.sum(1) + constants, "rows": jnp.full(len(chunk), len(chunk))}

    values = np.arange(22.0).reshape(11, 2)
    with parallel.use_devices(devices):
        result = function(np.float32(3), values)
        assert parallel.num_devices_in_use() == devices
    assert result["sum"].tolist() == (values.sum(1) + 3).tolist()
    assert result["rows"].tolist() == [-(-11 // devices)] * 11
    assert parallel.num_devices_in_use() == 1


def test_more_devices_than_there_are_mean_all():
    with parallel.use_devices(99):
        assert parallel.num_devices_in_use() == 8


def test_chunks_have_their_size_on_every_device_or_in_all():
    sizes = []

    def function(chunk):
        sizes.append(len(chunk))
        return 2 * chunk

    with parallel.use_devices(8):
        for count in (3, 31, 32, 70):
            values = np.arange(count)
            assert examples.map_chunks(function, values, 4).tolist() == (2 * values).tolist()
    assert sizes == [8] + [8] * 4 + [32] + [32] * 3


def test_constants_are_copied_once():
    copies = parallel.Replicas({"a": np.arange(3)})
    with parallel.use_devices(8):
        array = copies.get()["a"]
        assert len(array.sharding.device_set) == 8 and copies.get()["a"] is array
    assert isinstance(copies.get()["a"], np.ndarray)


def test_no_examples_have_no_batches():
    assert examples.share_batches(len, 0, 4) == []


def test_hosts_join_their_rows_in_pieces(monkeypatch):
    """The third host has copies of the last example, which are left out."""
    values, calls = np.arange(14.0).reshape(7, 2), []
    parts = [values[rows] for rows in ([0, 1, 2], [3, 4, 5], [6, 6, 6])]

    def gather(content):
        first = 2 * len(calls)
        calls.append(content)
        return [part[first : first + 2].tobytes() for part in parts]

    monkeypatch.setattr(parallel, "_shares_examples", lambda: True)
    monkeypatch.setattr(parallel, "gather_bytes", gather)
    monkeypatch.setattr(parallel, "PIECE_BYTES", 2 * values[0].nbytes)
    np.testing.assert_array_equal(parallel.join_examples(parts[0], 7), values)
    assert calls == [parts[0][:2].tobytes(), parts[0][2:].tobytes()]


def test_models_of_a_method_share_its_programs():
    """Each validation of a run makes a model."""
    compiled = []
    images = np.zeros((2, 32, 32, 1), np.uint8)
    for model in (make_tiny_model(), make_tiny_model.__wrapped__()):
        features, texts = model.encode_image(images), model.encode_text(["heart", "lung"])
        # It cannot be removed again, and counts from the first model on.
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
        )
        compiled.clear()
        model.similarity(features, texts)
        model.heatmap(features, texts)
        model.pair_similarity(features, texts)
    assert not compiled


def test_maps_on_eight_devices():
    expected = evaluate_maps()
    with parallel.use_devices(8):
        assert_close(evaluate_maps(), expected)


def test_fits_on_eight_devices(tmp_path):
    """A batch of 12 has four parts, one of 7 one part; BatchNorm has the statistics of all."""
    with parallel.use_devices(8):
        results = evaluate_fits(tmp_path)
        assert_close(evaluate_fits(tmp_path), results, 0)  # read, and not fitted again
    assert_close(results, evaluate_fits())


def test_the_random_maps_of_records_do_not_depend_on_who_has_them():
    counts = [2, 0, 3, 1, 4]
    maps = np.random.default_rng(5).random((sum(counts), 2, 2), np.float32)
    noise = grounding.Noise(5, (2, 2), counts)
    own = [
        noise.start(*rows).random((n, 2, 2), np.float32) for rows, n in (((1, 3), 3), ((4, 5), 4))
    ]
    np.testing.assert_array_equal(np.concatenate(own), maps[[2, 3, 4, 6, 7, 8, 9]])


HOSTS_SCRIPT = """
    import json, pathlib, sys
    sys.path.insert(0, "tests")
    from plan_jax import parallel
    parallel.initialize()
    from shared_evaluations import evaluate_fake_model, evaluate_fits, evaluate_maps
    from test_shared_evaluation import to_lists
    with parallel.use_devices():
        results = {
            "maps": evaluate_maps(),
            "fits": evaluate_fits(pathlib.Path(sys.argv[1])),
            "fake": evaluate_fake_model(),
        }
        assert to_lists(evaluate_fits(pathlib.Path(sys.argv[1]))) == to_lists(results["fits"])
        content = bytes(range(256)) * 70_000 * (parallel.is_main() + 1)  # of several pieces
        sizes = [len(part) for part in parallel.gather_bytes(content)]
        assert sizes == [2 * 17_920_000, 17_920_000], sizes
        assert parallel.gather_bytes(content)[not parallel.is_main()] == content
    print(json.dumps(to_lists(results)))
"""


def test_two_hosts_share_the_examples(tmp_path):
    runs = start_cluster(HOSTS_SCRIPT, str(tmp_path))
    expected = {"maps": evaluate_maps(), "fits": evaluate_fits(), "fake": evaluate_fake_model()}
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    for out, _ in outputs:
        assert_close(json.loads(out.splitlines()[-1]), to_lists(expected))
    assert len(list(tmp_path.iterdir())) == 2  # one file for each fit


FAILING_SCRIPT = """
    import jax
    from plan_jax import command, parallel
    from plan_jax.types import UserError

    def compute(rows):
        if jax.process_index() == 1:
            raise UserError("record 7 is damaged")
        return {}

    def run():
        parallel.initialize()
        with parallel.report_lost_host(), parallel.use_devices():
            parallel.share_items([1, 2], lambda rows: {})
            parallel.share_items([1, 2], compute)

    parallel.leave(command.run(run))
"""


def test_an_error_on_one_host_ends_all():
    runs = start_cluster(FAILING_SCRIPT)
    outputs = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [2, 2], outputs
    assert outputs[1].splitlines()[-1] == "record 7 is damaged"
    assert "another host of this run has ended" in outputs[0] and "Traceback" not in "".join(
        outputs
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_a_model_on_eight_devices(data_dir):
    tasks = ("grounding", "retrieval", "zero_shot")
    results = {}
    for devices in (1, 8):
        config = make_config(data_dir, tasks=tasks)
        config = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, devices=devices)
        )
        result = evaluate.evaluate_model(make_tiny_model(), config, "test")
        results[devices] = without_seconds(result.metrics)
    assert_close(results[8], results[1])
