"""Bytes between devices, from programs that this CPU's eight devices compile, and from text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from esft_jax.planning.collectives import _group, received_bytes
from esft_jax.sharding import DATA, EXPERT, make_mesh


def compiled(step, *shape: int, out=None) -> str:
    mesh, local = make_mesh(data=2, expert=4), PartitionSpec((DATA, EXPERT))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=local, out_specs=local if out is None else out, check_vma=False
    )
    return jax.jit(mapped).lower(jnp.ones(shape, jnp.float32)).compile().as_text()


def test_each_kind_by_a_ring_over_its_group() -> None:
    local = 16 * 32 * 4  # bytes of one device

    def gathered(x):
        return jax.lax.all_gather(x, EXPERT, tiled=True)[:16] * 2

    def summed(x):
        return jax.lax.psum(x, DATA)

    def scattered(x):
        return jax.lax.psum_scatter(x, EXPERT, tiled=True)

    def permuted(x):
        return jax.lax.ppermute(x, EXPERT, [(i, (i + 1) % 4) for i in range(4)])

    def received(step) -> dict[str, float]:
        return received_bytes(compiled(step, 8 * 16, 32), 8)

    assert received(gathered) == {"all-gather": 3 * local}
    assert received(summed) == {"all-reduce": 2 * local / 2}
    assert received(scattered) == {"reduce-scatter": local * 3 / 4}
    assert received(permuted) == {"collective-permute": local}


def test_a_loop_counts_as_often_as_it_runs() -> None:
    def looped(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, DATA) / 2, None), x, length=5)[0]

    assert received_bytes(compiled(looped, 16, 32), 8) == {"all-reduce": 5 * 2 * 32 * 4}


def test_what_connects_slices_counts_apart() -> None:
    def summed_and_gathered(x):
        return jax.lax.psum(jax.lax.all_gather(x, EXPERT, tiled=True)[:16], DATA)

    text, local = compiled(summed_and_gathered, 8 * 16, 32), 16 * 32 * 4
    # The two groups along `data` are two slices: its sums are between them.
    assert received_bytes(text, 8, slices=2) == {
        "all-gather": 3 * local,
        "all-reduce between slices": local,
    }
    found = received_bytes(text, 8, slices=8)
    assert found.keys() == {"all-gather between slices", "all-reduce between slices"}


BETWEEN_HOSTS = """HloModule jit_step, num_partitions=8

ENTRY %main.1 (p: f32[2,64]) -> f32[2,64] {
  %p = f32[2,64]{1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[2,64]{1,0}, u32[]{:S(2)}, token[]) send(%p, %after-all), KIND
  %recv = (f32[2,64]{1,0}, u32[]{:S(2)}, token[]) recv(%after-all), KIND
  %recv-done = (f32[2,64]{1,0}, token[]) recv-done(%recv), channel_id=3
  ROOT %out = f32[2,64]{1,0} get-tuple-element(%recv-done), index=0
}
""".replace("KIND", 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}')


def test_what_tpu_slices_exchange_through_their_hosts() -> None:
    found = received_bytes(BETWEEN_HOSTS, 8, slices=2)
    assert found == {"all-reduce between slices": 2 * (2 * 64 * 4) / 2}


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
        ("replica_groups={}", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_groups_in_all_their_spellings(attributes, group) -> None:
    assert _group(attributes, 8) == group


ASYNCHRONOUS = """HloModule jit_step, num_partitions=4

%wrapped (param: bf16[2,8]) -> bf16[8,8] {
  %param = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%param), replica_groups=[1,4]<=[4]
}

%branch (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %all = f32[4]{0} all-to-all(%p), replica_groups={{0,1},{2,3}}
}

%other (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}

ENTRY %main (x: bf16[2,8], y: f32[4]) -> f32[4] {
  %x = bf16[2,8]{1,0} parameter(0)
  %start = ((bf16[2,8]{1,0}), bf16[8,8]{1,0}, u32[]{:S(2)}) async-start(%x), calls=%wrapped
  %done = bf16[8,8]{1,0} async-done(%start), calls=%wrapped
  %second = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x), replica_groups={}
  %end = bf16[8,8]{1,0} all-gather-done(%second)
  ROOT %result = f32[4]{0} conditional(%i, %y, %y), branch_computations={%branch, %other}
}
"""


def test_asynchronous_collectives_count_once() -> None:
    found = received_bytes(ASYNCHRONOUS, 4)
    assert found == {"all-gather": 2 * 3 * 2 * 8 * 2, "all-to-all": 8}


# As the compiler for TPUs writes them: no trip counts, links of a chain, sums of which each device
# keeps its part.
TPU = """HloModule jit_step, num_partitions=8

%condition (p: (u32[], f32[8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(4)
  %p = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %two = u32[]{:T(128)} constant(2)
  %p = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %sent = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3
  %got = f32[8]{0} collective-permute-done(%sent)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %results = (u32[]{:T(128)}, f32[8]{0}) tuple(%next, %got)
}

%fused.1 (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %gather.1 = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'b'}, \
frontend_attributes={chain_id="0"}
  ROOT %start = f32[8]{0} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%fused.2 (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %gather.2 = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'b'}, \
frontend_attributes={chain_id="0"}
  ROOT %done = f32[8]{0} custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%p), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'a'}
  ROOT %part = f32[16]{0} dynamic-slice(%sum, %at), dynamic_slice_sizes={16}
}

ENTRY %main (x: f32[4]) -> f32[16] {
  %x = f32[4]{0} parameter(0)
  %loop = (u32[], f32[8]{0}) while(%first), condition=%condition, body=%body
  %f1 = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused.1
  %f2 = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused.2
  ROOT %f3 = f32[16]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_programs_of_tpus() -> None:
    found = received_bytes(TPU, 8)
    assert found == {
        "collective-permute": 2 * 8 * 4,
        "all-gather": 8 * 4 / 2,
        "reduce-scatter": 64 * 4 * 3 / 4,
    }
