import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from esft_jax.blocks import read_block, write_blocks
from esft_jax.sharding import make_mesh

BOX = (slice(1, 2), slice(1, 6), slice(3, 5))


@pytest.fixture(params=[None, (None, "expert"), ("data", None, "expert"), (None,)], ids=str)
def array(request):
    values = jnp.arange(2 * 8 * 8, dtype=jnp.float32).reshape(2, 8, 8).astype(jnp.bfloat16)
    if request.param is None:
        return values
    return jax.device_put(values, NamedSharding(make_mesh(2, 4), PartitionSpec(*request.param)))


def test_reads_a_block_across_shards(array):
    np.testing.assert_array_equal(read_block(array, BOX), np.asarray(array)[BOX])


def test_overwrites_blocks_across_shards_and_nothing_else(array):
    expected = np.array(array)
    one, other = np.full((1, 5, 2), -1, np.float32), np.full((2, 1, 1), 7.0, np.float32)
    second = (slice(0, 2), slice(7, 8), slice(0, 1))
    expected[BOX], expected[second] = one, other
    found = write_blocks(array, [(BOX, one), (second, other)])
    np.testing.assert_array_equal(found, expected)
    assert found.sharding == array.sharding
    assert found.dtype == array.dtype
