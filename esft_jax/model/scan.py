"""Going through the layers of a stack under `jax.lax.scan`.

Layers of a stack have parameters of the same shapes, but for their attention, of which there may be
two kinds. A step of the scan is as many layers as it takes for the kinds to repeat: one, if all
layers are alike.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from esft_jax.host_memory import is_on_host
from esft_jax.model.config import LayerRun
from esft_jax.model.params import Role
from esft_jax.model.remat import REMAT, Remat
from esft_jax.moe.weights import LearnedStack

# Names of a block's attention of the first and of the second kind.
ATTENTIONS = "attention", "second_attention"


class LayerOutput(NamedTuple):
    """What a layer gives beside its hidden states: arrays, or None."""

    router: Any = None
    cache: Any = None


# `layer(block, kind, carry, index, cache) -> (carry, output)`; the kind is that of its attention,
# 0 or 1, the index is among the layers of the stack.
Layer = Callable[[Any, int, Any, Array, Any], tuple[Any, LayerOutput]]


def scan_layers(
    layer: Layer,
    stack: Any,
    kinds: Sequence[int],
    carry: Any,
    run: LayerRun,
    caches: Sequence[Any] = (None, None),
    *,
    remat: Remat = "none",
    experts_learn: bool = False,
) -> tuple[Any, Any, list[Any]]:
    """Go through the layers of a run, which are some of a stack.

    Args:
        stack: a block of all layers of the stack.
        kinds: of the attention of each of them.
        caches: of the run's layers, by kind; layers lead.

    Returns:
        What is carried on; router outputs, layers leading; and caches, by kind.
    """
    routers, found = [], []
    for part, pattern in _repeating(run, kinds[run.start : run.stop]):
        before = [kinds[run.start : part.start].count(kind) for kind in (0, 1)]
        size = [kinds[part.start : part.stop].count(kind) for kind in (0, 1)]
        own = tuple(
            jax.tree.map(lambda c, b=b, n=n: c[b : b + n], cache)
            for cache, b, n in zip(caches, before, size, strict=True)
        )
        scan = _Scan(stack, tuple(kinds), part, pattern, remat, experts_learn)
        carry, router, new = scan(layer, carry, own)
        routers.append(router)
        found.append(new)
    return carry, _join(routers), [_join(parts) for parts in zip(*found, strict=True)]


def _join(parts: Sequence[Any]) -> Any:
    """Layers of several parts, one after the other."""
    parts = [part for part in parts if part is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _repeating(run: LayerRun, kinds: Sequence[int]) -> list[tuple[LayerRun, tuple[int, ...]]]:
    """Parts of a run that are a pattern of kinds, a few times over: all of it, but for what is left
    of an incomplete pattern.
    """
    if not kinds:
        return []
    period = next(
        size
        for size in range(1, len(kinds) + 1)
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds))
    )
    whole, rest = run.split(run.start + len(kinds) // period * period)
    parts = [(whole, tuple(kinds[:period]))]
    return [*parts, (rest, tuple(kinds[: rest.size]))] if rest.size else parts


class _Rows(NamedTuple):
    """The rows of some stacked leaves that a part of the layers reads: `each` of them at a step.

    Attributes:
        total: rows of the leaves.
        start: the first row that is read.
        each: rows of a step.
        steps: of the scan.
    """

    total: int
    start: int
    each: int
    steps: int

    @property
    def whole(self) -> bool:
        """All of them are read."""
        return self.each * self.steps == self.total

    def by_step(self, tree: Any) -> Any:
        """The leaves, cut to these rows, with a leading axis of steps; rows follow if several."""
        if not self.each:
            return None

        def split(leaf: Array) -> Array:
            own = leaf if self.whole else leaf[self.start : self.start + self.each * self.steps]
            return own if self.each == 1 else own.reshape(self.steps, -1, *leaf.shape[1:])

        return jax.tree.map(split, tree)

    @property
    def alone(self) -> "_Rows":
        """The same, of leaves that have no other rows."""
        return self._replace(total=self.each * self.steps, start=0)

    def at(self, tree: Any, number: Array) -> Any:
        """What `by_step` has for a step, read where it lies."""
        if not self.each:
            return None
        first = self.start + number * self.each
        if self.each == 1:
            return jax.tree.map(lambda leaf: leaf[first], tree)
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, self.each), tree)

    def take(self, step: Any, row: int) -> Any:
        """One of the rows of a step."""
        return step if self.each == 1 else jax.tree.map(lambda leaf: leaf[row], step)

    def joined(self, rows: Sequence[Any]) -> Any:
        """Rows of a step as `by_step` has them."""
        if len(rows) < 2:
            return rows[0] if rows else None
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    def all_steps(self, tree: Any) -> Any:
        """What `joined` made, steps leading, with a leading axis of rows."""
        if self.each == 1:
            return tree
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


class _Scan(NamedTuple):
    """A scan over a part of a stack's layers, whose kinds repeat a pattern.

    Base experts are read where they lie; cutting a layer's out would copy them. A part of the stack
    is read by index, for the same reason.
    """

    stack: Any
    kinds: tuple[int, ...]
    run: LayerRun
    pattern: tuple[int, ...]
    remat: Remat
    experts_learn: bool

    def _rows(self, kind: int | None = None) -> _Rows:
        """Of leaves that all layers have, or that those of a kind have."""
        steps, start = self.run.size // len(self.pattern), self.run.start
        if kind is None:
            return _Rows(len(self.kinds), start, len(self.pattern), steps)
        below = self.kinds[:start].count(kind)
        return _Rows(self.kinds.count(kind), below, self.pattern.count(kind), steps)

    def __call__(self, layer: Layer, carry: Any, caches: tuple[Any, Any]) -> tuple:
        """Carry, router outputs and caches by kind; see `scan_layers`."""
        graph, *states = nnx.split(
            self.stack, _is_base_expert, *map(_Within, ATTENTIONS), lambda path, param: True
        )
        experts, *attentions, others = states
        rows, own = self._rows(), [self._rows(kind) for kind in (0, 1)]
        first = jnp.arange(self.run.start, self.run.stop, len(self.pattern), dtype=jnp.int32)
        # What is differentiated must enter the scan layer by layer, or a gradient of all layers
        # would exist for each.
        learned = experts if self.experts_learn else None

        def apply(
            kind: int, carry: Any, attention: Any, others: Any, learned: Any, *inputs: Any
        ) -> tuple:
            used = experts if learned is None else jax.tree.map(LearnedStack, experts, learned)
            both = [attention if kind == i else whole for i, whole in enumerate(attentions)]
            return layer(nnx.merge(graph, used, *both, others), kind, carry, *inputs)

        applied = [REMAT[self.remat](partial(apply, kind)) for kind in (0, 1)]

        def step(carry: Any, scanned: tuple) -> tuple:
            index, attention, params, learned, caches = scanned
            routers: list[Any] = []
            found: tuple[list[Any], list[Any]] = ([], [])
            for number, kind in enumerate(self.pattern):
                row = len(found[kind])
                carry, (router, cache) = applied[kind](
                    carry,
                    own[kind].take(attention[kind], row),
                    rows.take(params, number),
                    rows.take(learned, number),
                    index + number,
                    own[kind].take(caches[kind], row),
                )
                routers.append(router)
                found[kind].append(cache)
            new = tuple(r.joined(f) for r, f in zip(own, found, strict=True))
            return carry, (rows.joined(routers), new)

        def by_index(carry: Any, scanned: tuple) -> tuple:
            number, index, caches = scanned
            attention = [r.at(tree, number) for r, tree in zip(own, attentions, strict=True)]
            return step(carry, (index, attention, rows.at(others, number), None, caches))

        # Two steps in one, so that the experts of the second can come from the host's memory while
        # the first computes, forward and backward.
        unroll = 2 if any(map(is_on_host, jax.tree.leaves(experts))) else 1
        outputs: Any
        split = tuple(r.alone.by_step(cache) for r, cache in zip(own, caches, strict=True))
        if not rows.whole and not self.experts_learn:
            numbers = jnp.arange(rows.steps, dtype=jnp.int32)
            carry, outputs = jax.lax.scan(by_index, carry, (numbers, first, split), unroll=unroll)
        else:
            attention = [r.by_step(tree) for r, tree in zip(own, attentions, strict=True)]
            scanned = first, attention, rows.by_step(others), rows.by_step(learned), split
            carry, outputs = jax.lax.scan(step, carry, scanned, unroll=unroll)
        routers, new = outputs
        kept = [r.all_steps(cache) if r.each else None for r, cache in zip(own, new, strict=True)]
        return carry, rows.all_steps(routers), kept


def _is_base_expert(path: tuple, param: Any) -> bool:
    return param.role is Role.ROUTED_EXPERT


class _Within(NamedTuple):
    """Whether a parameter is in one of a block's modules."""

    name: str

    def __call__(self, path: tuple, param: Any) -> bool:
        return path[0] == self.name
