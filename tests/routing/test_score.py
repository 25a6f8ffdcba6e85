import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esft_jax.families import read_model_config
from esft_jax.model import Transformer
from esft_jax.routing.groups import count_together
from esft_jax.routing.score import gate_shares, sample_scores, score_experts
from esft_jax.sharding import make_mesh, param_shardings

RAW = {
    "model_type": "deepseek_v2",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


def make_model(**options) -> Transformer:
    return Transformer(read_model_config(RAW), rngs=nnx.Rngs(0), **options)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model()


def make_rows(count: int) -> dict[str, np.ndarray]:
    """Rows of different lengths: 8 tokens, 9, 10, ... of 16, the rest padding."""
    rng = np.random.default_rng(0)
    lengths = 8 + np.arange(count)[:, None] % 8
    index = np.arange(16)[None]
    return {
        "tokens": rng.integers(0, 64, (count, 16)).astype(np.int32),
        "segment_ids": (index < lengths).astype(np.int32),
        "positions": np.broadcast_to(index, (count, 16)).astype(np.int32),
    }


def part(rows: dict[str, np.ndarray], *where: int) -> dict[str, np.ndarray]:
    return {key: value[slice(*where)] for key, value in rows.items()}


def test_scores_are_the_papers_formulas(model) -> None:
    """Equations 6 and 7, written out: mean over samples of the mean over each one's tokens."""
    rows = make_rows(4)
    scores = score_experts(model, [rows], {"from": "test"})
    graph, params = nnx.split(model)
    router = jax.jit(lambda p, r: nnx.merge(graph, p).hidden_states(**r)[1])(params, rows)
    ids, gates = np.asarray(router.expert_ids), np.asarray(router.gates)
    token, gate = np.zeros((2, 8)), np.zeros((2, 8))
    for layer in range(2):
        for row in range(4):
            length = rows["segment_ids"][row].sum()
            for position in range(length):
                for k in range(2):
                    expert = ids[layer, row, position, k]
                    token[layer, expert] += 1 / 2 / length / 4
                    gate[layer, expert] += gates[layer, row, position, k] / length / 4
    np.testing.assert_allclose(scores.token, token, rtol=1e-5)
    np.testing.assert_allclose(scores.gate, gate, rtol=1e-5)
    np.testing.assert_allclose(scores.token.sum(axis=1), 1, rtol=1e-5)
    assert scores.layers == (1, 2)
    real = rows["segment_ids"] > 0
    together = [count_together(ids[layer][real], 8) for layer in range(2)]
    np.testing.assert_array_equal(scores.together, together)
    assert scores.provenance == {
        "from": "test",
        "samples": 4,
        "tokens": int(rows["segment_ids"].sum()),
    }


def test_scores_do_not_depend_on_batches_or_padding_rows(model) -> None:
    rows = make_rows(6)
    whole = score_experts(model, [rows])
    last = part(rows, 4, 6)
    padded = {key: np.concatenate([value, np.zeros_like(value)]) for key, value in last.items()}
    split = score_experts(model, [part(rows, 0, 4), padded])
    assert split.provenance == whole.provenance
    np.testing.assert_allclose(split.token, whole.token, rtol=1e-5)
    np.testing.assert_allclose(split.gate, whole.gate, rtol=1e-5)
    np.testing.assert_array_equal(split.together, whole.together)


def test_scores_on_a_mesh_equal_those_of_one_device(model) -> None:
    mesh = make_mesh(2, 4)
    sharded = make_model(mesh=mesh)
    params = nnx.state(sharded)
    nnx.update(sharded, jax.device_put(params, param_shardings(params, mesh)))
    rows = make_rows(8)
    one, other = score_experts(model, [rows]), score_experts(sharded, [rows])
    np.testing.assert_allclose(one.token, other.token, rtol=1e-5)
    np.testing.assert_allclose(one.gate, other.gate, rtol=1e-4)
    np.testing.assert_array_equal(one.together, other.together)
    np.testing.assert_array_equal(one.routing.tokens, other.routing.tokens)
    np.testing.assert_array_equal(one.routing.expert_ids, other.routing.expert_ids)


def test_the_routing_is_kept_by_document(model) -> None:
    rows = make_rows(4)
    rows["segment_ids"][1, 5:9] = 2  # two documents of 5 and 4 tokens in the second row of 9
    scores = score_experts(model, [part(rows, 0, 2), part(rows, 2, 4)])
    log = scores.routing
    assert log is not None
    np.testing.assert_array_equal(log.starts, [0, 8, 13, 17, 27, 38])
    np.testing.assert_array_equal(log.tokens, rows["tokens"][rows["segment_ids"] > 0])
    # Its sums, averaged as the paper does, are the scores.
    counts, gates = log.sequence_sums()
    samples = [[0], [1, 2], [3], [4]]
    lengths = np.diff(log.starts)
    for sums, expected in ((counts / 2, scores.token), (gates, scores.gate)):
        means = [sums[s].sum(axis=0) / lengths[s].sum() for s in samples]
        np.testing.assert_allclose(np.mean(means, axis=0), expected, rtol=1e-3)


def test_the_routing_of_so_many_tokens_is_kept(model, monkeypatch) -> None:
    rows = make_rows(6)
    monkeypatch.setattr("esft_jax.routing.score.ROUTING_TOKENS", 20)
    scores = score_experts(model, [part(rows, row, row + 1) for row in range(6)])
    assert scores.provenance["tokens"] == rows["segment_ids"].sum()
    np.testing.assert_array_equal(scores.routing.starts, [0, 8, 17])  # a third one has 10 tokens
    assert scores.routing.gates.shape[1] == len(scores.routing.tokens) == 17
    # The same of one batch, and one document at least.
    np.testing.assert_array_equal(score_experts(model, [rows]).routing.starts, [0, 8, 17])
    monkeypatch.setattr("esft_jax.routing.score.ROUTING_TOKENS", 5)
    np.testing.assert_array_equal(score_experts(model, [rows]).routing.starts, [0, 8])


def test_gate_scores_leave_out_the_routers_scaling_factor(model) -> None:
    config = read_model_config(RAW | {"routed_scaling_factor": 16.0})
    # One MoE layer's routing does not depend on the factor: it sees no scaled output yet.
    scaled = Transformer(config, rngs=nnx.Rngs(0))
    rows = make_rows(2)
    one, other = score_experts(model, [rows]), score_experts(scaled, [rows])
    np.testing.assert_allclose(other.gate[0], one.gate[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("raw", "methods"),
    [
        (RAW, ("token", "gate", "gate_share")),
        (RAW | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}, ("token", "gate_share")),
        (
            RAW
            | {"model_type": "deepseek_v3", "routed_scaling_factor": 2.5}
            | {"n_group": 2, "topk_group": 1, "norm_topk_prob": True},
            ("token", "gate_share"),
        ),
    ],
    ids=["softmax", "softmax-renormalised", "sigmoid-biased"],
)
def test_gate_shares_are_of_unbiased_scores_without_the_scale(raw, methods) -> None:
    config = read_model_config(raw)
    model = Transformer(config, rngs=nnx.Rngs(0))
    if config.router.selection_bias:
        # Larger than any score: it decides the choice, and must not be in a share.
        bias = model.moe_blocks.moe.router.selection_bias
        bias[...] = 5 * jax.random.normal(jax.random.key(1), bias.shape)
    rows = make_rows(3)
    scores = score_experts(model, [rows])
    assert scores.methods == methods
    expected = np.zeros((len(config.moe_layers), 8))
    for row in range(3):
        one = jax.tree.map(jnp.asarray, part(rows, row, row + 1))
        keep = one["segment_ids"][0] > 0
        _, router = model.hidden_states(one["tokens"], one["segment_ids"], one["positions"])
        ids, unbiased = (np.asarray(x)[:, 0, keep] for x in (router.expert_ids, router.scores))
        for layer, (chosen, all_scores) in enumerate(zip(ids, unbiased, strict=True)):
            for k, s in zip(chosen, all_scores, strict=True):
                expected[layer, k] += s[k] / s[k].sum() / keep.sum() / 3
    np.testing.assert_allclose(scores.gate_share, expected, rtol=1e-5)
    np.testing.assert_allclose(scores.gate_share.sum(axis=1), 1, rtol=1e-5)


def test_gates_that_have_vanished_have_no_share() -> None:
    gates = jnp.array([[0.0, 0.0], [0.2, 0.6]], jnp.float32)
    np.testing.assert_allclose(gate_shares(gates), [[0, 0], [0.25, 0.75]])


def test_without_tokens_there_is_no_score(model) -> None:
    rows = make_rows(2)
    with pytest.raises(ValueError, match="no sample to score"):
        score_experts(model, [rows | {"segment_ids": np.zeros_like(rows["segment_ids"])}])


def test_phantom_experts_are_not_counted() -> None:
    ids = jnp.array([[[[0, 1], [8, 8]]]])
    gates = jnp.array([[[[0.5, 0.25], [0.0, 0.0]]]], jnp.float32)
    token, gate = sample_scores(ids, gates, 8)
    np.testing.assert_allclose(token[0, :2], [0.5, 0.5])
    np.testing.assert_allclose(gate[0, :2], [0.5, 0.25])
