"""The tuned bank: where its rows lie, what it computes, what it spares the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.adapt.slots import TunedLayout
from esft_jax.errors import InputError
from esft_jax.families import read_model_config
from esft_jax.model import Transformer
from esft_jax.moe.weights import ExpertWeights
from esft_jax.training.step import token_loss
from tests.checkpoint.checkpoints import SHAPE
from tests.model.parity import run

LAYOUTS = {
    "uneven": ((0, 1, 2, 5), (7,), (3, 4)),
    "a-layer-without": ((1,), (), (0, 6, 7)),
    "first-layers-without": ((), (), (2, 3)),
    "last-layer-without": ((0, 4), (1,), ()),
    "half-the-devices-without": ((0, 1), (2,), (0, 3)),
    "one": ((), (5,), ()),
    "all": (tuple(range(8)),) * 3,
}


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("selected", LAYOUTS.values(), ids=LAYOUTS)
def test_every_selected_expert_has_its_own_row(selected, shards):
    layout = TunedLayout.place(selected, 8, shards)
    local, size = 8 // shards, layout.rows_per_shard
    chosen = [(layer, expert) for layer, ids in enumerate(selected) for expert in ids]
    row_of = {(layer, expert): row for layer, expert, row in layout.rows()}
    assert sorted(row_of) == chosen
    assert len(set(row_of.values())) == len(chosen)
    # Devices share them out evenly: over all layers, and of each layer.
    assert size == -(-len(chosen) // shards)
    assert layout.window == max(-(-len(ids) // shards) for ids in selected)
    # What a device looks up is its row, or its base expert; all others find nothing.
    assert (layout.window_starts >= 0).all()
    assert (layout.window_starts + layout.window <= size).all()
    nothing = layout.window + local
    assert (layout.groups[:, :, 8] == nothing).all()
    for shard, layer, expert in np.ndindex(shards, len(selected), 8):
        group = layout.groups[shard, layer, expert]
        row = row_of.get((layer, expert))
        if row is None:
            own = expert // local == shard
            assert group == (layout.window + expert % local if own else nothing)
        elif row // size == shard:
            assert 0 <= group < layout.window
            assert shard * size + layout.window_starts[shard, layer] + group == row
        else:
            assert group == nothing


def test_experts_stay_with_their_base_where_there_is_room():
    layout = TunedLayout.place(((0, 1, 5), (2, 6)), 8, 2)
    owners = {(layer, expert): row // 3 for layer, expert, row in layout.rows()}
    assert owners == {(0, 0): 0, (0, 1): 0, (0, 5): 1, (1, 2): 0, (1, 6): 1}


def test_a_window_is_cut_from_the_devices_slice():
    layout = TunedLayout.place(((0, 1, 5), (), (4,)), 8, 2)
    bank = jnp.arange(2.0)[:, None, None]  # the slice of one device
    banks = ExpertWeights(bank, bank, bank[..., 0])
    carried = banks.map(lambda bank: bank[None])
    window, _ = layout.layer_window(banks, carried, jnp.int32(2), 1)
    # Expert 4: second row of device 1.
    for part in window.weights[:3]:
        assert np.all(part.matrices[part.first + window.groups[4]] == 1)
        assert np.all(part.own[window.groups[4]] == 1)
    assert window.weights.down_bias is None
    np.testing.assert_array_equal(window.groups, [6, 6, 6, 6, 1, 3, 4, 5, 6])


def shapes(jaxpr, reverse_scans):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["reverse"]:
            reverse_scans.append(equation.params["length"])
        for inner in jaxprs_in_params(equation.params):
            shapes(inner, reverse_scans)
    return reverse_scans


@pytest.mark.parametrize(
    ("experts", "layers"),
    [
        (None, [5, 2]),  # everything: the MoE layers, then the dense ones
        ({2: (1,), 6: (0,)}, [5]),
        ({4: (1,), 5: (0, 3)}, [3]),
        ({6: (7,)}, [1]),
    ],
)
def test_the_backward_pass_stops_below_the_lowest_tuned_layer(experts, layers):
    config = read_model_config(
        SHAPE | {"model_type": "deepseek_v2", "num_hidden_layers": 7, "first_k_dense_replace": 2}
    )

    def gradients(batch):
        model = Transformer(config, rngs=nnx.Rngs(0))
        selected = None if experts is None else ExpertConfig(experts)
        if selected:
            attach_tuned_experts(model, selected)
        graph, tuned, frozen = partition(model, selected)
        return jax.grad(lambda tuned: token_loss(nnx.merge(graph, tuned, frozen), batch)[0])(tuned)

    batch = dict.fromkeys(
        ("tokens", "segment_ids", "positions", "targets", "loss_weights"),
        jax.ShapeDtypeStruct((1, 4), jnp.int32),
    )
    batch["loss_weights"] = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    assert shapes(jax.make_jaxpr(gradients)(batch).jaxpr, []) == layers


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(1).integers(1, 96, (4, 12)).astype(np.int32)
    return tokens, np.ones_like(tokens)


# The lowest layer and one in between have none.
EXPERTS = ExpertConfig({2: (0, 3), 3: (5,)})


def test_copies_of_experts_change_nothing_and_the_bank_rules(lite, batch):
    before = run(lite.jax, *batch)
    model = nnx.clone(lite.jax)
    attach_tuned_experts(model, EXPERTS)
    copied = run(model, *batch)
    np.testing.assert_allclose(copied.logits, before.logits, atol=1e-5)
    np.testing.assert_array_equal(copied.router.expert_ids, before.router.expert_ids)

    # Changing the bank equals changing the base; the base ones no longer matter.
    changed = nnx.clone(lite.jax)
    base, bank = changed.moe_blocks.moe.experts, model.tuned_experts
    unused = model.moe_blocks.moe.experts
    for leaf in ("gate_up", "down"):
        ours, theirs, ruined = (np.array(getattr(m, leaf)[...]) for m in (bank, base, unused))
        for layer, expert, row in bank.layout.rows():
            ours[row] += 0.1
            theirs[layer, expert] += 0.1
            ruined[layer, expert] = np.nan
        for module, value in ((bank, ours), (base, theirs), (unused, ruined)):
            getattr(module, leaf)[...] = jnp.asarray(value)
    expected = run(changed, *batch).logits
    assert np.abs(expected - before.logits).max() > 1e-2
    np.testing.assert_allclose(run(model, *batch).logits, expected, atol=1e-5)


def test_the_bank_holds_float32_copies_and_nothing_else(lite):
    model = nnx.clone(lite.jax)
    base = model.moe_blocks.moe.experts
    base.gate_up[...] = base.gate_up[...].astype(jnp.bfloat16)
    attach_tuned_experts(model, EXPERTS)
    bank = model.tuned_experts
    assert bank.gate_up.shape[0] == 3 and bank.gate_up.dtype == jnp.float32
    for layer, expert, row in bank.layout.rows():
        np.testing.assert_array_equal(
            bank.gate_up[row], base.gate_up[layer, expert].astype(jnp.float32)
        )


def test_no_expert_selected_makes_no_bank(lite):
    model = nnx.clone(lite.jax)
    attach_tuned_experts(model, ExpertConfig({1: ()}, also=("shared_experts",)))
    assert model.tuned_experts is None


@pytest.mark.parametrize("experts", [{0: (1,)}, {1: (8,)}], ids=["dense-layer", "no-such-expert"])
def test_experts_that_the_model_lacks_are_refused(lite, experts):
    with pytest.raises(InputError):
        attach_tuned_experts(nnx.clone(lite.jax), ExpertConfig(experts))
