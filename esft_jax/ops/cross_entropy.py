"""Cross-entropy that never holds `[tokens, vocabulary]` logits.

Letters: B rows, S tokens of each, T = B * S tokens, N chunks of them, D model width, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.struct import dataclass, field
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from esft_jax.sharding import DATA, EXPERT, REPLICA, RULES

# Tokens of a chunk for each row; logits exist for one chunk at a time.
CHUNK = 64


def cross_entropy_sums(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array | np.ndarray, "B S"],
    weights: Float[Array | np.ndarray, "B S"],
    mesh: Mesh | None = None,
    cap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, " B"]]:
    """Sum over tokens of weight times negative log-likelihood (nats), in float32, and of each row.

    Only the sum over all can be differentiated.

    Tokens with a weight are brought together, so that the head meets few others: none of a chat's
    questions, and no padding. When differentiated, the gradients are made in the same pass as the
    loss, since the loss is linear in its own cotangent: logits are computed once. `head` gets a
    gradient only where one is asked for.

    On a mesh, the devices of an expert group share the vocabulary out: each meets its words with
    the tokens of the whole group (Megatron-LM, arXiv 1909.08053, section 3), so that no device
    ever holds the whole head. A vocabulary that the mesh does not divide is whole on all.

    Args:
        cap: see `soft_cap`.
    """
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    total, rows = _cross_entropy_sums(mesh, cap, hidden, head, targets, weights)
    return total, jax.lax.stop_gradient(rows)


def soft_cap(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Logits kept within both signs of a bound, smoothly: `cap tanh(logits / cap)`; None: as they
    are.
    """
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy_sums(
    mesh: Mesh | None,
    cap: float | None,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, Array]:
    return _with_gradients(
        mesh, cap, hidden, head, targets, weights, hidden_grad=False, head_grad=False
    )[0]


@dataclass
class _Needed:
    """Trace-time facts: which gradients exist, and the types they must have."""

    dtypes: tuple = field(pytree_node=False)


def _forward(
    mesh: Mesh | None,
    cap: float | None,
    hidden: CustomVJPPrimal,
    head: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
) -> tuple[tuple[Array, Array], tuple]:
    sums, *grads = _with_gradients(
        mesh,
        cap,
        hidden.value,
        head.value,
        targets.value,
        weights.value,
        hidden_grad=hidden.perturbed,
        head_grad=head.perturbed,
    )
    return sums, (*grads, _Needed((hidden.value.dtype, head.value.dtype)))


def _backward(
    mesh: Mesh | None, cap: float | None, residuals: tuple, cotangents: tuple[Array, Any]
) -> tuple:
    *grads, needed = residuals
    cotangent, _ = cotangents
    scaled = (
        None if grad is None else (cotangent * grad).astype(dtype)
        for grad, dtype in zip(grads, needed.dtypes, strict=True)
    )
    return (*scaled, None, None)


_cross_entropy_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _with_gradients(
    mesh: Mesh | None,
    cap: float | None,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    *,
    hidden_grad: bool,
    head_grad: bool,
) -> tuple[tuple[Array, Array], Array | None, Array | None]:
    """The loss sum and that of each row; gradients by `hidden` and by `head` where wanted."""
    scan = partial(_scan_chunks, cap=cap, hidden_grad=hidden_grad, head_grad=head_grad)
    if mesh is None or mesh.size == 1:
        return scan(hidden, head, targets, weights)
    columns = RULES.spec((None, "vocab"), head.shape, mesh)
    is_split = columns[1] is not None

    def on_shard(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple:
        group = EXPERT if is_split else None
        if is_split:
            head = jax.lax.all_gather(head, DATA, axis=1, tiled=True)
        (total, rows), dhidden, dhead = scan(hidden, head, targets, weights, group=group)
        if dhead is not None and is_split:
            dhead = jax.lax.psum_scatter(dhead, DATA, scatter_dimension=1, tiled=True)
            dhead = jax.lax.psum(dhead, REPLICA)
        elif dhead is not None:
            dhead = jax.lax.psum(dhead, RULES.batch)
        return jax.lax.psum(total, RULES.batch), dhead, rows, dhidden

    batch = PartitionSpec(RULES.batch)
    total, dhead, rows, dhidden = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(batch, columns, batch, batch),
        out_specs=(PartitionSpec(), columns, batch, batch),
        check_vma=False,
    )(hidden, head, targets, weights)
    return (total, rows), dhidden, dhead


