"""What a compiled program does, counted from its text, against arithmetic and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.parallel.hlo import program_costs


def costs_of(function, *arguments, **options):
    return program_costs(jax.jit(function).lower(*arguments).compile().as_text(), **options)


def array(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def test_products_in_a_loop_count_as_often_as_it_runs():
    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    found = costs_of(scanned, array(24, 32), array(7, 32, 32))
    assert found.flops == 7 * 2 * 24 * 32 * 32
    assert found.open_loops == 0 and found.traffic == ()
    # A layer's weights are read once, not the stack at every step; x is read and written.
    least = 4 * (7 * 32 * 32 + 2 * 7 * 24 * 32)
    assert least <= found.main_bytes <= 4 * least


def test_loops_in_loops_and_batched_products():
    def nested(x, weights):
        def inner(x, w):
            return jnp.einsum("btd,bdf->btf", x, w), None

        return jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.scan(inner, x, weights)[0], x)

    assert costs_of(nested, array(3, 4, 8), array(6, 3, 8, 8)).flops == 5 * 6 * 2 * 3 * 4 * 8 * 8


def test_a_loop_that_ends_by_its_data_runs_as_often_as_one_says():
    def until(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: x @ w, x)

    once, thrice = (costs_of(until, array(16, 16), array(16, 16), open_trips=trips) for trips in (1, 3))
    assert once.open_loops == 1
    assert once.flops == 2 * 16**3 and thrice.flops == 3 * once.flops


def test_gradients_without_and_with_recomputation():
    def loss(weights, x, remat):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    for remat, products in ((False, 3), (True, 4)):
        gradient = jax.grad(functools.partial(loss, remat=remat), argnums=(0, 1))
        found = costs_of(gradient, array(5, 32, 32), array(8, 32))
        assert found.flops == products * 5 * 2 * 8 * 32 * 32


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 3, 11), (4, 3, 5), dict(window_strides=(2,), padding=[(1, 3)])),
        ((2, 3, 11), (4, 3, 5), dict(window_strides=(1,), padding=[(4, 4)], lhs_dilation=(3,))),
        ((2, 3, 11), (4, 3, 3), dict(window_strides=(3,), padding=[(2, 0)], rhs_dilation=(4,))),
        ((2, 4, 6, 7), (6, 2, 3, 2), dict(window_strides=(1, 2), padding=[(1, 1), (0, 1)], feature_group_count=2)),
    ],
)
def test_convolutions_count_what_lies_on_the_input(shape, kernel, options):
    """With ones for everything, the sum of the result is the number of multiplications."""
    convolve = functools.partial(jax.lax.conv_general_dilated, **options)
    found = costs_of(convolve, array(*shape), array(*kernel))
    assert found.flops == 2 * float(np.sum(convolve(np.ones(shape, np.float32), np.ones(kernel, np.float32))))


def test_collectives_in_a_loop():
    """Four devices; every one of six layers gathers its weights and sums its result."""
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("part",))
    spread = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731

    def layer(x, w):
        whole = jax.lax.all_gather(w, "part", axis=0, tiled=True)
        return jax.lax.psum(x @ whole, "part") * 1e-3, None

    def layers(x, weights):
        return jax.lax.scan(layer, x, weights)[0]

    rows, weights = PartitionSpec("part"), PartitionSpec(None, "part")
    step = jax.shard_map(layers, mesh=mesh, in_specs=(rows, weights), out_specs=rows, check_vma=False)
    found = costs_of(step, array(8, 64, sharding=spread("part")), array(6, 64, 64, sharding=spread(None, "part")))
    by_kind = {each.kind: each for each in found.traffic}
    assert set(by_kind) == {"all-gather", "all-reduce"}
    gathered, summed = by_kind["all-gather"], by_kind["all-reduce"]
    assert (gathered.group, gathered.count, gathered.payload) == (4, 6, 6 * 64 * 64 * 4)
    assert gathered.moved == gathered.payload * 3 / 4
    assert (summed.group, summed.count, summed.payload) == (4, 6, 6 * 2 * 64 * 4)
    assert summed.moved == summed.payload * 2 * 3 / 4
    assert found.flops == 6 * 2 * 2 * 64 * 64


# As the TPU compiler writes: no trip count but in the condition, its limit carried along, a product as a convolution,
# arrays in vector memory (S(1)), groups as axes of a mesh, a gather that is begun and finished, a kernel with costs.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

%layer_weights (param_0.1: bf16[24,128,512], param_1.1: s32[]) -> bf16[1,128,512] {
  %param_0.1 = bf16[24,128,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %constant.1 = s32[]{:T(128)} constant(0)
  ROOT %slice.1 = bf16[1,128,512]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%param_0.1, %param_1.1, %constant.1, \
%constant.1), dynamic_slice_sizes={1,128,512}
}

%product (param_0.2: bf16[16,512,512], param_1.2: bf16[1,512,512]) -> bf16[16,512,512] {
  %param_0.2 = bf16[16,512,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %bitcast.2 = bf16[512,512,1]{1,0,2:T(8,128)(2,1)} bitcast(%param_1.2)
  ROOT %convolution.2 = bf16[16,512,512]{2,1,0:T(8,128)(2,1)} convolution(%param_0.2, %bitcast.2), window={size=1}, \
dim_labels=0bf_io0->0bf
}

%body (carry.1: (s32[], bf16[16,512,512], bf16[24,128,512], s32[])) -> (s32[], bf16[16,512,512], bf16[24,128,512], \
s32[]) {
  %constant.3 = s32[]{:T(128)} constant(1)
  %carry.1 = (s32[]{:T(128)}, bf16[16,512,512]{2,1,0}, bf16[24,128,512]{2,1,0}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %number.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %x.1 = bf16[16,512,512]{2,1,0} get-tuple-element(%carry.1), index=1
  %weights.1 = bf16[24,128,512]{2,1,0} get-tuple-element(%carry.1), index=2
  %limit.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=3
  %part = bf16[1,128,512]{2,1,0:T(8,128)(2,1)S(1)} fusion(%weights.1, %number.1), kind=kLoop, calls=%layer_weights
  %begun = (bf16[1,128,512]{2,1,0:S(1)}, bf16[1,512,512]{2,1,0:S(1)}) all-gather-start(%part), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}, use_global_device_ids=true
  %whole = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} all-gather-done(%begun)
  %next = bf16[16,512,512]{2,1,0} fusion(%x.1, %whole), kind=kOutput, calls=%product
  %counted = s32[]{:T(128)} add(%number.1, %constant.3)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[16,512,512]{2,1,0}, bf16[24,128,512]{2,1,0}, s32[]{:T(128)}) tuple(%counted, \
%next, %weights.1, %limit.1)
}

%condition (carry.2: (s32[], bf16[16,512,512], bf16[24,128,512], s32[])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, bf16[16,512,512]{2,1,0}, bf16[24,128,512]{2,1,0}, s32[]{:T(128)}) parameter(0)
  %number.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  %limit.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=3
  ROOT %less = pred[]{:T(512)} compare(%number.2, %limit.2), direction=LT
}

ENTRY %main (x: bf16[16,512,512], weights: bf16[24,128,512]) -> bf16[16,512,512] {
  %x = bf16[16,512,512]{2,1,0} parameter(0)
  %weights = bf16[24,128,512]{2,1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = s32[]{:T(128)} copy(%zero)
  %last = s32[]{:T(128)} constant(24)
  %tuple.2 = (s32[]{:T(128)}, bf16[16,512,512]{2,1,0}, bf16[24,128,512]{2,1,0}, s32[]{:T(128)}) tuple(%start, %x, \
%weights, %last)
  %loop = (s32[]{:T(128)}, bf16[16,512,512]{2,1,0}, bf16[24,128,512]{2,1,0}, s32[]{:T(128)}) while(%tuple.2), \
condition=%condition, body=%body
  %done = bf16[16,512,512]{2,1,0} get-tuple-element(%loop), index=1
  ROOT %kernel = bf16[16,512,512]{2,1,0} custom-call(%done), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"1000","bytes_accessed":"5"}}}
}
"""


