"""The shipped model: what its card promises that needs no corpus."""

from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from flax import nnx

import esft_jax
from tests.yardstick import torch

FOLDER = Path(__file__).parents[1] / "models" / "tiny-moe"
TEXTS = [
    "And God said, Let there be light: and there was light.",
    "def add(a, b):\n    return a + b\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_loads_it_unchanged_with_the_same_logits(text: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    tokens = tokenizer(text, return_tensors="np").input_ids
    assert tokens[0].tolist() == esft_jax.Tokenizer.load(FOLDER).encode(text)
    theirs = transformers.DeepseekV2ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    graph, params = nnx.split(esft_jax.load_model(FOLDER))
    found = jax.jit(lambda p, t: nnx.merge(graph, p)(t).logits)(params, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # It has learned something: uniform guessing would take log2(4096) = 12 bits per token.
    chosen = jax.nn.log_softmax(found)[0, :-1][np.arange(tokens.size - 1), tokens[0, 1:]]
    assert -chosen.mean() / np.log(2) < 8


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20e6
