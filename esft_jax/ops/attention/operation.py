"""Causal attention; how it is computed is left to an implementation.

Letters: B rows, S tokens, H heads, R query/key width, W value width. An implementation is a module
with a differentiable `causal_attention`, as below without the last argument.
"""

from importlib import import_module
from typing import Literal, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from esft_jax.ops.platform import fastest_implementation

# Modules of this package, imported when used: kernel languages are slow to import.
Implementation = Literal["cpu", "gpu", "tpu", "xla"]

# The name, for `jax.checkpoint` policies, of what the backward pass needs of the forward pass
# beside queries, keys and values: the result, and one number per query.
KEPT = "attention"


def causal_attention(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S G R"],
    value: Float[Array, "B S G W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
    *,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B S H W"]:
    """Attention to earlier tokens of the same segment; nothing of size `[S, S]` is ever held.

    Args:
        scale: factor of the scores before the softmax, which is computed in float32.
        window: how many tokens a query sees, its own and those right before it; None: all.
        sinks: a logit per head that joins the denominator of its softmaxes, float32; None: none.
        implementation: how it is computed; None takes the one made for the platform that the
            surrounding mesh, or else JAX's default device, belongs to. The kernels know no
            partitioning: on a mesh, call this inside `shard_map`.

    Raises:
        ValueError: `implementation` is unknown, a window without tokens, types other than float32
            and bfloat16, or shapes that do not fit together.
    """
    check_operands(query, key, value, sinks)
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"attention: {query.shape[1]} queries and {key.shape[1]} keys in a row")
    segment_ids = jnp.asarray(segment_ids)
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer) or segment_ids.shape != query.shape[:2]:
        raise ValueError(
            f"attention: segment_ids is {segment_ids.dtype} {segment_ids.shape}; expected integers "
            f"{query.shape[:2]}, one for each token"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: a window of {window} tokens; expected 1 at least")
    if value.size == 0:
        return jnp.zeros((*query.shape[:3], value.shape[3]), value.dtype)
    if window is not None and window >= query.shape[1]:
        window = None
    if implementation is None:
        implementation = implementation_for(query.dtype)
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"attention: implementation {implementation!r} is not one of {known}")
    module = import_module(f"esft_jax.ops.attention.{implementation}")
    return module.causal_attention(query, key, value, segment_ids, scale, window, sinks)


def implementation_for(dtype: DTypeLike) -> Implementation:
    """What suits the platform compiled for, by the type of queries, keys and values."""
    fastest = fastest_implementation()
    return "xla" if fastest == "cpu" and jnp.dtype(dtype) != jnp.float32 else fastest


def sinks_or_default(sinks: Float[Array, " H"] | None, heads: int) -> Float[Array, " H"]:
    """Sinks for code that always has some: one of minus infinity adds nothing."""
    return jnp.full(heads, -jnp.inf, jnp.float32) if sinks is None else sinks


def sinks_gradient(
    sinks: Float[Array, " H"], denominators: Float[Array, "B H S"], mean: Float[Array, "B H S"]
) -> Float[Array, " H"]:
    """The sinks' gradient. A sink has a weight in each softmax, but a value of zero, so that only
    what the softmax takes off every score's gradient is left of its own.

    Args:
        denominators: logarithms of the softmaxes' denominators, sinks included.
        mean: per query, the sum of all weights' gradients times these weights.
    """
    return -(jnp.exp(sinks[:, None] - denominators) * mean).sum(axis=(0, 2))


def check_operands(query: Array, key: Array, value: Array, sinks: Array | None = None) -> None:
    """Refuse what does not fit together: kernels compute addresses from these shapes.

    Raises:
        ValueError: it names shapes, types or what is wrong with them.
    """
    arrays = {"query": query, "key": key, "value": value}
    found = ", ".join(f"{name} {x.dtype} {x.shape}" for name, x in arrays.items())
    if any(x.ndim != 4 for x in arrays.values()):
        raise ValueError(f"attention: {found}; expected [rows, tokens, heads, width] of each")
    if query.dtype not in (jnp.float32, jnp.bfloat16) or {query.dtype} != {key.dtype, value.dtype}:
        raise ValueError(f"attention: {found}; expected float32 or bfloat16, the same for all")
    if key.shape[2] != value.shape[2] or not key.shape[2] or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"attention: {found}; expected as many heads of keys as of values, and of queries as "
            "many, or a multiple"
        )
    if not len(query) == len(key) == len(value) or key.shape[1] != value.shape[1]:
        raise ValueError(f"attention: {found}; expected as many rows of each, and a value per key")
    if query.shape[3] != key.shape[3] or query.shape[3] == 0:
        raise ValueError(f"attention: {found}; expected queries and keys of one width")
    if sinks is not None and (sinks.dtype != jnp.float32 or sinks.shape != query.shape[2:3]):
        raise ValueError(
            f"attention: sinks is {sinks.dtype} {sinks.shape}; expected float32 "
            f"{query.shape[2:3]}, one for each head of queries"
        )
