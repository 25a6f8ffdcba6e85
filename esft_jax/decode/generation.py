"""Greedy and sampled decoding in batches, with a cache of keys and values.

Letters: B rows, P prompt tokens, N new tokens, I stop tokens, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.model.attention import Caches
from esft_jax.model.transformer import Transformer, check_adapter_ids
from esft_jax.sharding import RULES, device_multiple, place_whole_batch

# Prompts are padded to powers of two from here on: few shapes, so few compilations.
_SHORTEST_BUCKET = 16
# Prompt tokens that run at once; bounds the attention scores of a long prompt.
_PREFILL_BLOCK = 512
# New tokens between two questions whether completions are to stop.
_STOP_BLOCK = 32


class DecodingOptions(TypedDict, total=False):
    """Optional arguments of `generate_tokens`, handed on by what calls it."""

    temperature: float
    top_p: float
    seed: int
    batch_size: int
    stop: Callable[[list[int]], bool]
    advance: Callable[[int], object]
    adapter_ids: Sequence[int]


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    raw: bool = False,
    max_new_tokens: int = 128,
    **options: Unpack[DecodingOptions],
) -> list[str]:
    """Answers to prompts, each a user's turn of a chat of its own.

    Args:
        prompts: what the user says, or rendered chats (see `Tokenizer.encode_user`).
        raw: continue the prompts as plain text (after BOS) instead.
        max_new_tokens: tokens per answer, at most.
        options: see `generate_tokens`.
    """
    encode = tokenizer.encode_text if raw else tokenizer.encode_user
    completions = generate_tokens(
        model,
        [encode(text) for text in prompts],
        stop_ids=tokenizer.stop_ids,
        max_new_tokens=max_new_tokens,
        **options,
    )
    return [tokenizer.decode(ids) for ids in completions]


def generate_tokens(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    stop: Callable[[list[int]], bool] | None = None,
    advance: Callable[[int], object] | None = None,
    adapter_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """New tokens after each prompt, up to but without the first stop token.

    On several processes all must call it with the same arguments, and all get every completion.

    Args:
        prompts: token ids, BOS included.
        stop_ids: tokens that end a completion, at least one.
        max_new_tokens: tokens per completion, at most.
        temperature: 0 decodes greedily; else logits are divided by it and a token is drawn.
        top_p: draw among the most likely tokens that together reach this probability.
        seed: of the draws. A completion depends on it and on the prompt's number, not on the
            prompts decoded beside it.
        batch_size: prompts decoded together, over all devices.
        stop: whether a completion that has these tokens needs no more. It is asked now and then, so
            that more tokens than those may come.
        advance: called with the number of prompts completed since the last call.
        adapter_ids: the resident adapter of each prompt, -1 for the base (`attach_adapters`).
            Default: that of `choose_adapter`.

    Raises:
        InputError: an empty prompt, one too long for the model or with tokens that it lacks, or an
            option out of range.
    """
    check_options(max_new_tokens, temperature, top_p, batch_size)
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed: {seed} is out of range; expected a number from 0, below 2^32")
    if not stop_ids:
        raise InputError("stop_ids: is empty; expected at least one token")
    vocabulary = model.config.vocab_size
    for number, prompt in enumerate(prompts):
        check_length(f"prompt {number}", len(prompt), max_new_tokens, model.config.max_positions)
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise InputError(
                f"prompt {number}: tokens from {min(prompt)} to {max(prompt)}; the model has "
                f"{vocabulary} (vocab_size)"
            )
    if adapter_ids is not None:
        _check_adapter_ids(model, prompts, adapter_ids)
    graph, params = nnx.split(model)
    sampling = None if temperature == 0 else (float(temperature), float(top_p))
    size = device_multiple(min(batch_size, len(prompts) or 1), model.mesh)
    # Longest first: a batch holds prompts of about one length, and if memory runs out, it does so
    # at once.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    completions: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        batch = _pad([prompts[number] for number in numbers], numbers, size, stop_ids[0])
        if adapter_ids is not None:
            batch["adapter_ids"] = np.full(size, -1, np.int32)
            batch["adapter_ids"][: len(numbers)] = [adapter_ids[number] for number in numbers]
        new = _complete(
            graph,
            params,
            model.mesh,
            batch,
            jax.random.key(seed),
            jnp.asarray(stop_ids, jnp.int32),
            sampling,
            max_new_tokens,
            stop,
        )
        for number, ids in zip(numbers, new.tolist(), strict=False):
            completions[number] = list(itertools.takewhile(lambda i: i not in stop_ids, ids))
        if advance is not None:
            advance(len(numbers))
    return completions


def _check_adapter_ids(
    model: Transformer, prompts: Sequence[Sequence[int]], adapter_ids: Sequence[int]
) -> None:
    resident = model.tuned_experts
    if resident is None or resident.default_id is None:
        raise InputError("adapter_ids: the model has no resident adapters")
    if len(adapter_ids) != len(prompts):
        raise InputError(
            f"adapter_ids: are {len(adapter_ids)}; expected {len(prompts)}, one for each prompt"
        )
    check_adapter_ids(adapter_ids, len(resident.layout.rooms))


def check_length(name: str, length: int, max_new_tokens: int, max_positions: int) -> None:
    """Check that a prompt has tokens and that it and its completion fit the model.

    Raises:
        InputError: beginning with the prompt's name.
    """
    if not length:
        raise InputError(f"{name}: no tokens; expected at least one")
    if length + max_new_tokens > max_positions:
        raise InputError(
            f"{name}: {length} tokens and {max_new_tokens} new ones; the model's limit is "
            f"{max_positions} (max_position_embeddings)"
        )


def check_options(max_new_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    """Raise an `InputError` if one of them is out of range."""
    for name, count in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if count < 1:
            raise InputError(f"{name}: {count} is out of range; expected at least 1")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature: {temperature} is out of range; expected a number from 0")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: {top_p} is out of range; expected a number in (0, 1]")


def _pad(
    prompts: Sequence[Sequence[int]], numbers: Sequence[int], size: int, fill: int
) -> dict[str, np.ndarray]:
    """Right-padded prompts; rows without a prompt have number -1."""
    longest = max(map(len, prompts))
    width = max(_SHORTEST_BUCKET, 1 << (longest - 1).bit_length())
    tokens = np.full((size, width), fill, np.int32)
    lengths = np.ones(size, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    padded = np.full(size, -1, np.int32)
    padded[: len(numbers)] = numbers
    return {"tokens": tokens, "lengths": lengths, "numbers": padded}


class _Progress(NamedTuple):
    """Completions in progress: P prompt tokens at most, N new tokens at most.

    Attributes:
        step: new tokens so far.
        done: rows that get no more.
        tokens: the last token of each row, not yet in the cache.
        new: new tokens, filled up with the first stop token.
        last: position of each prompt's last token.
        keys: random key of each row.
        adapter_ids: of each row; None if the call names none.
    """

    step: Int[Array, ""]
    done: Bool[Array, " B"]
    tokens: Int[Array, " B"]
    new: Int[Array, "B N"]
    last: Int[Array, " B"]
    keys: Array
    caches: Caches
    adapter_ids: Int[Array, " B"] | None


def _complete(
    graph: nnx.GraphDef,
    params: nnx.State,
    mesh: Mesh | None,
    batch: dict[str, np.ndarray],
    key: Array,
    stop_ids: Int[Array, " I"],
    sampling: tuple[float, float] | None,
    max_new_tokens: int,
    stop: Callable[[list[int]], bool] | None,
) -> Int[np.ndarray, "B N"]:
    """New tokens of each row, filled up with the first stop token.

    Args:
        batch: `tokens` `[B, P]`, `lengths` of the prompts in it and their `numbers` `[B]`; and
            `adapter_ids` `[B]`, if the call names some.
        sampling: temperature and top_p; None for greedy decoding.
        stop: see `generate_tokens`.
    """
    placed = place_whole_batch(batch, mesh)
    state = _begin(graph, params, placed, key, stop_ids, max_new_tokens=max_new_tokens)
    block = max_new_tokens if stop is None else _STOP_BLOCK
    for limit in range(block, max_new_tokens + block, block):
        limit = min(limit, max_new_tokens)
        state, done, new = _extend(graph, params, state, stop_ids, jnp.int32(limit), sampling)
        if stop is None or limit == max_new_tokens or np.asarray(done).all():
            break
        rows = np.asarray(new)[:, :limit].tolist()
        stopped = [over or stop(ids) for over, ids in zip(np.asarray(done), rows, strict=True)]
        if all(stopped):
            break
        state = state._replace(**place_whole_batch({"done": np.array(stopped)}, mesh))
    return np.asarray(new)


@partial(jax.jit, static_argnames=("graph", "max_new_tokens"))
def _begin(
    graph: nnx.GraphDef,
    params: nnx.State,
    batch: dict[str, Array],
    key: Array,
    stop_ids: Int[Array, " I"],
    *,
    max_new_tokens: int,
) -> _Progress:
    """No new tokens yet, and the prompts in the cache."""
    model: Transformer = nnx.merge(graph, params)
    last = batch["lengths"] - 1
    rows, width = batch["tokens"].shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["numbers"])
    adapter_ids = batch.get("adapter_ids")
    caches = _prefill(model, batch["tokens"], last, width + max_new_tokens, adapter_ids)
    # The last prompt token is run as the first step: it alone needs logits.
    tokens = jnp.take_along_axis(batch["tokens"], last[:, None], axis=1)[:, 0]
    new = jnp.full((rows, max_new_tokens), stop_ids[0], jnp.int32)
    step = jnp.zeros((), jnp.int32)
    done = batch["numbers"] < 0
    return _Progress(step, done, tokens, new, last, keys, caches, adapter_ids)


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("state",))
def _extend(
    graph: nnx.GraphDef,
    params: nnx.State,
    state: _Progress,
    stop_ids: Int[Array, " I"],
    limit: Int[Array, ""],
    sampling: tuple[Array, Array] | None,
) -> tuple[_Progress, Bool[Array, " B"], Int[Array, "B N"]]:
    """Decode until every row is done or has `limit` new tokens.

    Beside the state, `done` and `new` of it for every process to read.
    """
    model: Transformer = nnx.merge(graph, params)

    def running(state: _Progress) -> Array:
        return (state.step < limit) & ~state.done.all()

    def advance(state: _Progress) -> _Progress:
        step, done = state.step, state.done
        positions = (state.last + step)[:, None]
        tokens = state.tokens[:, None]
        logits, caches = model.decode(
            tokens, positions, ~done[:, None], state.caches, state.adapter_ids
        )
        tokens = choose_tokens(logits[:, 0], state.keys, step, sampling)
        tokens = jnp.where(done, stop_ids[0], tokens)
        return state._replace(
            step=step + 1,
            done=done | jnp.isin(tokens, stop_ids),
            tokens=tokens,
            new=state.new.at[:, step].set(tokens),
            caches=caches,
        )

    state = jax.lax.while_loop(running, advance, state)
    read = state.done, state.new
    if model.mesh is not None:
        whole = NamedSharding(model.mesh, PartitionSpec())
        read = jax.lax.with_sharding_constraint(read, whole)
    return state, *read


def _prefill(
    model: Transformer,
    tokens: Int[Array, "B P"],
    last: Int[Array, " B"],
    slots: int,
    adapter_ids: Int[Array, " B"] | None,
) -> Caches:
    """Caches that hold each prompt up to but without its last token.

    Slots from there on hold what padding left; each is overwritten before it is first seen.
    """
    rows, width = tokens.shape
    block = min(width, _PREFILL_BLOCK)

    def run(caches: Caches, start: Array) -> tuple[Caches, None]:
        positions = jnp.broadcast_to(start + jnp.arange(block), (rows, block))
        part = jax.lax.dynamic_slice_in_dim(tokens, start, block, axis=1)
        keep = positions < last[:, None]
        _, caches = model.decode(part, positions, keep, caches, adapter_ids)
        return caches, None

    caches: Any = model.init_cache(rows, slots)
    if model.mesh is not None:
        split = NamedSharding(model.mesh, PartitionSpec(None, RULES.batch))
        caches = jax.lax.with_sharding_constraint(caches, split)
    return jax.lax.scan(run, caches, jnp.arange(0, width, block))[0]


def choose_tokens(
    logits: Float[Array, "B V"],
    keys: Array,
    step: Int[Array, ""],
    sampling: tuple[Array | float, Array | float] | None,
) -> Int[Array, " B"]:
    """The next token of each row; `keys` has one random key per row."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_p = sampling

    def draw(key: Array, logits: Float[Array, " V"]) -> Int[Array, ""]:
        ordered, ids = jax.lax.top_k(logits, logits.shape[0])
        ordered = (ordered - ordered[0]) / temperature
        probs = jax.nn.softmax(ordered)
        nucleus = jnp.cumsum(probs) - probs < top_p
        return ids[jax.random.categorical(key, jnp.where(nucleus, ordered, -jnp.inf))]

    return jax.vmap(draw)(jax.vmap(jax.random.fold_in, (0, None))(keys, step), logits)
