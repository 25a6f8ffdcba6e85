"""Decoding with the compressed cache against running whole sequences."""

import jax
import numpy as np
from flax import nnx

from tests.model.parity import run

PROMPTS, STEPS, SLOTS = np.array([5, 3, 1, 4]), 4, 10


def test_prefill_and_steps_equal_full_sequences(pair):
    rows, width = len(PROMPTS), PROMPTS.max()
    tokens = np.random.default_rng(2).integers(1, 96, (rows, 12)).astype(np.int32)
    full = run(pair.jax, tokens, np.ones_like(tokens)).logits
    graph, params = nnx.split(pair.jax)
    decode = jax.jit(lambda params, *xs: nnx.merge(graph, params).decode(*xs))

    index = np.broadcast_to(np.arange(width), (rows, width))
    keep = index < PROMPTS[:, None]
    # What stands in the padded slots must not matter.
    prompt = np.where(keep, tokens[:, :width], 50)
    logits, cache = decode(params, prompt, index, keep, pair.jax.init_cache(rows, SLOTS))
    np.testing.assert_allclose(logits[keep], full[:, :width][keep], atol=1e-4, rtol=0)
    assert cache[0].latent.shape == (4, rows, SLOTS, pair.config.attention.latent)

    row = np.arange(rows)
    for step in range(STEPS):
        place = PROMPTS + step
        logits, cache = decode(
            params, tokens[row, place][:, None], place[:, None], np.ones((rows, 1), bool), cache
        )
        np.testing.assert_allclose(logits[:, 0], full[row, place], atol=1e-4, rtol=0)
