import jax
import jax.numpy as jnp
import numpy as np

from esft_jax.training.checkpoint import Checkpoints, Position
from esft_jax.training.state import TrainState


def test_updates_in_place_do_not_reach_a_checkpoint_being_written(tmp_path) -> None:
    """The step takes over the state's memory at once, while files are still being written."""
    value = np.arange(1 << 20, dtype=np.float32)

    def start(factor: float) -> TrainState:
        return TrainState(
            jnp.array(5), jnp.array(0), {"w": factor * jnp.array(value)}, (jnp.array(value) + 1,)
        )

    update = jax.jit(lambda state: jax.tree.map(lambda x: -x, state), donate_argnums=0)
    state = update(update(start(1.0)))
    checkpoints = Checkpoints(tmp_path, {}, None)
    checkpoints.save(5, state, Position({"next_index": 5}, None, {}))
    checkpoints.save_best(5, state)
    for _ in range(5):
        state = update(state)
    assert (state.tuned["w"][1:] < 0).all()

    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, {}, None)
    restored, position = checkpoints.restore(abstract)
    assert int(restored.step) == 5 and position.data == {"next_index": 5}
    np.testing.assert_array_equal(restored.tuned["w"], value)
    np.testing.assert_array_equal(restored.opt_state[0], value + 1)
    np.testing.assert_array_equal(checkpoints.restore_best(abstract)["w"], value)
    checkpoints.close()