def test_a_program_as_the_tpu_compiler_writes_it():
    found = program_costs(TPU)
    assert found.flops == 24 * 2 * 16 * 512 * 512 * 512 + 1000
    (gathered,) = found.traffic
    assert (gathered.kind, gathered.group, gathered.count) == ("all-gather", 4, 24)
    assert gathered.moved == 24 * 512 * 512 * 2 * 3 / 4
    # Layer by layer: its part of the weights, x before and after; the counters; x for the kernel.
    layer = 128 * 512 * 2 + 2 * 16 * 512 * 512 * 2
    assert found.main_bytes == pytest.approx(24 * layer + 2 * 16 * 512 * 512 * 2, rel=1e-5)
    assert found.open_loops == 0 and found.silent_kernels == {}


def test_a_limit_that_the_loop_changes_is_no_trip_count():
    changed = TPU.replace("%next, %weights.1, %limit.1)", "%next, %weights.1, %counted)")
    assert program_costs(changed).open_loops == 1


def test_groups_in_every_form():
    """Of a mesh, of one with another order of devices, listed, counted, and all there are."""
    written = "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}"
    assert written in TPU
    for other, size in (
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_1':(1)2}", 4),
        ("replica_groups={{0,2},{1,3}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups={}", 8),
    ):
        assert program_costs(TPU.replace(written, other)).traffic[0].group == size
    with pytest.raises(ValueError, match="replica groups in a form that is not known"):
        program_costs(TPU.replace(written, "replica_groups=other"))


def test_kernels_that_state_nothing_are_named():
    silent = TPU.replace('"cost_estimate":{"flops":"1000","bytes_accessed":"5"}', '"other":1')
    assert program_costs(silent).silent_kernels == {"kernel": 1}
    told = program_costs(silent, kernels={"ker": lambda operands: float(operands[0].sizes[0])})
    assert told.flops == program_costs(silent).flops + 16 and told.silent_kernels == {}


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no HLO program"):
        program_costs("module @jit_step {}")
