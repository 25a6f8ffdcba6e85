"""Tensors of a model in memory under their Hugging Face names, wherever training has put them.

Tuned experts are in their bank, base experts may have moved to other devices, and a matrix may have
low-rank factors beside it.
"""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from esft_jax.adapt.factors import LowRank, LowRankExperts
from esft_jax.adapt.resident import ResidentExperts
from esft_jax.blocks import Box, read_block
from esft_jax.errors import InputError
from esft_jax.families import tensor_table
from esft_jax.families.tensors import LeafPath
from esft_jax.model.params import Role
from esft_jax.model.transformer import Transformer
from esft_jax.ops.quantised import Quantised


class ModelTensors:
    """Reads the tensors of a model.

    On several processes all must ask for the same tensors, in the same order.

    Attributes:
        placements: the model's tensors and their places before any training.
    """

    def __init__(self, model: Transformer):
        self.placements = tensor_table(model.config).places
        self._leaves: dict[LeafPath, jax.Array | Quantised] = {
            tuple(map(str, path)): param.get_value()
            for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
        }
        self._factors: dict[LeafPath, LowRank] = {
            tuple(map(str, path)): module
            for path, module in nnx.iter_modules(model)
            if isinstance(module, LowRank)
        }
        tuned = model.tuned_experts
        if isinstance(tuned, ResidentExperts):
            raise InputError(
                "the model has several adapters; expected a base, or one with an adapter merged"
            )
        layout = None if tuned is None else tuned.layout
        rows = {} if layout is None else {(i, expert): row for i, expert, row in layout.rows()}
        self._positions = None if layout is None else layout.placement.positions
        updated = isinstance(tuned, LowRankExperts)
        self._tuned_rows = {} if updated else rows
        self._updated_rows = rows if updated else {}

    def is_tuned(self, name: str) -> bool:
        """Whether a tensor is of an expert that has a row in the tuned bank."""
        place = self.placements[name]
        return place.role is Role.ROUTED_EXPERT and place.index in self._tuned_rows

    def update(self, name: str) -> tuple[LowRank, int] | None:
        """The factors of a matrix, which may be those of several, and its row in them, if any."""
        place = self.placements[name]
        kind = place.path[-1]
        if kind == "gate_up":
            kind = "gate" if place.columns and place.columns[0] == 0 else "up"
        if place.role is Role.ROUTED_EXPERT:
            layer, expert = place.index
            factors = self._factors.get(("tuned_experts", kind))
            row = self._updated_rows.get((layer, expert))
        else:
            factors = self._factors.get((*place.path[:-1], "lora", kind))
            row = place.index[0] if place.index else None
        return None if row is None or factors is None else (factors, row)

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A `[rank, inputs]` and B `[outputs, rank]` of a matrix that has some."""
        found = self.update(name)
        assert found is not None
        factors, row = found

        def read(leaf: jax.Array) -> np.ndarray:
            box = (slice(row, row + 1), *(slice(0, size) for size in leaf.shape[1:]))
            return np.ascontiguousarray(read_block(leaf, box)[0].T)

        return read(factors.a.get_value()), read(factors.b.get_value())

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as the model computes with it; one with factors is merged, in float32."""
        place, (path, box) = self.placements[name], self.place(name)
        tensor = place.from_block(_read(self._leaves[path], box))
        if (found := self.update(name)) is None:
            return tensor
        a, b = self.factors(name)
        return tensor.astype(np.float32) + found[0].scale * (b @ a)

    def place(self, name: str) -> tuple[LeafPath, Box]:
        """Where a tensor is now: a parameter, and the block of it."""
        place = self.placements[name]
        if place.role is not Role.ROUTED_EXPERT or self._positions is None:
            return place.path, place.box
        layer, expert = place.index
        if self.is_tuned(name):
            row = self._tuned_rows[layer, expert]
            return ("tuned_experts", place.path[-1]), (slice(row, row + 1), *place.box[2:])
        position = self._positions[layer][expert]
        return place.path, (place.box[0], slice(position, position + 1), *place.box[2:])


def _read(leaf: jax.Array | Quantised, box: Box) -> np.ndarray:
    """A block of a parameter; of a quantised one, all rows of matrices."""
    if not isinstance(leaf, Quantised):
        return read_block(leaf, box)
    *stack, rows, columns = box
    assert rows == slice(0, leaf.shape[-2]), (rows, leaf.shape)
    codes, scales = (
        read_block(part, (*stack, slice(0, part.shape[-2]), columns))
        for part in (leaf.codes, leaf.scales)
    )
    part = Quantised(jnp.asarray(codes), jnp.asarray(scales), leaf.scheme, leaf.group_size)
    return np.asarray(part.astype(jnp.float32))


def model_tensors(
    model: Transformer, names: Iterable[str], dtype: DTypeLike
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a model under Hugging Face names, as the model computes with them."""
    tensors = ModelTensors(model)
    for name in names:
        yield name, tensors.tensor(name).astype(dtype)
