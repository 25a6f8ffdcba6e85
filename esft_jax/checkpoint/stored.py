"""The tensors of a model as its family's files have them: experts one by one, or fused."""

from collections.abc import Callable, Mapping

import numpy as np

from esft_jax.checkpoint.folder import TensorSpec
from esft_jax.families.tensors import Table
from esft_jax.model.params import Role


def stored_parts(table: Table, *, fused: bool) -> dict[str, list[str]]:
    """Names of the tensors in the files, and the tensors, experts one by one, that each holds.

    Args:
        fused: the files hold the experts of a layer in fused tensors.
    """
    if not fused:
        return {name: [name] for name in table.places}
    parts: dict[str, list[str]] = {}
    for name in table.places:
        part = table.fused.get(name)
        parts.setdefault(name if part is None else part.name, []).append(name)
    return parts


def stored_specs(
    table: Table,
    parts: Mapping[str, list[str]],
    dtype: np.dtype,
    wide: Mapping[str, np.dtype] | None = None,
) -> dict[str, TensorSpec]:
    """The tensors in the files, all of one type but for selection biases, which are float32.

    Args:
        parts: what each tensor in the files holds.
        wide: types of the tensors whose parameters are float32 in any case; None: float32, too.
    """

    def kind(name: str) -> np.dtype:
        if table.places[name].wide and wide is not None:
            return wide[name]
        single = table.places[name].wide or table.places[name].role is Role.SELECTION_BIAS
        return np.dtype(np.float32) if single else np.dtype(dtype)

    return {
        name: TensorSpec(kind(own[0]), table.fused_shapes.get(name, table.places[own[0]].shape))
        for name, own in parts.items()
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
