"""The kernels that go along a row of tokens: attention of each kind, and the loss.

Letters: S tokens, H heads of queries or values, K heads of keys, D model width, V words.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esft_jax.checking.experts import Make
from esft_jax.checking.kernel import (
    RESULT,
    Draw,
    Kernel,
    Limits,
    Subject,
    documents,
    to_host,
    uniform,
)
from esft_jax.checking.reference import (
    Array64,
    attention,
    convolution,
    cross_entropy,
    delta_rule,
)
from esft_jax.model.config import (
    DeltaAttentionConfig,
    GroupedAttentionConfig,
    LatentAttentionConfig,
)
from esft_jax.ops.attention import causal_attention
from esft_jax.ops.attention.operation import implementation_for
from esft_jax.ops.causal_convolution import causal_convolution
from esft_jax.ops.cross_entropy import CHUNK, cross_entropy_sums
from esft_jax.ops.delta_rule import CHUNK as DELTA_CHUNK
from esft_jax.ops.delta_rule import NORM_EPS, STRETCH, gated_delta_rule

XLA = "xla"
# Rows of tokens whose losses are compared, each a chunk and a half long.
LOSS_ROWS = 2
# The reference of the delta rule goes through states, not through matrix products: about as much
# slower by operation.
_SLOW = 20


def token_kernels(subject: Subject, dtype: str, limits: Limits) -> Iterator[Make]:
    """As `expert_kernels`."""
    for kind, _ in subject.model.attentions:
        if isinstance(kind, DeltaAttentionConfig):
            yield partial(_delta_rule, subject, kind, dtype, limits)
            yield partial(_convolution, subject, kind, dtype, limits)
        else:
            yield partial(_attention, subject, kind, dtype, limits)
    yield partial(_loss, subject, dtype, limits)


def _attention(
    subject: Subject,
    kind: LatentAttentionConfig | GroupedAttentionConfig,
    dtype: str,
    limits: Limits,
    compared: bool,
) -> Kernel:
    draw, heads = Draw(dtype), kind.heads
    key_heads, window, has_sinks = heads, None, False
    if isinstance(kind, GroupedAttentionConfig):
        key_heads, window, has_sinks = kind.key_heads, kind.window, kind.sinks
    if window is not None and window >= subject.length:
        window = None
    if compared:
        length = min(subject.length, max(limits.tokens, (window or 0) + limits.tokens))
        of_head = 2.0 * length**2 * 4 * (kind.head + kind.value) * (heads // key_heads)
        kept = max(1, min(key_heads, int(limits.host_operations / of_head)))
        heads, key_heads = kept * heads // key_heads, kept
    else:
        length = limits.timed(subject.length)
    segments = documents(length, whole=not compared)
    # Scores have the standard deviation 1.
    query = draw(1, length, heads, kind.head, std=1 / (kind.scale * kind.head**0.5))
    operands = {
        "query": query,
        "key": draw(1, length, key_heads, kind.head),
        "value": draw(1, length, key_heads, kind.value),
    }
    if has_sinks:
        operands["sinks"] = uniform(draw.key(), (heads,), 1.0, jnp.float32)
    cotangent = draw(1, length, heads, kind.value)

    def apply(operands: dict[str, Any], segments: Any) -> Array:
        return causal_attention(
            operands["query"],
            operands["key"],
            operands["value"],
            segments,
            kind.scale,
            window=window,
            sinks=operands.get("sinks"),
        )

    def exact() -> dict[str, Array64]:
        arrays = {name: to_host(array) for name, array in operands.items()}
        sinks = arrays.pop("sinks", None)
        return attention(
            **arrays,
            sinks=sinks,
            segment_ids=segments,
            scale=kind.scale,
            window=window,
            cotangent=to_host(cotangent),
        )

    nearest = min(window or length, length)
    seen = nearest * length - nearest**2 / 2  # by all queries together
    forward = 2.0 * heads * seen * (kind.head + kind.value)
    described = f"{length} x {heads} heads of {kind.head} and {kind.value}"
    return Kernel(
        name="attention"
        + (f", window {window}" if window else "")
        + (", sinks" if has_sinks else ""),
        shape=described if key_heads == heads else f"{described}, {key_heads} of keys",
        implementation=implementation_for(dtype),
        dtype=dtype,
        operands=operands,
        given=segments,
        cotangent=cotangent,
        apply=apply,
        exact=exact,
        terms=2 * (length + kind.head + kind.value),
        operations=(forward, 3 * forward),
        by_head=True,
    )


def _delta_rule(
    subject: Subject, kind: DeltaAttentionConfig, dtype: str, limits: Limits, compared: bool
) -> Kernel:
    draw, heads, key_heads = Draw(dtype), kind.heads, kind.key_heads
    length = limits.timed(subject.length)
    if compared:  # more than one stretch
        length = min(subject.length, DELTA_CHUNK * (STRETCH + 1))
        of_head = 2.0 * _SLOW * length * kind.key * kind.value * (heads // key_heads)
        kept = max(1, min(key_heads, int(limits.host_operations / of_head)))
        heads, key_heads = kept * heads // key_heads, kept
    segments = documents(length, whole=not compared)

    def positive(most: float, dtype: Any) -> Array:
        return (draw(1, length, heads, std=most / 2 / 3**0.5) + most / 2).astype(dtype)

    operands = {
        "query": draw(1, length, key_heads, kind.key),
        "key": draw(1, length, key_heads, kind.key),
        "value": draw(1, length, heads, kind.value),
        "decay": -positive(0.5, jnp.float32),
        "beta": positive(1.0, dtype),
    }
    cotangent = draw(1, length, heads, kind.value)

    def apply(operands: dict[str, Any], segments: Any) -> Array:
        out, _ = gated_delta_rule(**operands, segment_ids=segments)
        return jnp.where(segments[..., None, None] > 0, out, 0)

    def exact() -> dict[str, Array64]:
        arrays = {name: to_host(array) for name, array in operands.items()}
        return delta_rule(
            **arrays, segment_ids=segments, eps=NORM_EPS, cotangent=to_host(cotangent)
        )

    forward = 2.0 * 3 * length * heads * kind.key * kind.value
    return Kernel(
        name="delta rule",
        shape=f"{length} x {heads} heads of {kind.value}, {key_heads} of keys of {kind.key}",
        implementation=XLA,
        dtype=dtype,
        operands=operands,
        given=segments,
        cotangent=cotangent,
        apply=apply,
        exact=exact,
        terms=length * kind.key,
        operations=(forward, 3 * forward),
        by_head=True,
    )


def _convolution(
    subject: Subject, kind: DeltaAttentionConfig, dtype: str, limits: Limits, compared: bool
) -> Kernel:
    draw = Draw(dtype)
    length = min(subject.length, limits.tokens) if compared else limits.timed(subject.length)
    segments = documents(length, whole=not compared)
    operands = {
        "x": draw(1, length, kind.mixed),
        "weight": draw(kind.taps, kind.mixed, std=kind.taps**-0.5),
    }
    cotangent = draw(1, length, kind.mixed)

    def exact() -> dict[str, Array64]:
        x, weight = (to_host(operands[name]) for name in ("x", "weight"))
        return convolution(x, weight, segments, to_host(cotangent))

    forward = 2.0 * length * kind.taps * kind.mixed
    return Kernel(
        name="convolution",
        shape=f"{length} x {kind.mixed}, {kind.taps} taps",
        implementation=XLA,
        dtype=dtype,
        operands=operands,
        given=segments,
        cotangent=cotangent,
        apply=lambda operands, segments: causal_convolution(**operands, segment_ids=segments)[0],
        exact=exact,
        terms=length,
        operations=(forward, 2 * forward),
    )


def _loss(subject: Subject, dtype: str, limits: Limits, compared: bool) -> Kernel:
    model, draw = subject.model, Draw(dtype)
    rows, length, words = 1, limits.timed(subject.length), model.vocab_size
    if compared:
        rows, length = LOSS_ROWS, min(subject.length, CHUNK + CHUNK // 2)
    if compared or limits.timed_tokens is not None:
        of_word = 6.0 * rows * length * model.hidden_size
        words = max(2, min(words, int(limits.host_operations / of_word)))
    # Logits must be large enough for a cap to change them.
    std = 2.0 if model.logit_cap is None else model.logit_cap / 4
    random = np.random.default_rng(0)
    targets = random.integers(0, words, (rows, length)).astype(np.int32)
    # Without a loss on questions, those with one are brought together.
    weights = random.uniform(0.5, 1.5, (rows, length)) * (random.uniform(size=(rows, length)) < 0.7)
    weights = np.where(compared, weights, 1).astype(np.float32)
    operands = {
        "hidden": draw(rows, length, model.hidden_size),
        "head": draw(model.hidden_size, words, std=std * model.hidden_size**-0.5),
    }

    def apply(operands: dict[str, Any], given: Any) -> Array:
        total, by_row = cross_entropy_sums(**operands, **given, cap=model.logit_cap)
        # Of these only the sum over all rows has a gradient.
        return by_row + (total - jax.lax.stop_gradient(total)) / rows

    def exact() -> dict[str, Array64]:
        hidden, head = (to_host(operands[name]) for name in ("hidden", "head"))
        return cross_entropy(hidden, head, targets, weights, model.logit_cap)

    forward = 2.0 * rows * length * model.hidden_size * words
    return Kernel(
        name="loss" + ("" if model.logit_cap is None else ", soft cap"),
        shape=f"{rows * length} x {model.hidden_size} x {words}",
        implementation=XLA,
        dtype=dtype,
        operands=operands,
        given={"targets": targets, "weights": weights},
        cotangent=jnp.ones(rows, jnp.float32),
        apply=apply,
        exact=exact,
        terms=max(model.hidden_size, words, rows * length),
        operations=(forward, 3 * forward),
        narrowest={RESULT: jnp.float32},
    )
