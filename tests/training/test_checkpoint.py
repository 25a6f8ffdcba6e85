import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from esft_jax.errors import InputError
from esft_jax.sharding import make_mesh
from esft_jax.training.checkpoint import Checkpoints, Position
from esft_jax.training.checksum import checksums, json_checksum
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
    checkpoints.save(5, state, Position({"next_index": 5}, None, 9, {}))
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


def test_a_best_one_ahead_of_the_last_gives_way(tmp_path) -> None:
    """Else Orbax would refuse a better one of an earlier step without a word."""

    def state(step: int) -> TrainState:
        weights = {"w": jnp.full(4, step, jnp.float32)}
        return TrainState(jnp.array(step), jnp.array(0), weights, ())

    checkpoints = Checkpoints(tmp_path, {}, None)
    checkpoints.save(5, state(5), Position({}, 1.5, 9, {}))
    checkpoints.save_best(8, state(8))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, {}, None)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(5)
    )
    checkpoints.restore(abstract)
    assert checkpoints.best_step is None
    checkpoints.save_best(7, state(7))
    assert checkpoints.best_step == 7
    np.testing.assert_array_equal(checkpoints.restore_best(abstract)["w"], np.full(4, 7.0))
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """The checkpoints of steps 5 and 6, the second also the best one."""
    folder = tmp_path_factory.mktemp("saved")
    values = np.random.default_rng(0).normal(size=(2, 64, 32)).astype(np.float32)
    checkpoints = Checkpoints(folder, {}, None)
    for step in (5, 6):
        state = TrainState(
            jnp.array(step), jnp.array(0), {"w": jnp.array(values[0])}, (jnp.array(values[1]),)
        )
        checkpoints.save(step, state, Position({"next_index": step}, None, 9, {}))
    checkpoints.save_best(6, state)
    checkpoints.close()
    return folder, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("kind", ["last", "best"])
@pytest.mark.parametrize("part", ["arrays", "index", "position"])
def test_a_damaged_checkpoint_is_named_and_not_loaded(
    saved: tuple[Path, TrainState], damage, kind: str, part: str, tmp_path: Path
) -> None:
    folder, abstract = tmp_path / "checkpoints", saved[1]
    shutil.copytree(saved[0], folder)
    step = folder / kind / "6"
    files = {
        "arrays": max(step.glob("state/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size),
        "index": step / "state" / "manifest.ocdbt",
        "position": step / "position" / "metadata",
    }
    damage(files[part])
    checkpoints = Checkpoints(folder, {}, None)
    read = checkpoints.restore if kind == "last" else checkpoints.restore_best
    effect = "continues from step 5" if kind == "last" else "later evaluations"
    with pytest.raises(InputError, match=rf"{kind}/6: damaged checkpoint \(.*{effect}"):
        read(abstract)
    checkpoints.close()
    # What the message says.
    shutil.rmtree(step)
    checkpoints = Checkpoints(folder, {}, None)
    if kind == "last":
        state, position = checkpoints.restore(abstract)
        assert int(state.step) == 5 and position.data == {"next_index": 5}
    else:
        assert checkpoints.best_step is None
    checkpoints.close()


def test_what_an_older_version_did_not_record_is_not_compared(
    saved: tuple[Path, TrainState], tmp_path: Path
) -> None:
    folder, abstract = tmp_path / "checkpoints", saved[1]
    shutil.copytree(saved[0], folder)
    path = folder / "last" / "6" / "position" / "metadata"
    position = json.loads(path.read_text())
    del position["steps"], position["checksum"]
    position["facts"] = {"base_fingerprint": "a"}
    path.write_text(json.dumps(position | {"checksum": json_checksum(position)}))
    facts = {"base_fingerprint": "a", "config_fingerprint": "b"}
    checkpoints = Checkpoints(folder, facts, None)
    state, found = checkpoints.restore(abstract)
    assert int(state.step) == 6 and found == Position({"next_index": 6}, None, None, {})
    checkpoints.close()
    checkpoints = Checkpoints(folder, facts | {"base_fingerprint": "c"}, None)
    with pytest.raises(InputError, match="step 6 has base_fingerprint = 'a'; this run has 'c'"):
        checkpoints.restore(abstract)
    checkpoints.close()


def test_checksums_do_not_depend_on_the_mesh_and_see_every_bit() -> None:
    values = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = make_mesh(data=2, expert=4)
    split = jax.device_put(values, NamedSharding(mesh, PartitionSpec("expert", "data")))
    (expected,) = checksums([jnp.array(values)]).values()
    assert list(checksums([split]).values()) == [expected]
    for bit in range(32):
        changed = values.copy().view(np.uint32)
        changed[3, 5] ^= np.uint32(1 << bit)
        assert list(checksums([jnp.array(changed.view(np.float32))]).values()) != [expected]
    assert list(checksums([jnp.array(values[::-1])]).values()) != [expected]
