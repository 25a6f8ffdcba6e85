import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from esft_jax.adapt.slots import TunedLayout
from esft_jax.sharding import make_mesh
from esft_jax.training.relayout import move_rows, saved_shapes

SELECTED = ((0, 1, 2), (), (1, 6, 7), (3,))


def layout(shards: int) -> TunedLayout:
    return TunedLayout.place(SELECTED, 8, shards)


def bank(shards: int, width: int) -> np.ndarray:
    """Rows that tell what they hold; padding is 0."""
    held = layout(shards).by_row()
    values = [0 if row is None else 100 * row[0] + row[1] + 1 for row in held]
    return np.broadcast_to(np.array(values, np.float32)[:, None, None], (len(held), 3, width))


@pytest.mark.parametrize("width", [16, 5])  # that eight devices divide, and that they do not
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 8), (1, 4), (8, 1)])
def test_rows_move_to_the_devices_of_another_mesh(before: int, after: int, width: int) -> None:
    mesh = make_mesh(expert=after)
    place = NamedSharding(mesh, PartitionSpec("expert"))
    rest = NamedSharding(mesh, PartitionSpec())

    def state(shards: int) -> dict:
        return {"tuned_experts": {"down": jnp.array(bank(shards, width))}, "other": jnp.arange(3.0)}

    now = {"tuned_experts": {"down": place}, "other": rest}
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state(after), now
    )
    target = saved_shapes(abstract, layout(before).by_row())
    restored = jax.tree.map(
        lambda x, t: jax.device_put(jnp.asarray(x, t.dtype).reshape(t.shape), t.sharding),
        state(before),
        target,
    )
    moved = move_rows(restored, layout(before).by_row(), layout(after).by_row(), now)
    np.testing.assert_array_equal(moved["tuned_experts"]["down"], bank(after, width))
    assert moved["tuned_experts"]["down"].sharding == place
    np.testing.assert_array_equal(moved["other"], [0, 1, 2])
