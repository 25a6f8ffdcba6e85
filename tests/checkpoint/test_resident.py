"""Several adapters in one batch: each row is that of the model its adapter is merged into."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.checkpoint.adapter import apply_adapter, load_adapter, save_adapter, trained_tensors
from esft_jax.checkpoint.export import save_model
from esft_jax.checkpoint.load import load_base
from esft_jax.checkpoint.model_tensors import ModelTensors
from esft_jax.checkpoint.resident import attach_adapters, choose_adapter, exchange_adapter
from esft_jax.decode.generation import generate_tokens
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.model.transformer import Transformer
from esft_jax.ops.quantisation import Quantisation
from esft_jax.sharding import make_mesh

# Experts with biases; a window in every second layer.
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 5,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "dtype": "float32",
}
# Alike in part; the last one is larger than each of the others.
EXPERTS = [
    ExpertConfig({0: (5, 0, 2), 1: (3,)}),
    ExpertConfig({1: (0, 3, 4, 7)}),
    ExpertConfig({0: (5,)}),
    ExpertConfig({0: (0, 1, 2, 3, 4), 1: (6,)}),
]
ROWS = [1, -1, 0, 2, 0, 1, 2, -1]
TOKENS = np.random.default_rng(0).integers(0, 60, (len(ROWS), 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with random weights everywhere."""
    template = tmp_path_factory.mktemp("template")
    (template / "config.json").write_text(json.dumps(GPT_OSS))
    graph, params = nnx.split(Transformer(load_model_config(template), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + rng.normal(0, 0.1, p.shape).astype(np.float32), params)
    save_model(nnx.merge(graph, params), template.parent / "gpt_oss", template)
    return template.parent / "gpt_oss"


def save_trained(folder, target, experts, seed):
    """An adapter of other values than the base's."""
    base = load_base(folder, jnp.float32)
    attach_tuned_experts(base.model, experts)
    graph, tuned, frozen = partition(base.model, experts)
    rng = np.random.default_rng(seed)
    tuned = jax.tree.map(lambda p: p + rng.normal(0, 0.3, p.shape).astype(np.float32), tuned)
    tensors = trained_tensors(nnx.merge(graph, tuned, frozen), tuned)
    save_adapter(target, tensors, experts, {"base_fingerprint": base.fingerprint})
    return load_adapter(target)


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    parent = tmp_path_factory.mktemp("adapters")
    return [save_trained(folder, parent / str(i), e, i) for i, e in enumerate(EXPERTS)]


@jax.jit(static_argnums=0)
def logits(graph, params, tokens, adapter_ids):
    return nnx.merge(graph, params)(tokens, adapter_ids=adapter_ids).logits


def logits_of(model, adapter_ids=None, tokens=TOKENS):
    adapter_ids = None if adapter_ids is None else jnp.asarray(adapter_ids)
    return np.asarray(logits(*nnx.split(model), tokens, adapter_ids))


@pytest.fixture(scope="module")
def merged(folder, adapters):
    """Logits and greedy tokens of the base (-1), and with three adapters merged into it."""

    def run(adapter):
        base = load_base(folder, jnp.float32)
        if adapter is not None:
            apply_adapter(base.model, adapter, base.fingerprint)
        return logits_of(base.model), greedy(base.model)

    return {i: run(None if i < 0 else adapters[i]) for i in range(-1, 3)}


def greedy(model, **options):
    prompts = [row[: 3 + n % 4].tolist() for n, row in enumerate(TOKENS)]
    return generate_tokens(model, prompts, stop_ids=[60], max_new_tokens=6, **options)


def assert_rows(found, merged, ids):
    for row, adapter in enumerate(ids):
        expected = merged[adapter][0][row]
        np.testing.assert_allclose(found[row], expected, atol=1e-5, rtol=1e-5, err_msg=str(row))


@pytest.mark.parametrize(
    ("mesh", "transport"),
    [
        (None, "all_gather"),
        ((2, 4), "all_gather"),
        pytest.param((2, 4), "ragged_all_to_all", marks=pytest.mark.slow),
    ],
)
def test_every_row_is_that_of_its_merged_model(folder, adapters, merged, mesh, transport):
    base = load_base(folder, jnp.float32, mesh and make_mesh(*mesh))
    base.model.transport = transport
    attach_adapters(base.model, adapters[:3], base.fingerprint)
    different = {merged[i][0].tobytes() for i in range(-1, 3)}
    assert len(different) == 4
    assert_rows(logits_of(base.model, ROWS), merged, ROWS)
    if (mesh, transport) != ((2, 4), "all_gather"):  # to decode, tokens are gathered in any case
        new = greedy(base.model, adapter_ids=ROWS)
        assert new == [merged[adapter][1][row] for row, adapter in enumerate(ROWS)]
        assert new != merged[-1][1]


@pytest.fixture(scope="module")
def resident(folder, adapters):
    """A model with two adapters."""
    base = load_base(folder, jnp.float32)
    attach_adapters(base.model, adapters[:2], base.fingerprint)
    return base.model


def test_adapters_are_exchanged_without_compiling(resident, adapters, merged):
    ids = [0, 1, -1, 0, 1, -1, 0, 1]
    assert_rows(logits_of(resident, ids), merged, ids)
    compiled = logits._cache_size()

    def holds(*numbers):
        assert_rows(logits_of(resident, ids), merged, [-1 if i < 0 else numbers[i] for i in ids])

    exchange_adapter(resident, 0, adapters[2])
    holds(2, 1)
    exchange_adapter(resident, 1, None)
    holds(2, -1)
    # Of as many experts, in other layers.
    exchange_adapter(resident, 0, adapters[1])
    exchange_adapter(resident, 1, adapters[0])
    holds(1, 0)
    with pytest.raises(InputError, match="6 experts; adapter 0 has room for 4"):
        exchange_adapter(resident, 0, adapters[3])
    exchange_adapter(resident, 0, adapters[0])
    exchange_adapter(resident, 1, adapters[1])
    holds(0, 1)
    assert logits._cache_size() == compiled


def test_rows_without_a_name_are_of_the_chosen_adapter(resident, merged):
    for adapter in (-1, 1, 0):
        choose_adapter(resident, adapter)
        assert_rows(logits_of(resident), merged, [adapter] * len(TOKENS))
        assert greedy(resident) == merged[adapter][1]
    choose_adapter(resident, -1)


def test_rows_of_no_adapter_are_not_answered(resident, merged):
    """Known at run time only: no numbers, rather than those of another adapter."""
    found = logits_of(resident, [0, 2, 1, -2, 0, 0, 0, 0])
    assert np.isnan(found[[1, 3]]).all()
    assert_rows(found[[0]], merged, [0])
    np.testing.assert_allclose(found[2], merged[1][0][2], atol=1e-5, rtol=1e-5)


def test_beside_a_quantised_base(folder, adapters):
    def base():
        how = Quantisation("int4", None, 8)
        return load_base(folder, jnp.float32, None, how)

    model, one = base(), base()
    attach_adapters(model.model, adapters[:2], model.fingerprint)
    apply_adapter(one.model, adapters[1], one.fingerprint)
    found, expected = logits_of(model.model, [1, -1] * 4), logits_of(one.model)
    np.testing.assert_allclose(found[::2], expected[::2], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found[1::2], logits_of(base().model)[1::2], atol=1e-5, rtol=1e-5)


def test_the_type_is_that_of_the_model(folder, adapters):
    base, one = load_base(folder, jnp.bfloat16), load_base(folder, jnp.bfloat16)
    attach_adapters(base.model, adapters[:1], base.fingerprint)
    apply_adapter(one.model, adapters[0], one.fingerprint)
    assert base.model.tuned_experts.gate_up[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(logits_of(base.model, [0] * 8), logits_of(one.model))


def test_what_does_not_fit_is_named(folder, adapters, resident, tmp_path):
    base = load_base(folder, jnp.float32)
    with pytest.raises(InputError, match="trained on another"):
        attach_adapters(base.model, adapters, "0" * 64)
    with pytest.raises(InputError, match="none is given; expected at least one"):
        attach_adapters(base.model, [])
    wide = save_trained(
        folder, tmp_path / "wide", ExpertConfig({0: (1,)}, also=("non_expert_modules",)), 0
    )
    with pytest.raises(InputError, match="wide: trains non_expert_modules, too; expected routed"):
        attach_adapters(base.model, [wide])
    assert base.model.tuned_experts is None
    with pytest.raises(InputError, match="the model has no resident adapters"):
        exchange_adapter(base.model, 0, adapters[0])
    with pytest.raises(InputError, match="adapter_ids: the model has no resident adapters"):
        base.model(TOKENS, adapter_ids=[0] * 8)
    with pytest.raises(InputError, match="adapter_ids: the model has no resident adapters"):
        greedy(base.model, adapter_ids=ROWS)

    with pytest.raises(InputError, match="has tuned experts or factors already"):
        attach_adapters(resident, adapters[:1])
    with pytest.raises(InputError, match="adapter_ids: row 0 is 2; expected -1 .* or 0 to 1"):
        choose_adapter(resident, 2)
    with pytest.raises(InputError, match="-1 is the base, which stays"):
        exchange_adapter(resident, -1, None)
    with pytest.raises(InputError, match="row 3 is 2; expected -1 for the base, or 0 to 1"):
        greedy(resident, adapter_ids=ROWS)
    with pytest.raises(InputError, match="are 1; expected 8, one for each prompt"):
        greedy(resident, adapter_ids=[0])
    with pytest.raises(InputError, match="row 1 is 7"):
        resident(TOKENS, adapter_ids=[0, 7, *[0] * 6])
    with pytest.raises(InputError, match=r"shape \(2,\); expected \(8,\), one for each row"):
        resident(TOKENS, adapter_ids=[0, 1])
    with pytest.raises(InputError, match="several adapters; expected a base"):
        ModelTensors(resident)
