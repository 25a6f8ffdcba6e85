"""A short causal convolution of each feature along a row of packed documents.

Letters: B rows, S tokens of each, D features, K taps, the last for the token itself,
E = K - 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_convolution(
    x: Float[Array, "B S D"],
    weight: Float[Array, "K D"],
    segment_ids: Int[Array, "B S"],
    before: Float[Array, "B E D"] | None = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "B E D"]]:
    """`out[t] = sum_i weight[i] x[t - K + 1 + i]` over tokens of the same document, summed in
    float32; and the last E tokens, which a continuation of the row needs.

    Args:
        weight: of each tap.
        segment_ids: documents packed in a row, 1, 2, ...; 0 is padding.
        before: the E tokens before these, of the first document of each row, whose padding is
            behind its tokens. Default: zeros, as before every document.
    """
    length, taps = x.shape[1], len(weight)
    if before is None:
        before = jnp.zeros((len(x), taps - 1, x.shape[2]), x.dtype)
    tokens = jnp.concatenate([before, x], axis=1)
    first = jnp.broadcast_to(segment_ids[:, :1], before.shape[:2])
    ids = jnp.concatenate([first, segment_ids], axis=1)
    out = jnp.zeros(x.shape, jnp.float32)
    for tap in range(taps):
        part = slice(tap, tap + length)
        same = ids[:, part] == segment_ids
        tapped = jnp.where(same[..., None], tokens[:, part].astype(jnp.float32), 0)
        out += tapped * weight[tap].astype(jnp.float32)
    count = jnp.sum(segment_ids > 0, axis=1, keepdims=True)
    kept = count + jnp.arange(taps - 1)
    after = jnp.take_along_axis(tokens, kept[..., None], axis=1)
    last = jnp.take_along_axis(ids, count + taps - 2, axis=1)
    same = (jnp.take_along_axis(ids, kept, axis=1) == last) | (count == 0)
    return out.astype(x.dtype), jnp.where(same[..., None], after, 0)
