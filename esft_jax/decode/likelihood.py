"""Log-likelihoods of given continuations.

Letters: B rows, S tokens of each, C of them scored.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from esft_jax.errors import InputError
from esft_jax.model.transformer import Transformer
from esft_jax.sharding import device_multiple, place_whole_batch

# Rows and continuations are padded to powers of two from here on: few shapes, so few compilations.
_SHORTEST_BUCKET = 16
# Positions whose logits exist at once, in every row.
_CHUNK = 64

Pair = tuple[Sequence[int], Sequence[int]]


def continuation_likelihoods(
    model: Transformer,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation (nats), and whether greedy decoding would produce it.

    On several processes all must call it with the same arguments, and all get every result.

    Args:
        pairs: token ids of a context and of the continuation to score, neither empty. A context is
            cut from the left where both do not fit.
        batch_size: pairs computed together, over all devices.
        max_length: tokens that the model reads of a pair, at most; default: the model's limit.
        advance: called with the number of pairs done since the last call.

    Raises:
        InputError: a part is empty, or a continuation longer than `max_length`; before any compute.
    """
    limit = max_length or model.config.max_positions
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise InputError(f"pair {number}: expected a token of context and of continuation")
        if len(continuation) > limit:
            raise InputError(
                f"pair {number}: a continuation of {len(continuation)} tokens; "
                f"expected at most {limit}"
            )
    graph, params = nnx.split(model)
    size = device_multiple(min(batch_size, len(pairs) or 1), model.mesh)
    lengths = [min(len(context) + len(rest) - 1, limit) for context, rest in pairs]
    # Longest first: if memory runs out, it does so at once.
    order = sorted(range(len(pairs)), key=lambda number: -lengths[number])
    results = [(0.0, False)] * len(pairs)
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        batch = _pad([pairs[number] for number in numbers], size, limit)
        found = _likelihoods(graph, params, place_whole_batch(batch, model.mesh))
        for number, total, greedy in zip(numbers, *map(np.asarray, found), strict=False):
            results[number] = (float(total), bool(greedy))
        if advance is not None:
            advance(len(numbers))
    return results


def _pad(pairs: Sequence[Pair], size: int, limit: int) -> dict[str, np.ndarray]:
    """Right-padded rows: `tokens` and `segment_ids` `[B, S]`, and for what is scored in them
    `positions`, `targets` and `scored` `[B, C]`. Nothing is scored in rows without a pair.
    """
    rows = [[*context, *rest][-(limit + 1) :] for context, rest in pairs]
    width = min(_bucket(max(map(len, rows)) - 1), limit)
    longest = min(_bucket(max(len(rest) for _, rest in pairs)), width)
    tokens = np.zeros((size, width), np.int32)
    segment_ids = np.zeros((size, width), np.int32)
    positions = np.zeros((size, longest), np.int32)
    targets = np.zeros((size, longest), np.int32)
    scored = np.zeros((size, longest), np.bool_)
    for row, (ids, (_, rest)) in enumerate(zip(rows, pairs, strict=True)):
        read, count = len(ids) - 1, len(rest)
        tokens[row, :read] = ids[:-1]
        segment_ids[row, :read] = 1
        positions[row, :count] = np.arange(read - count, read)
        targets[row, :count] = rest
        scored[row, :count] = True
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": positions,
        "targets": targets,
        "scored": scored,
    }


def _bucket(length: int) -> int:
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnames=("graph",))
def _likelihoods(
    graph: nnx.GraphDef, params: nnx.State, batch: dict[str, Array]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    model: Transformer = nnx.merge(graph, params)
    hidden, _ = model.hidden_states(batch["tokens"], batch["segment_ids"])
    hidden = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)
    # A continuation that fills all of the model's limit need not be a multiple of the chunk.
    missing = -hidden.shape[1] % min(hidden.shape[1], _CHUNK)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, min(x.shape[1], _CHUNK), *x.shape[2:]).swapaxes(0, 1)

    def score(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, targets, scored = part
        logits = model.logits(hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        logs = jnp.where(scored, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
        greedy = ~scored | (jnp.argmax(logits, axis=-1) == targets)
        return logs.sum(axis=1), greedy.all(axis=1)

    parts = (chunks(hidden), chunks(batch["targets"]), chunks(batch["scored"]))
    totals, greedy = jax.lax.map(score, parts)
    result = totals.sum(axis=0), greedy.all(axis=0)
    if model.mesh is not None:  # every process reads the whole result
        whole = NamedSharding(model.mesh, PartitionSpec())
        result = jax.lax.with_sharding_constraint(result, whole)
    return result
