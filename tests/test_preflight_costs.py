"""Operations, traffic, memory and time of programs whose figures are known by hand."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import testing
from plan_jax.config import Config
from plan_jax.preflight import hlo
from plan_jax.preflight.collectives import Collective
from plan_jax.preflight.flops import count_flops
from plan_jax.preflight.memory import (
    Memory,
    format_bytes,
    measure_memory,
    suggest_remedies,
    tree_bytes,
)
from plan_jax.preflight.roofline import FLOPS_SHARE, HOP_SECONDS, LINK_SHARE, estimate, sent_bytes
from plan_jax.preflight.topology import CHIPS, GIB, SLICES, parse_topology
from plan_jax.preflight.traffic import count_traffic
from plan_jax.types import UserError

V5E = CHIPS["TPU v5 lite"]


# Operations -------------------------------------------------------------------------------------


def test_a_product_counts_twice_its_multiplications():
    left, right = jnp.ones((5, 3, 7)), jnp.ones((5, 7, 2))
    assert count_flops(jnp.matmul, left, right) == 2 * 5 * 3 * 7 * 2


def test_a_loop_counts_as_often_as_it_runs_and_xla_counts_it_once():
    def step(x, _):
        return jnp.tanh(x @ x), None

    def function(x):
        return jax.lax.scan(step, x, length=6)[0]

    matrix = jnp.ones((8, 8))
    product = 2 * 8**3
    assert count_flops(function, matrix) == 6 * product
    compiled = jax.jit(function).lower(matrix).compile()
    assert compiled.cost_analysis()["flops"] < 2 * product


def test_a_gradient_with_remat_computes_the_layer_again():
    def layer(weight, x):
        return jnp.tanh(jnp.tanh(x @ weight) @ weight).sum()

    weight, x, product = jnp.ones((8, 8)), jnp.ones((4, 8)), 2 * 4 * 8 * 8
    # Two products forward; backward two for the weights and one for the hidden layer.
    assert count_flops(jax.grad(layer), weight, x) == 5 * product
    assert count_flops(jax.grad(jax.checkpoint(layer)), weight, x) == 7 * product


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients_cost_the_same_each(stride):
    def convolve(image, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (stride, stride), "SAME", dimension_numbers=numbers
        )

    image, kernel = jnp.ones((4, 32, 32, 8)), jnp.ones((3, 3, 8, 16))
    forward = 2 * 4 * (32 // stride) ** 2 * 16 * 9 * 8
    assert count_flops(convolve, image, kernel) == forward
    both = jax.grad(lambda image, kernel: (convolve(image, kernel) ** 2).sum(), (0, 1))
    assert count_flops(both, image, kernel) == 3 * forward
    # XLA leaves out the taps that fall into the padding.
    counted = jax.jit(convolve).lower(image, kernel).compile().cost_analysis()["flops"]
    assert 0.9 * forward < counted < forward


def test_a_conditional_counts_its_larger_branch_and_devices_count_alone():
    def choose(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert count_flops(choose, jnp.ones((4, 4))) == 2 * 2 * 4**3
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("devices",))
    spec = jax.sharding.PartitionSpec("devices")
    mapped = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert count_flops(mapped, jnp.ones((8, 16))) == 2 * 2 * 2 * 16


# Traffic ----------------------------------------------------------------------------------------


def compiled_traffic(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return count_traffic(hlo.parse(compiled.as_text())), compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize(
    "function", [lambda x: x + 1, jnp.sum, lambda x: jnp.tanh(x @ x), lambda x: jnp.sin(x).T @ x]
)
def test_traffic_without_loops_is_that_of_xla(function):
    traffic, xla = compiled_traffic(function, jnp.ones((256, 256)))
    assert traffic == pytest.approx(xla, rel=0.02)


def test_a_loop_moves_a_row_each_time_and_not_the_array():
    def step(total, row):
        return jnp.tanh(total) + row, total.sum()

    array = jnp.ones((64, 1024))
    traffic, _ = compiled_traffic(lambda x: jax.lax.scan(step, jnp.zeros(1024), x), array)
    # Each of the 64 runs reads a row and the carry, and writes the carry, a few times over.
    assert 3 * array.nbytes <= traffic < 12 * array.nbytes


FUSIONS = """HloModule jit_step

