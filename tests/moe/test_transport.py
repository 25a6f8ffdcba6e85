"""Tokens sent to the devices of their experts, against one device that has all experts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from esft_jax.moe import ExpertWeights, Routing, moe
from esft_jax.moe import layer as layer_module
from esft_jax.moe import transport as transport_module
from esft_jax.moe.transport import exchange
from esft_jax.ops.activation import Activation
from esft_jax.sharding import EXPERT, make_mesh

TOKENS, K, E, D, F = 5, 2, 8, 6, 4  # tokens of each device
CLAMPED = Activation(alpha=1.7, limit=1.5, offset=1.0)


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, TOKENS, D)).astype(np.float32)
    gates = rng.uniform(size=(8, TOKENS, K)).astype(np.float32)
    gate_up = rng.normal(size=(E, D, 2 * F)).astype(np.float32)
    down = rng.normal(size=(E, F, D)).astype(np.float32)
    biases = (rng.normal(size=(E, size)).astype(np.float32) for size in (2 * F, D))
    return x, gates, ExpertWeights(gate_up, down, *biases)


def routed(kind: str) -> np.ndarray:
    """Expert ids `[8, TOKENS, K]`; E is the phantom."""
    rng = np.random.default_rng(1)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(8 * TOKENS)])
    ids = ids.reshape(8, TOKENS, K).astype(np.int32)
    match kind:
        case "one expert":
            ids[:] = (3, E)
        case "one device's":
            ids[:] = (E - 1, E - 2)
        case "none":
            ids[:] = E
        case "some tokens masked":
            ids[:, ::2], ids[2] = E, E
    return jnp.asarray(ids)


def alone(x, gates, weights, ids):
    return moe(x, Routing(ids, gates), weights, activation=CLAMPED)


@pytest.mark.parametrize("transport", ["all_gather", "ragged_all_to_all"])
@pytest.mark.parametrize("room", [layer_module.ROOM, 0.2])
@pytest.mark.parametrize(
    "kind", ["even", "one expert", "one device's", "none", "some tokens masked"]
)
def test_outputs_and_gradients_are_those_of_one_device(layer, transport, room, kind, monkeypatch):
    monkeypatch.setattr(layer_module, "ROOM", room)  # little room takes many rounds
    mesh, ids = make_mesh(2, 4), routed(kind)
    weights = np.random.default_rng(2).normal(size=layer[0].shape)

    def both(function):
        def loss(*operands):
            out = function(*operands, ids)
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*layer)

    def on_mesh(x, gates, weights, ids):
        routing = Routing(ids, gates)
        return moe(x, routing, weights, activation=CLAMPED, mesh=mesh, transport=transport)

    (_, out), grads = both(on_mesh)
    (_, expected), expected_grads = both(alone)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), grads, expected_grads)
    assert (kind == "none") == (np.abs(out).max() == 0)


def gathering_exchange(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What `jax.lax.ragged_all_to_all` does, which CPUs do not have: everything is gathered."""
    here, index = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    sent = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    for *sender, received in zip(*sent, recv_sizes, strict=True):
        rows, begins, sizes, places = sender
        within = index - places[here]
        arrives = (within >= 0) & (within < jnp.minimum(sizes[here], received))
        output = jnp.where(arrives[:, None], rows[begins[here] + within], output)
    return output


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_what_is_sent_arrives_and_comes_back(platform, monkeypatch) -> None:
    monkeypatch.setattr(transport_module, "target_platform", lambda: platform)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", gathering_exchange)
    mesh, quota = make_mesh(1, 8), 3
    sizes = np.random.default_rng(0).integers(0, quota + 1, (8, 8)).astype(np.int32)  # from, to
    # Every row says where it comes from, where it goes to, and its place.
    origin = np.stack(np.meshgrid(range(8), range(8), range(quota), indexing="ij"), -1) + 1.0

    def there_and_back(rows, sent, received):
        rows, sent, received = rows.reshape(-1, 3), sent[0], received[0]
        arrived = exchange(rows, sent, received)
        return arrived, exchange(arrived, received, sent)

    shard = PartitionSpec(EXPERT)
    arrived, returned = jax.jit(
        jax.shard_map(
            there_and_back, mesh=mesh, in_specs=shard, out_specs=(shard, shard), check_vma=False
        )
    )(origin.reshape(-1, 3), sizes, sizes.T)
    arrived, returned = (np.reshape(a, (8, 8, quota, 3)) for a in (arrived, returned))
    for here in range(8):
        for other in range(8):
            came, went = sizes[other, here], sizes[here, other]
            np.testing.assert_array_equal(arrived[here, other, :came], origin[other, here, :came])
            np.testing.assert_array_equal(returned[here, other, :went], origin[here, other, :went])
            assert not arrived[here, other, came:].any()
            assert not returned[here, other, went:].any()
