"""The tensors of a model as its family's files have them: experts one by one, or fused."""

from collections.abc import Callable, Mapping

import numpy as np

from esft_jax.checkpoint.folder import TensorSpec
from esft_jax.families.tensors import Table
from esft_jax.model.params import Role


def stored_parts(table: Table) -> dict[str, list[str]]:
    """Names of the tensors in the files, and the tensors, experts one by one, that each holds."""
    if not table.experts.stored_fused:
        return {name: [name] for name in table.places}
    parts: dict[str, list[str]] = {}
    for name in table.places:
        fused = table.fused.get(name)
        parts.setdefault(name if fused is None else fused.name, []).append(name)
    return parts


def stored_specs(table: Table, dtype: np.dtype) -> dict[str, TensorSpec]:
    """The tensors in the files, all of one type but for selection biases, which are float32."""

    def kind(name: str) -> np.dtype:
        biased = table.places[name].role is Role.SELECTION_BIAS
        return np.dtype(np.float32) if biased else np.dtype(dtype)

    return {
        name: TensorSpec(kind(parts[0]), table.fused_shapes.get(name, table.places[parts[0]].shape))
        for name, parts in stored_parts(table).items()
    }


def stored_tensor(
    table: Table,
    name: str,
    specs: Mapping[str, TensorSpec],
    parts: Mapping[str, list[str]],
    read: Callable[[str], np.ndarray],
) -> np.ndarray:
    """A tensor as it is stored.

    Args:
        read: a tensor, of experts one by one.
    """
    spec = specs[name]
    if parts[name] == [name]:
        return read(name).astype(spec.dtype, copy=False)
    found = np.empty(spec.shape, spec.dtype)
    for part in parts[name]:
        table.fused[part].write(found, read(part))
    return found