%slice (p0: f32[64,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[64,128]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %row = f32[1,128]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,128}
}

%update (q0: f32[64,128], q1: f32[1,128], q2: s32[]) -> f32[64,128] {
  %q0 = f32[64,128]{1,0} parameter(0)
  %q1 = f32[1,128]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %new = f32[64,128]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}

ENTRY %main (a: f32[64,128], i: s32[]) -> f32[64,128] {
  %a = f32[64,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %fast = f32[64,128]{1,0:T(8,128)S(1)} copy(%a)
  %row.1 = f32[1,128]{1,0} fusion(%a, %i), kind=kLoop, calls=%slice
  %view = f32[128]{0} bitcast(%row.1)
  ROOT %out = f32[64,128]{1,0} fusion(%a, %row.1, %i), kind=kLoop, calls=%update
}
"""


def test_slices_updates_in_place_and_the_scratchpad():
    row, array, index = 128 * 4, 64 * 128 * 4, 4
    copied = array  # read from the memory, written to the scratchpad
    sliced = row + index + row
    updated = row + index + row
    assert count_traffic(hlo.parse(FUSIONS)) == copied + sliced + updated


# Memory -----------------------------------------------------------------------------------------


def make_state():
    weights = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(5, jnp.bfloat16)}
    return types.SimpleNamespace(
        step=jnp.zeros((), jnp.int32),
        key=jnp.zeros(2, jnp.uint32),
        params=weights,
        batch_stats={},
        opt_state=(weights, weights),
        memory={},
        ema_params={},
    )


def test_memory_by_kind_adds_up_to_what_the_compiler_says():
    statistics = types.SimpleNamespace(
        argument_size_in_bytes=300,
        output_size_in_bytes=210,
        alias_size_in_bytes=200,
        temp_size_in_bytes=1000,
        generated_code_size_in_bytes=50,
    )
    memory = measure_memory(statistics, make_state(), jnp.ones(7, jnp.uint8), 2000.0)
    assert memory.kinds == {
        "parameters": 58,
        "optimiser state": 116,
        "moving average": 0,
        "other state": 12,
        "batch": 7,
        "padding": 300 - 58 - 116 - 12 - 7,
        "temporaries": 1000,
        "outputs": 10,
        "program": 50,
    }
    assert memory.total == 300 + 10 + 1000 + 50 and memory.fits
    assert not dataclasses.replace(memory, limit=1000.0).fits
    assert dataclasses.replace(memory, limit=0.0).fits is None


def test_bytes_of_a_tree():
    assert tree_bytes(make_state().params) == 12 * 4 + 5 * 2


def make_config(**values):
    return Config.from_dict(testing.get_config().to_dict() | values)


def make_memory(temporaries, limit, state=2 * GIB):
    return Memory({"parameters": state, "temporaries": temporaries}, limit)


def test_the_remedies_come_in_the_order_in_which_to_try_them():
    memory = make_memory(temporaries=32 * GIB, limit=10 * GIB)  # 1 GiB for each of 32 pairs
    remedies = suggest_remedies(memory, make_config(batch=32), pairs=32)
    names = ["config.microbatch=8: about 10 GiB", "config.vision.remat=True and config.text.remat"]
    names += ["config.dtype=bfloat16", "a batch of at most 8 pairs"]
    assert len(remedies) == len(names)
    for remedy, name in zip(remedies, names, strict=True):
        assert remedy.startswith(name)


def test_what_is_set_already_is_no_remedy():
    values = {"vision": {"name": "resnet_tiny", "remat": True}, "dtype": "bfloat16"}
    memory = make_memory(temporaries=32 * GIB, limit=3 * GIB)
    remedies = suggest_remedies(memory, make_config(batch=4, **values), pairs=4)
    text = "\n".join(remedies)
    assert "microbatch=1 alone is not enough" in text and "config.text.remat=True" in text
    assert "vision.remat" not in text and "bfloat16" not in text and "a batch of" not in text


def test_with_microbatches_a_smaller_batch_is_no_remedy():
    memory = make_memory(temporaries=8 * GIB, limit=4 * GIB)  # of 8 pairs at a time
    remedies = suggest_remedies(memory, make_config(batch=32, microbatch=8), pairs=32)
    assert remedies[0].startswith("config.microbatch=2: about 4 GiB")
    assert not any("a batch of" in remedy for remedy in remedies)


def test_a_state_that_does_not_fit_alone_needs_smaller_encoders():
    memory = make_memory(temporaries=GIB, limit=GIB)
    (remedy,) = suggest_remedies(memory, make_config(batch=4), pairs=4)
    assert "2 GiB" in remedy and "smaller encoders" in remedy


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2.5 * GIB, "2.5 GiB")]
)
def test_bytes_are_formatted(size, text):
    assert format_bytes(size) == text


# Time -------------------------------------------------------------------------------------------


def test_what_a_ring_sends():
    """Of N devices, each passes on what it has until all have it, chunk by chunk."""
    devices, size = 4, 1200
    rounds = devices - 1
    assert sent_bytes("all-gather", size, devices) == rounds * size
    chunk = size / devices
    assert sent_bytes("reduce-scatter", size, devices) == rounds * chunk
    assert sent_bytes("all-reduce", size, devices) == 2 * rounds * chunk
    assert sent_bytes("all-to-all", size, devices) == rounds * chunk
    assert sent_bytes("collective-permute", size, devices) == size


def test_the_slowest_of_three_limits_a_step():
    options = {"dtype": "bfloat16", "shape": (2, 4), "devices": 8, "images": 64}
    reduced = {"all-reduce": Collective(10, 8 * 10**6)}
    times = estimate(V5E, flops=197e9, traffic=819e3, collectives=reduced, **options)
    assert times.best["compute"] == pytest.approx(1e-3)
    assert times.best["memory"] == pytest.approx(1e-6)
    assert times.best["interconnect"] == pytest.approx(2 * 7 / 8 * 8e6 / 200e9)
    # Twice around rows and columns of 2 and 4 chips: 1 + 3 steps each.
    latency = 10 * 2 * 4 * HOP_SECONDS
    expected = times.best["interconnect"] / LINK_SHARE + latency
    assert times.seconds["interconnect"] == pytest.approx(expected)
    assert times.limit == "compute"
    assert times.images_per_second == pytest.approx(64 / (1e-3 / FLOPS_SHARE))
    slow = estimate(V5E, flops=1e9, traffic=819e9, collectives={}, **options)
    assert slow.limit == "memory"


def test_float32_on_a_gpu_is_slower_and_one_device_exchanges_nothing():
    options = {"shape": (1,), "devices": 1, "images": 8, "collectives": {}, "traffic": 0.0}
    chip = CHIPS["L4"]
    single = estimate(chip, dtype="float32", flops=60e12, **options)
    assert single.best == {"compute": pytest.approx(1.0), "memory": 0.0}
    half = estimate(chip, dtype="bfloat16", flops=121e12, **options)
    assert half.best["compute"] == pytest.approx(1.0)


# Slices -----------------------------------------------------------------------------------------


def test_a_slice_has_as_many_chips_as_its_name_says():
    for name in SLICES:
        kind, shape = parse_topology(name)
        number = int(name.rpartition("-")[2])
        assert np.prod(shape) == (number // 2 if kind in ("v4", "v5p") else number)
        assert parse_topology(f"{kind}:{'x'.join(map(str, shape))}") == (kind, shape)


@pytest.mark.parametrize(
    "name", ["v5e", "v5e-3", "v9:2x2", "v5e:2x2x2", "v4:2x2", "v5e:3x3", "v5e:32x32", "v5e:axb", ""]
)
def test_an_unknown_slice_is_a_sentence_with_those_that_exist(name):
    with pytest.raises(UserError, match=r"v5e-8.*v5e:2x4"):
        parse_topology(name)
