"""Cross-entropy that never holds `[tokens, vocabulary]` logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.struct import dataclass, field
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from esft_jax.mesh import DATA, EXPERT, REPLICA, RULES

# Positions per chunk; logits exist for one chunk of every row at a time.
CHUNK = 64


def cross_entropy_sums(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Float[Array, " B"]]:
    """Sum over tokens of weight times negative log-likelihood (nats), in float32, and of each row.

    Only the sum over all can be differentiated.

    Chunks run along S, so that rows stay on their devices. When differentiated, the gradients
    are made in the same pass as the loss, since the loss is linear in its own cotangent: logits
    are computed once. `head` gets a gradient only where one is asked for.

    On a mesh, the devices of an expert group share the vocabulary out: each meets its words with
    the tokens of the whole group (Megatron-LM, arXiv 1909.08053, section 3), so that no device
    ever holds the whole head. A vocabulary that the mesh does not divide is whole on all.
    """
    length = hidden.shape[1]
    missing = -length % CHUNK if length > CHUNK else 0
    if missing:  # positions without weight fill the last chunk
        hidden, targets, weights = (
            jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
            for x in (hidden, targets, weights)
        )
    total, rows = _cross_entropy_sums(mesh, hidden, head, targets, weights)
    return total, jax.lax.stop_gradient(rows)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy_sums(
    mesh: Mesh | None, hidden: Array, head: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    return _with_gradients(
        mesh, hidden, head, targets, weights, hidden_grad=False, head_grad=False
    )[0]


@dataclass
class _Needed:
    """Trace-time facts: which gradients exist, and the types they must have."""

    dtypes: tuple = field(pytree_node=False)


def _forward(
    mesh: Mesh | None,
    hidden: CustomVJPPrimal,
    head: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
) -> tuple[tuple[Array, Array], tuple]:
    sums, *grads = _with_gradients(
        mesh,
        hidden.value,
        head.value,
        targets.value,
        weights.value,
        hidden_grad=hidden.perturbed,
        head_grad=head.perturbed,
    )
    return sums, (*grads, _Needed((hidden.value.dtype, head.value.dtype)))


def _backward(mesh: Mesh | None, residuals: tuple, cotangents: tuple[Array, Any]) -> tuple:
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
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    *,
    hidden_grad: bool,
    head_grad: bool,
) -> tuple[tuple[Array, Array], Array | None, Array | None]:
    """The loss sum and that of each row; gradients by `hidden` and by `head` where wanted."""
    scan = partial(_scan_chunks, hidden_grad=hidden_grad, head_grad=head_grad)
    if mesh is None or mesh.size == 1:
        return scan(hidden, head, targets, weights)
    columns = RULES.spec((None, "vocab"), head.shape, mesh)
    is_split = columns[1] is not None

    def on_shard(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple:
        if not is_split:
            (total, rows), dhidden, dhead = scan(hidden, head, targets, weights)
            return *jax.lax.psum((total, dhead), RULES.batch), rows, dhidden
        head = jax.lax.all_gather(head, DATA, axis=1, tiled=True)
        (total, rows), dhidden, dhead = scan(hidden, head, targets, weights, group=EXPERT)
        if dhead is not None:
            dhead = jax.lax.psum_scatter(dhead, DATA, scatter_dimension=1, tiled=True)
            dhead = jax.lax.psum(dhead, REPLICA)
        own = len(hidden)  # of the rows of the group
        rows = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(EXPERT) * own, own)
        return jax.lax.psum(total, (REPLICA, DATA)), dhead, rows, dhidden

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
    hidden_grad: bool,
    head_grad: bool,
    group: str | None = None,
) -> tuple[tuple[Array, Array], Array | None, Array | None]:
    """As `_with_gradients`, on one device.

    Args:
        group: mesh axis whose devices hold consecutive parts of the vocabulary, and rows of their
            own. Sums and head gradient are those of all rows of the group.
    """
    batch, length, _ = hidden.shape
    chunk = min(CHUNK, length)
    matrix = head.astype(hidden.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)

    def step(carry: tuple, chunk: tuple[Array, Array, Array]) -> tuple[tuple, Array | None]:
        total, rows, dhead = carry
        hidden, targets, weights = chunk
        words = targets[..., None]
        if group is not None:
            hidden, words, weights = (
                jax.lax.all_gather(x, group, tiled=True) for x in (hidden, words, weights)
            )
            words = words - jax.lax.axis_index(group) * matrix.shape[1]
        logits = product("bsd,dv->bsv", hidden, matrix)
        top = logits.max(axis=-1, keepdims=True)
        if group is not None:
            top = jax.lax.pmax(top, group)
        exps = jnp.exp(logits - top)
        sums = exps.sum(axis=-1, keepdims=True)
        here = (words >= 0) & (words < logits.shape[-1])
        chosen = jnp.take_along_axis(logits, jnp.where(here, words, 0), axis=-1)
        chosen = jnp.where(here, chosen, 0)
        if group is not None:
            sums, chosen = jax.lax.psum((sums, chosen), group)
        losses = (jnp.log(sums) + top - chosen)[..., 0]
        total = total + jnp.sum(losses * weights)
        rows = rows + jnp.sum(losses * weights, axis=1)
        if not (hidden_grad or head_grad):
            return (total, rows, None), None
        weights = weights[..., None]
        hit = jnp.arange(logits.shape[-1]) == words
        dlogits = (exps * (weights / sums) - jnp.where(hit, weights, 0)).astype(hidden.dtype)
        if head_grad:
            dhead = dhead + product("bsd,bsv->dv", hidden, dlogits)
        dhidden = product("bsv,dv->bsd", dlogits, matrix) if hidden_grad else None
        if dhidden is not None and group is not None:
            dhidden = jax.lax.psum_scatter(dhidden, group, tiled=True)
        return (total, rows, dhead), dhidden

    group_rows = batch if group is None else batch * jax.lax.axis_size(group)
    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(group_rows, jnp.float32),
        jnp.zeros(head.shape) if head_grad else None,
    )
    (total, rows, dhead), dhidden = jax.lax.scan(
        step, start, (split(hidden), split(targets), split(weights))
    )
    if dhidden is not None:
        dhidden = jnp.moveaxis(dhidden, 0, 1).reshape(hidden.shape)
    return (total, rows), dhidden, dhead
