"""Cross-entropy that never holds `[tokens, vocabulary]` logits."""

from functools import partial

import jax
import jax.numpy as jnp
from flax.struct import dataclass, field
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

# Positions per chunk; logits exist for one chunk of every row at a time.
CHUNK = 64


def cross_entropy_sum(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
) -> Float[Array, ""]:
    """Sum over tokens of weight times negative log-likelihood (nats), in float32.

    Chunks run along S, so that rows stay on their devices. When differentiated, the gradients
    are made in the same pass as the loss, since the loss is linear in its own cotangent: logits
    are computed once. `head` gets a gradient only where one is asked for.
    """
    length = hidden.shape[1]
    missing = -length % CHUNK if length > CHUNK else 0
    if missing:  # positions without weight fill the last chunk
        hidden, targets, weights = (
            jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
            for x in (hidden, targets, weights)
        )
    return _cross_entropy_sum(hidden, head, targets, weights)


@jax.custom_vjp
def _cross_entropy_sum(hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
    return _scan_chunks(hidden, head, targets, weights, hidden_grad=False, head_grad=False)[0]


@dataclass
class _Needed:
    """Trace-time facts: which gradients exist, and the types they must have."""

    dtypes: tuple = field(pytree_node=False)


def _forward(
    hidden: CustomVJPPrimal,
    head: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
) -> tuple[Array, tuple]:
    total, *grads = _scan_chunks(
        hidden.value,
        head.value,
        targets.value,
        weights.value,
        hidden_grad=hidden.perturbed,
        head_grad=head.perturbed,
    )
    return total, (*grads, _Needed((hidden.value.dtype, head.value.dtype)))


def _backward(residuals: tuple, cotangent: Array) -> tuple:
    *grads, needed = residuals
    scaled = (
        None if grad is None else (cotangent * grad).astype(dtype)
        for grad, dtype in zip(grads, needed.dtypes, strict=True)
    )
    return (*scaled, None, None)


_cross_entropy_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan_chunks(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    *,
    hidden_grad: bool,
    head_grad: bool,
) -> tuple[Array, Array | None, Array | None]:
    """The loss sum, and its gradients by `hidden` and by `head` where wanted."""
    batch, length, _ = hidden.shape
    chunk = min(CHUNK, length)
    matrix = head.astype(hidden.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)

    def step(carry: tuple, chunk: tuple[Array, Array, Array]) -> tuple[tuple, Array | None]:
        total, dhead = carry
        hidden, targets, weights = chunk
        logits = product("bsd,dv->bsv", hidden, matrix)
        top = logits.max(axis=-1, keepdims=True)
        exps = jnp.exp(logits - top)
        sums = exps.sum(axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        losses = (jnp.log(sums) + top - chosen)[..., 0]
        total = total + jnp.sum(losses * weights)
        if not (hidden_grad or head_grad):
            return (total, None), None
        weights = weights[..., None]
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        dlogits = (exps * (weights / sums) - jnp.where(hit, weights, 0)).astype(hidden.dtype)
        if head_grad:
            dhead = dhead + product("bsd,bsv->dv", hidden, dlogits)
        dhidden = product("bsv,dv->bsd", dlogits, matrix) if hidden_grad else None
        return (total, dhead), dhidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape) if head_grad else None)
    (total, dhead), dhidden = jax.lax.scan(
        step, start, (split(hidden), split(targets), split(weights))
    )
    if dhidden is not None:
        dhidden = jnp.moveaxis(dhidden, 0, 1).reshape(hidden.shape)
    return total, dhidden, dhead
