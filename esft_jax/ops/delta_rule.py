"""The gated delta rule (arXiv 2412.06464): a linear attention whose state forgets and corrects.

For each head a state maps keys to values. A token first fades it, then corrects what it says of the
token's key, and reads it with its query:

    state = exp(decay) state;  state += key (x) beta (value - key state);  out = query state

Tokens are taken in chunks, within which all of this is matrix products (the WY form, arXiv
2406.06484): with `u` the corrections of a chunk and `T = (I + beta K K' * fading)^-1`, where only
earlier tokens count,

    u = T beta (value - faded (key state)),  out = faded (query state) + (Q K' * fading) u

Letters: B rows, S tokens of each, M stretches of N chunks of C tokens; G key heads, each with J
value heads, H = G J; R features of a key, W of a value.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from esft_jax.ops.attention.operation import KEPT

# Tokens per chunk: more of them means more work within chunks, fewer means more steps.
CHUNK = 64
# Chunks per stretch, at most. The backward pass is given the state at the beginning of each
# stretch, and makes those of its chunks again, for one stretch at a time.
STRETCH = 16

# Added to the squared length of keys and queries, before the root.
NORM_EPS = 1e-6

# exp of anything below is 0 in float32.
_FADED = -128.0
# Decays are summed as multiples of this, exactly, and what is left over.
_STEP = 1 / 16
# Triangular matrices up to this size are inverted row by row.
_SMALLEST_BLOCK = 8


def gated_delta_rule(
    query: Float[Array, "B S G R"],
    key: Float[Array, "B S G R"],
    value: Float[Array, "B S H W"],
    decay: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    segment_ids: Int[Array, "B S"],
    state: Float[Array, "B H R W"] | None = None,
) -> tuple[Float[Array, "B S H W"], Float[Array, "B H R W"]]:
    """What every token reads, and the state after the last one; computed in float32.

    Queries and keys are divided by their lengths, and queries by the root of R. The value heads
    that share a key head follow one another.

    Args:
        decay: logarithm of the factor on the state, 0 or less.
        beta: share of the correction that is made, from 0 to 1.
        segment_ids: documents packed in a row, 1, 2, ...; each begins with an empty state. Tokens
            of segment 0 are padding and leave the state alone.
        state: float32, what the tokens before these left; the first document of each row goes on
            from it. Default: zeros.

    Raises:
        ValueError: shapes that do not fit together.
    """
    rows, length, key_heads, width = key.shape
    heads = value.shape[2]
    if query.shape != key.shape or heads % key_heads or not key_heads:
        raise ValueError(
            f"delta rule: query {query.shape}, key {key.shape}, value {value.shape}; expected as "
            "many queries as keys, and as many value heads, or a multiple"
        )
    if state is None:
        state = jnp.zeros((rows, heads, width, value.shape[3]), jnp.float32)
    if not length:
        return value, state
    real = segment_ids > 0
    documents = _documents(segment_ids)
    decay = jnp.where(real[..., None], decay.astype(jnp.float32), 0)
    beta = jnp.where(real[..., None], beta.astype(jnp.float32), 0)
    grouped = state.reshape(rows, key_heads, -1, width, value.shape[3])
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    chunks = -(-length // chunk)
    stretch = -(-chunks // -(-chunks // STRETCH))  # as even as can be, for there is padding behind
    padding = -length % (chunk * stretch)
    tokens = _Tokens(query, key, value, decay, beta)
    out, grouped = _delta_rule(
        _Tokens(*(_split(x, padding, chunk, stretch) for x in tokens)),
        _split(documents, padding, chunk, stretch, mode="edge"),
        grouped,
    )
    # [M, N, B, G, J, C, W]
    out = out.transpose(2, 0, 1, 5, 3, 4, 6).reshape(rows, -1, heads, value.shape[3])
    return out[:, :length], grouped.reshape(state.shape)


class _Tokens(NamedTuple):
    """What the rule meets, by chunks: `[*, B, C, ...]`, in the types it came in."""

    query: Array
    key: Array
    value: Array
    decay: Array
    beta: Array


def _documents(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Number of the document of each token, from 0; padding belongs to the one before it."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    last = jax.lax.cummax(jnp.where(segment_ids > 0, index, 0), axis=1)
    ids = jnp.take_along_axis(segment_ids, last, axis=1)
    begins = (ids[:, 1:] != ids[:, :-1]) & (ids[:, :-1] > 0)
    return jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))), axis=1)


def _split(x: Array, padding: int, chunk: int, stretch: int, mode: str = "constant") -> Array:
    """`[B, S, ...]` as `[M, N, B, C, ...]`."""
    x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)), mode=mode)
    x = x.reshape(x.shape[0], -1, stretch, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 0, 2)


class _Chunks(NamedTuple):
    """A stretch, ready for its products; float32.

    Attributes:
        query, key: `[N, B, G, C, R]`, of their final lengths.
        value: `[N, B, G, J, C, W]`.
        beta: `[N, B, G, J, C]`.
        same: `[N, B, C, C]`, which earlier tokens (and itself) are of a token's document.
        fading: `[N, B, G, J, C, C]`, of each of these until then; 0 for others.
        entering: `[N, B, G, J, C]`, fading of the state before the chunk until each token.
        leaving: `[N, B, G, J, C]`, of each token until the end of the chunk.
        through: `[N, B, G, J]`, of the state before the chunk until its end.
        key_key, query_key: `[N, B, G, C, C]`, products with earlier tokens; not with itself, of
            keys.
        solve: `[N, B, G, J, C, C]`, T.
    """

    query: Array
    key: Array
    value: Array
    beta: Array
    same: Array
    fading: Array
    entering: Array
    leaving: Array
    through: Array
    key_key: Array
    query_key: Array
    solve: Array


def _chunks(tokens: _Tokens, documents: Int[Array, "N B C"], before: Int[Array, " B"]) -> _Chunks:
    """Prepare a stretch.

    Args:
        before: the document that the state at its beginning is of.
    """
    query, key = _unit_lengths(tokens.query, tokens.key)
    heads = key.shape[2]

    def by_head(x: Array) -> Array:
        """`[N, B, C, H, ...]` as `[N, B, G, J, C, ...]`."""
        x = x.astype(jnp.float32).reshape(*x.shape[:3], heads, -1, *x.shape[4:])
        return jnp.moveaxis(x, 2, 4)

    value, decay, beta = by_head(tokens.value), by_head(tokens.decay), by_head(tokens.beta)
    same = jnp.tril(documents[..., :, None] == documents[..., None, :])
    previous = jnp.concatenate([before[None], documents[:-1, :, -1]])
    last = documents[..., -1:]
    # Differences of sums over a chunk would lose what is small beside the sums.
    decay = jnp.maximum(decay, _FADED)
    coarse = jnp.round(decay / _STEP) * _STEP
    coarse, fine = jnp.cumsum(coarse, axis=-1), jnp.cumsum(decay - coarse, axis=-1)

    def fade(whom: Bool[Array, "..."], between: Callable[[Array], Array]) -> Array:
        return jnp.where(whom[:, :, None, None], jnp.exp(between(coarse) + between(fine)), 0)

    fading = fade(same, lambda sums: sums[..., :, None] - sums[..., None, :])
    entering = fade(documents == previous[..., None], lambda sums: sums)
    leaving = fade(documents == last, lambda sums: sums[..., -1:] - sums)
    key_key = jnp.tril(_product("nbgcr,nbgdr->nbgcd", key, key), -1)
    query_key = _product("nbgcr,nbgdr->nbgcd", query, key)
    solve = _inverse(beta[..., None] * key_key[:, :, :, None] * fading)
    through = entering[..., -1]
    return _Chunks(
        query, key, value, beta, same, fading, entering, leaving, through, key_key, query_key, solve
    )


def _unit_lengths(query: Array, key: Array) -> tuple[Array, Array]:
    """`[N, B, C, G, R]` as float32 `[N, B, G, C, R]`, of unit length; queries also scaled."""

    def unit(x: Array) -> Array:
        x = jnp.moveaxis(x.astype(jnp.float32), 2, 3)
        return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + NORM_EPS)

    return unit(query) * query.shape[-1] ** -0.5, unit(key)


def _product(formula: str, *arrays: Array) -> Float[Array, "..."]:
    return jnp.einsum(formula, *arrays, preferred_element_type=jnp.float32)


def _inverse(lower: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """Of the identity plus a strictly lower triangular matrix whose size is a power of two.

    Blocks on the diagonal are inverted row by row, and merged two by two. Powers of the matrix
    would need no rows, but where keys are alike they grow until their sum has no digits left.
    """
    size = lower.shape[-1]
    block = min(size, _SMALLEST_BLOCK)
    matrices = lower.reshape(-1, size, size)

    def diagonal(width: int, below: int = 0) -> Array:
        """Blocks on the diagonal, or of every second one what lies below: `[*, width, width]`."""
        stride = width * (1 + below)
        starts = range(0, size, stride)
        parts = [
            matrices[:, i + below * width : i + stride, i : i + width][:, -width:] for i in starts
        ]
        return jnp.stack(parts, axis=1)

    # The many blocks are the last axis, which vector units go along.
    blocks = diagonal(block)
    rows = blocks.reshape(-1, block, block).transpose(1, 2, 0)

    def row(index: Array, found: Array) -> Array:
        return found.at[index].add(-jnp.sum(rows[index][:, None] * found, axis=0))

    identity = jnp.broadcast_to(jnp.eye(block)[..., None], rows.shape)
    found = jax.lax.fori_loop(1, block, row, identity)
    found = found.transpose(2, 0, 1).reshape(blocks.shape)
    multiply = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    while block < size:
        first, second = found[:, 0::2], found[:, 1::2]
        below = -multiply(multiply(second, diagonal(block, below=1)), first)
        upper = jnp.concatenate([first, jnp.zeros_like(below)], axis=-1)
        found = jnp.concatenate([upper, jnp.concatenate([below, second], axis=-1)], axis=-2)
        block *= 2
    return found.reshape(lower.shape)


@jax.custom_vjp
def _delta_rule(tokens: _Tokens, documents: Array, state: Array) -> tuple[Array, Array]:
    """What is read, `[M, N, B, G, J, C, W]`, and the last state `[B, G, J, R, W]`."""
    return _forward(tokens, documents, state)[0]


def _forward(tokens: _Tokens, documents: Array, state: Array) -> tuple[tuple, tuple]:
    def stretch(state: Array, part: tuple) -> tuple[Array, tuple]:
        chunks = _chunks(*part)
        after, out = jax.lax.scan(_read, state, chunks)
        return after, (out.astype(tokens.value.dtype), state)

    before = _before(documents)
    last, (out, states) = jax.lax.scan(stretch, state, (tokens, documents, before))
    out, states = checkpoint_name(out, KEPT), checkpoint_name(states, KEPT)
    return (out, last), (tokens, documents, states)


def _before(documents: Int[Array, "M N B C"]) -> Int[Array, "M B"]:
    """The document that the state is of, at the beginning of each stretch."""
    return jnp.concatenate([jnp.zeros_like(documents[:1, -1, :, -1]), documents[:-1, -1, :, -1]])


def _read(state: Float[Array, "B G J R W"], chunk: _Chunks) -> tuple[Array, Array]:
    """The state after a chunk, and what its tokens read."""
    both = jnp.concatenate([chunk.key, chunk.query], axis=2)
    said = _product("bgcr,bgjrw->bgjcw", both, state)
    of_keys, of_queries = jnp.split(said, 2, axis=3)
    after, corrections = _correct(state, chunk, of_keys)
    weights = chunk.query_key[:, :, None] * chunk.fading
    out = _product("bgjcd,bgjdw->bgjcw", weights, corrections)
    return after, out + chunk.entering[..., None] * of_queries


def _correct(
    state: Float[Array, "B G J R W"], chunk: _Chunks, said: Float[Array, "B G J C W"]
) -> tuple[Array, Array]:
    """The state after a chunk, and the corrections of its tokens, `[B, G, J, C, W]`.

    Args:
        said: what the state before the chunk says of its keys.
    """
    wrong = chunk.beta[..., None] * (chunk.value - chunk.entering[..., None] * said)
    corrections = _product("bgjcd,bgjdw->bgjcw", chunk.solve, wrong)
    left = chunk.leaving[..., None] * corrections
    added = _product("bgcr,bgjcw->bgjrw", chunk.key, left)
    return chunk.through[..., None, None] * state + added, corrections


def _backward(residuals: tuple, grads: tuple) -> tuple:
    tokens, documents, states = residuals
    dout, dlast = grads

    def stretch(dstate: Array, part: tuple) -> tuple[Array, _Tokens]:
        tokens, documents, before, state, dout = part
        return _stretch_gradients(tokens, documents, before, state, dout, dstate)

    parts = tokens, documents, _before(documents), states, dout
    dstate, dtokens = jax.lax.scan(stretch, dlast, parts, reverse=True)
    return dtokens, None, dstate


def _stretch_gradients(
    tokens: _Tokens,
    documents: Array,
    before: Array,
    state: Float[Array, "B G J R W"],
    dout: Float[Array, "N B G J C W"],
    dstate: Float[Array, "B G J R W"],
) -> tuple[Array, _Tokens]:
    """Gradients of the state before a stretch, and of its tokens.

    Decays need no gradients of matrices of their own. Whatever a token reads is multiplied by
    exp(d), d being the sum of decays up to it, and whatever it gives is divided by it, so that
    the gradient of d is `out . dout - value . dvalue`; at the end of a chunk, where the sum fades
    all of the state, it is `state . dstate`, too.
    """
    chunks = _chunks(tokens, documents, before)
    dout = dout.astype(jnp.float32)

    def correct(state: Array, chunk: _Chunks) -> tuple[Array, tuple]:
        said = _product("bgcr,bgjrw->bgjcw", chunk.key, state)
        after, corrections = _correct(state, chunk, said)
        return after, (state, corrections)

    _, (states, corrections) = jax.lax.scan(correct, state, chunks)
    weights = chunks.query_key[:, :, :, None] * chunks.fading
    dcorrections = _product("nbgjcd,nbgjcw->nbgjdw", weights, dout)
    dread = chunks.entering[..., None] * dout

    def back(dstate: Array, part: tuple) -> tuple[Array, tuple]:
        chunk, state, corrections, dcorrections, dread = part
        leaving, through = chunk.leaving[..., None], chunk.through[..., None, None]
        dleft = leaving * _product("bgcr,bgjrw->bgjcw", chunk.key, dstate)
        at_end = jnp.sum(dleft * corrections, axis=(-2, -1))
        at_end += jnp.sum(through * state * dstate, axis=(-2, -1))
        dcorrections += dleft
        dwrong = _product("bgjdc,bgjdw->bgjcw", chunk.solve, dcorrections)
        dsaid = -(chunk.beta * chunk.entering)[..., None] * dwrong
        dkey = _product("bgjcw,bgjrw->bgcr", leaving * corrections, dstate)
        dstate = through * dstate + _product(
            "bgcr,bgjcw->bgjrw",
            jnp.concatenate([chunk.key, chunk.query], axis=2),
            jnp.concatenate([dsaid, dread], axis=3),
        )
        return dstate, (dwrong, dkey, at_end)

    dstate, (dwrong, dkey, at_end) = jax.lax.scan(
        back, dstate, (chunks, states, corrections, dcorrections, dread), reverse=True
    )
    query, key, value, beta = chunks.query, chunks.key, chunks.value, chunks.beta
    # Of each value head for now: both are needed by key heads and by value heads.
    dread_keys = _product("nbgjcw,nbgjrw->nbgjcr", dwrong, states)
    dread_queries = _product("nbgjcw,nbgjrw->nbgjcr", dread, states)
    dquery_key = _product("nbgjcw,nbgjdw->nbgjcd", dout, corrections) * chunks.fading
    dkey_key = -_product("nbgjcw,nbgjdw->nbgjcd", dwrong, corrections) * chunks.fading
    dbeta = jnp.sum(dwrong * value, axis=-1)
    dbeta -= chunks.entering * jnp.sum(key[:, :, :, None] * dread_keys, axis=-1)
    dbeta += jnp.sum(dkey_key * chunks.key_key[:, :, :, None], axis=-1)
    dvalue = beta[..., None] * dwrong
    dsum = jnp.sum(query[:, :, :, None] * dread_queries, axis=-1)
    dsum += jnp.sum(dquery_key * chunks.query_key[:, :, :, None], axis=-1)
    dsum -= jnp.sum(value * dvalue, axis=-1)
    dsum = dsum.at[..., -1].add(at_end)
    ddecay = jnp.einsum("nbdc,nbgjd->nbgjc", chunks.same.astype(jnp.float32), dsum)
    by_query = jnp.sum(dquery_key, axis=3)
    by_key = jnp.tril(jnp.sum(beta[..., None] * dkey_key, axis=3), -1)
    dquery = jnp.sum(dread_queries, axis=3) + _product("nbgcd,nbgdr->nbgcr", by_query, key)
    dkey -= jnp.sum((beta * chunks.entering)[..., None] * dread_keys, axis=3)
    dkey += _product("nbgdc,nbgdr->nbgcr", by_query, query)
    dkey += _product("nbgcd,nbgdr->nbgcr", by_key + by_key.swapaxes(-2, -1), key)
    _, pull = jax.vjp(_unit_lengths, tokens.query, tokens.key)
    dgiven_query, dgiven_key = pull((dquery, dkey))

    def by_token(x: Array, like: Array) -> Array:
        return jnp.moveaxis(x, 4, 2).reshape(like.shape).astype(like.dtype)

    return dstate, _Tokens(
        dgiven_query,
        dgiven_key,
        by_token(dvalue, tokens.value),
        by_token(ddecay, tokens.decay),
        by_token(dbeta, tokens.beta),
    )


_delta_rule.defvjp(_forward, _backward)
