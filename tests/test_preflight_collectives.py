"""Collectives of compiled programs, of this machine and as XLA prints them for others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from plan_jax.preflight.collectives import Collective, list_collectives
from plan_jax.preflight.hlo import shape_bytes

AXIS = "devices"
RING = [(i, (i + 1) % 4) for i in range(4)]


def compile_text(function, *arguments, specs, devices=4):
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def test_each_kind_of_a_real_program_is_found_with_the_bytes_of_one_device():
    def function(x):  # [2 16] on each device
        gathered = jax.lax.all_gather(x, AXIS)  # of 2 * 16 floats
        scattered = jax.lax.psum_scatter(gathered, AXIS)  # of 4 * 2 * 16
        moved = jax.lax.ppermute(scattered, AXIS, RING)
        split = jax.lax.all_to_all(gathered, AXIS, 0, 0)
        return jax.lax.psum(moved.sum() + split.sum(), AXIS)  # of one float

    text = compile_text(function, jnp.ones((8, 16)), specs=PartitionSpec(AXIS))
    assert list_collectives(text) == {
        "all-gather": Collective(1, 128),
        "all-reduce": Collective(1, 4),
        "reduce-scatter": Collective(1, 512),
        "collective-permute": Collective(1, 128),
        "all-to-all": Collective(1, 512),
    }


def test_a_loop_counts_as_often_as_it_runs():
    def inner(x, _):
        return jax.lax.psum(x, AXIS) * 0.1, None

    def outer(x, _):
        x = jax.lax.ppermute(x, AXIS, RING)
        return jax.lax.scan(inner, x, length=3)[0], None

    def function(x):
        return jax.lax.scan(outer, x, length=7)[0]

    text = compile_text(function, jnp.ones((8, 16)), specs=PartitionSpec(AXIS))
    assert list_collectives(text) == {
        "all-reduce": Collective(21, 21 * 128),
        "collective-permute": Collective(7, 7 * 128),
    }


def test_one_device_sends_nothing():
    text = compile_text(lambda x: x.sum(), jnp.ones((8, 16)), specs=PartitionSpec(AXIS), devices=1)
    assert list_collectives(text) == {}


TUPLE = """HloModule jit_step, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%x, %y)
}

ENTRY %main (a: f32[128], b: bf16[8,4]) -> f32[128] {
  %a = f32[128]{0:T(128)} parameter(0)
  %b = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(1)
  %all-reduce.1 = (f32[128]{0:T(128)S(1)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) all-reduce(%a, %b), \
channel_id=1, to_apply=%add, metadata={op_name="jit(step)/psum"}
  ROOT %first = f32[128]{0:T(128)} get-tuple-element(%all-reduce.1), index=0
}
"""


def test_all_operands_of_one_collective_count():
    assert list_collectives(TUPLE) == {"all-reduce": Collective(1, 128 * 4 + 32 * 2)}


START = """HloModule jit_step, num_partitions=2

%wrapped (p: f32[4,2]) -> f32[2,2] {
  %p = f32[4,2]{1,0} parameter(0)
  ROOT %scatter = f32[2,2]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

ENTRY main {
  %p0 = f32[6]{0} parameter(0)
  %p1 = f32[4,2]{1,0} parameter(1)
  %gather = (f32[6]{0}, f32[12]{0}) all-gather-start(f32[6]{0} %p0), dimensions={0}
  %gathered = f32[12]{0} all-gather-done((f32[6]{0}, f32[12]{0}) %gather)
  %permute = (f32[6]{0}, f32[6]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p0)
  %permuted = f32[6]{0} collective-permute-done(%permute)
  %start = ((f32[4,2]{1,0}), f32[2,2]{1,0}, s32[]) async-start(%p1), calls=%wrapped
  %update = ((f32[4,2]{1,0}), f32[2,2]{1,0}, s32[]) async-update(%start), calls=%wrapped
  ROOT %done = f32[2,2]{1,0} async-done(%update), calls=%wrapped
}
"""


def test_an_asynchronous_collective_counts_once():
    assert list_collectives(START) == {
        "all-gather": Collective(1, 24),
        "reduce-scatter": Collective(1, 32),
        "collective-permute": Collective(1, 24),
    }


# As XLA prints it for a TPU: each fusion of the chain takes a part of the same all-gather with it.
CHAIN = """HloModule jit_step, num_partitions=8

%first (p: s32[1,18]) -> (s32[1,18], s32[8,18]) {
  %p = s32[1,18]{1,0} parameter(0)
  %all-gather.1 = s32[8,18]{1,0} all-gather(%p), frontend_attributes={chain_id="0"}
  ROOT %call.1 = (s32[1,18]{1,0}, s32[8,18]{1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (q: s32[1,18]) -> s32[8,18] {
  %q = s32[1,18]{1,0} parameter(0)
  ROOT %all-gather.2 = s32[8,18]{1,0} all-gather(%q), frontend_attributes={chain_id="0"}
}

%last (r: s32[1,18]) -> s32[8,18] {
  %r = s32[1,18]{1,0} parameter(0)
  %all-gather.3 = s32[8,18]{1,0} all-gather(%r), frontend_attributes={chain_id="0"}
  ROOT %call.2 = s32[8,18]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%body (state: (s32[], s32[1,18])) -> (s32[], s32[1,18]) {
  %state = (s32[]{:T(128)}, s32[1,18]{1,0}) parameter(0)
  %item = s32[1,18]{1,0} get-tuple-element(%state), index=1
  %f1 = (s32[1,18]{1,0}, s32[8,18]{1,0}) fusion(%item), kind=kCustom, calls=%first
  %f2 = s32[8,18]{1,0} fusion(%item), kind=kOutput, calls=%async_collective_fusion
  ROOT %f3 = s32[8,18]{1,0} fusion(%item), kind=kCustom, calls=%last
}

%condition (state: (s32[], s32[1,18])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %state = (s32[]{:T(128)}, s32[1,18]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %five), direction=LT
}

ENTRY %main (p0: s32[1,18]) -> s32[1,18] {
  %p0 = (s32[]{:T(128)}, s32[1,18]{1,0}) parameter(0)
  ROOT %while = (s32[]{:T(128)}, s32[1,18]{1,0}) while(%p0), condition=%condition, body=%body
}
"""


def test_a_chain_of_fusions_counts_once_and_a_loop_by_its_condition():
    assert list_collectives(CHAIN) == {"all-gather": Collective(5, 5 * 18 * 4)}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("(bf16[3]{0}, pred[5], u32[]{:S(2)})", 6 + 5 + 4),
        ("f8e4m3fn[7]", 7),
        ("c64[2]", 16),
        ("s4[6]", 6),
        ("f32[0,4]", 0),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert shape_bytes(shape) == size