def _scan_chunks(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    *,
    cap: float | None,
    hidden_grad: bool,
    head_grad: bool,
    group: str | None = None,
) -> tuple[tuple[Array, Array], Array | None, Array | None]:
    """As `_with_gradients`, on one device.

    Args:
        group: mesh axis whose devices hold consecutive parts of the vocabulary, and rows of their
            own. The head gradient is that of all rows of the group.
    """
    batch, length, width = hidden.shape
    size, tokens = batch * min(CHUNK, length), batch * length
    order, place, needed = _weighted_first(weights.reshape(-1), size)
    if group is not None:  # what exchanges data in a chunk must do so on all devices
        needed = jax.lax.pmax(needed, (DATA, group))
    matrix = head.astype(hidden.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def compute(dhead: Array | None, chosen: Array) -> tuple[Array | None, Array, Array | None]:
        # Past the last token there is none: its weight is 0.
        own = [
            jnp.take(x.reshape(tokens, -1), chosen, axis=0, mode="fill", fill_value=0)
            for x in (hidden, targets, weights)
        ]
        if group is not None:
            own = [jax.lax.all_gather(x, group, tiled=True) for x in own]
        rows, words, row_weights = own
        if group is not None:
            words = words - jax.lax.axis_index(group) * matrix.shape[1]
        logits = soft_cap(product("td,dv->tv", rows, matrix), cap)
        top = logits.max(axis=-1, keepdims=True)
        if group is not None:
            top = jax.lax.pmax(top, group)
        exps = jnp.exp(logits - top)
        sums = exps.sum(axis=-1, keepdims=True)
        here = (words >= 0) & (words < logits.shape[-1])
        target = jnp.take_along_axis(logits, jnp.where(here, words, 0), axis=-1)
        target = jnp.where(here, target, 0)
        if group is not None:
            sums, target = jax.lax.psum((sums, target), group)
        losses = (row_weights * (jnp.log(sums) + top - target))[:, 0]
        if group is not None:
            losses = jax.lax.dynamic_slice_in_dim(losses, jax.lax.axis_index(group) * size, size)
        if not (hidden_grad or head_grad):
            return None, losses, None
        hit = jnp.arange(logits.shape[-1]) == words
        dlogits = exps * (row_weights / sums) - jnp.where(hit, row_weights, 0)
        if cap is not None:
            dlogits *= 1 - (logits / cap) ** 2
        dlogits = dlogits.astype(hidden.dtype)
        if dhead is not None:
            # In parts, since XLA turns a whole matrix around slowly on a CPU.
            parts = (x.reshape(batch, -1, x.shape[-1]) for x in (rows, dlogits))
            dhead = dhead + product("btd,btv->dv", *parts)
        drows = product("tv,dv->td", dlogits, matrix) if hidden_grad else None
        if drows is not None and group is not None:
            drows = jax.lax.psum_scatter(drows, group, tiled=True)
        return dhead, losses, drows

    def skip(dhead: Array | None, chosen: Array) -> tuple[Array | None, Array, Array | None]:
        drows = jnp.zeros((size, width), jnp.float32) if hidden_grad else None
        return dhead, jnp.zeros(size, jnp.float32), drows

    def step(
        dhead: Array | None, chunk: tuple[Array, Array]
    ) -> tuple[Array | None, tuple[Array, Array | None]]:
        index, chosen = chunk
        dhead, losses, drows = jax.lax.cond(index < needed, compute, skip, dhead, chosen)
        return dhead, (losses, drows)

    dhead, (losses, drows) = jax.lax.scan(
        step,
        jnp.zeros(head.shape) if head_grad else None,
        (jnp.arange(len(order), dtype=jnp.int32), order),
    )
    by_row = losses.reshape(-1)[place].reshape(batch, length).sum(axis=1)
    dhidden = None
    if drows is not None:
        dhidden = drows.reshape(-1, width)[place].reshape(hidden.shape)
    return (by_row.sum(), by_row), dhidden, dhead


def _weighted_first(
    weights: Float[Array, " T"], size: int
) -> tuple[Int[Array, "N size"], Int[Array, " T"], Int[Array, ""]]:
    """Chunks of tokens, those with a weight first.

    Returns:
        The tokens of each of N chunks, T past the last; the place of each token in them, one chunk
        after the other; and how many chunks hold a weight.
    """
    has_weight = weights != 0
    count = has_weight.sum(dtype=jnp.int32)
    among = jnp.cumsum(has_weight, dtype=jnp.int32)
    index = jnp.arange(len(weights), dtype=jnp.int32)
    place = jnp.where(has_weight, among - 1, count + index - among)
    chunks = -(-len(weights) // size)
    order = jnp.full(chunks * size, len(weights), jnp.int32)
    order = order.at[place].set(index, unique_indices=True)
    return order.reshape(chunks, size), place, -(-count // size)
