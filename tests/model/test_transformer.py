"""The whole model against transformers, with padding and packed documents."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.model.parity import SHAPE, make_pair, run
from tests.yardstick import torch

LENGTH, A, B = 12, 7, 4


@pytest.fixture(scope="module")
def batch():
    """A full row; documents A and B alone, padded; both packed into one row."""
    tokens = np.random.default_rng(1).integers(1, 96, (4, LENGTH)).astype(np.int32)
    segments = np.ones((4, LENGTH), np.int32)
    segments[1, A:] = segments[2, B:] = 0
    tokens[3] = np.concatenate([tokens[1, :A], tokens[2, :B], [0]])
    segments[3] = [1] * A + [2] * B + [0]
    tokens[segments == 0] = 0
    return tokens, segments


@pytest.fixture(scope="module")
def out(pair, batch):
    return run(pair.jax, *batch)


def test_logits_are_those_of_transformers(pair, batch, out):
    tokens, segments = (x[:3] for x in batch)
    with torch.no_grad():
        expected = pair.torch(
            torch.tensor(tokens), attention_mask=torch.tensor(segments), use_cache=False
        ).logits
    keep = segments > 0
    np.testing.assert_allclose(out.logits[:3][keep], expected.numpy()[keep], atol=1e-4, rtol=0)
    assert out.logits.std() > 0.5  # so that the tolerance means something


def test_packed_documents_are_those_run_alone(out):
    for packed, alone in ((np.s_[3, :A], np.s_[1, :A]), (np.s_[3, A : A + B], np.s_[2, :B])):
        np.testing.assert_allclose(out.logits[packed], out.logits[alone], atol=1e-5)
        ids = out.router.expert_ids
        np.testing.assert_array_equal(ids[:, *packed], ids[:, *alone])


def test_router_output_of_padding_is_the_phantom_expert(pair, batch, out):
    pad = batch[1] == 0
    layers, top_k = len(pair.config.moe_layers), pair.config.router.top_k
    assert out.router.expert_ids.shape == (layers, 4, LENGTH, top_k)
    assert (out.router.expert_ids[:, pad] == pair.config.router.num_experts).all()
    assert (out.router.expert_ids[:, ~pad] < pair.config.router.num_experts).all()
    assert not out.router.gates[:, pad].any() and (out.router.gates[:, ~pad] > 0).all()


def test_padded_tokens_change_nothing(pair, batch, out):
    tokens, segments = batch
    pad = segments == 0
    changed = run(pair.jax, np.where(pad, 77, tokens), segments)
    np.testing.assert_array_equal(changed.logits[~pad], out.logits[~pad])
    jax.tree.map(np.testing.assert_array_equal, changed.router, out.router)
    assert (changed.logits[pad] != out.logits[pad]).any()


def test_tied_head_and_no_dense_layer(tmp_path, batch):
    changes = {"tie_word_embeddings": True, "num_hidden_layers": 2, "first_k_dense_replace": 0}
    pair = make_pair(tmp_path, **SHAPE | changes)
    assert not {"head", "dense_blocks"} & {
        path[0] for path, _ in nnx.to_flat_state(nnx.state(pair.jax))
    }
    tokens = batch[0][:1]
    with torch.no_grad():
        expected = pair.torch(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(run(pair.jax, tokens).logits, expected, atol=1e-4, rtol=0)
