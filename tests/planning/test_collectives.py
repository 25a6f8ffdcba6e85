"""Bytes between devices, from programs that this CPU's eight devices compile, and from text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from esft_jax.mesh import DATA, EXPERT, make_mesh
from esft_jax.planning.collectives import received_bytes


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


TEXT = """HloModule jit_step, num_partitions=4

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
    found = received_bytes(TEXT, 4)
    assert found == {"all-gather": 2 * 3 * 2 * 8 * 2, "all-to-all": pytest.approx(8)}
