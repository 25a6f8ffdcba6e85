"""Weights in MXFP4: four bits each, with a scale for 32 of them (OCP Microscaling Formats 1.0)."""

from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

from esft_jax.blocks import Box, bounded
from esft_jax.checkpoint.tensor_files import DTYPES, TensorFiles, TensorInfo, map_tensor
from esft_jax.errors import InputError

_MXFP4, _STORED = "MXFP4", "U8"
_BLOCKS, _SCALES = "_blocks", "_scales"
# Numbers that share a scale, and the bytes that hold them.
_GROUP, _GROUP_BYTES = 32, 16
# What the lower three bits of a number say; the fourth is its sign.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# A scale is a power of two, by its exponent and this; the largest one stands for no number.
_BIAS, _NO_SCALE = 127, 255


class Mxfp4Files(TensorFiles):
    """Safetensors files of a folder, some of whose tensors are in MXFP4; they are read as bfloat16,
    which holds all their numbers.

    A tensor `[experts, inputs, outputs]` lies on disk as `*_blocks`, uint8
    `[experts, outputs, groups, 16]`, where a group is 32 consecutive inputs, two in a byte with the
    first in the lower bits, and `*_scales`, uint8 `[experts, outputs, groups]`. In the mapping it
    has the name without these ends.

    Raises:
        InputError: no tensor is in MXFP4; or blocks or scales are missing, or do not fit.
    """

    known = DTYPES | {_MXFP4: np.dtype(ml_dtypes.bfloat16)}

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self._packed: dict[str, tuple[TensorInfo, TensorInfo]] = {}
        for name in [n.removesuffix(_BLOCKS) for n in self if n.endswith(_BLOCKS)]:
            blocks = self._infos.pop(name + _BLOCKS)
            if name + _SCALES not in self:
                raise InputError(
                    f"{blocks.file}: tensor {name + _BLOCKS!r} is in {_MXFP4}; its scales, "
                    f"{name + _SCALES!r}, miss"
                )
            scales = self._infos.pop(name + _SCALES)
            if name in self:
                raise InputError(
                    f"{blocks.file}: tensor {name + _BLOCKS!r} holds what {name!r} holds, too; "
                    "expected one of them"
                )
            _check(name, blocks, scales)
            experts, outputs, groups, _ = blocks.shape
            shape = experts, groups * _GROUP, outputs
            self._infos[name] = TensorInfo(blocks.file, _MXFP4, shape, blocks.offset)
            self._packed[name] = blocks, scales
        if not self._packed:
            raise InputError(
                f"{self.folder / 'config.json'}: quantization_config: says mxfp4, which no tensor "
                "is in; expected no such key"
            )
        for name in self:
            if name.endswith(_SCALES):
                blocks_name = name.removesuffix(_SCALES) + _BLOCKS
                raise InputError(
                    f"{self[name].file}: tensor {name!r}: expected {blocks_name!r} beside it"
                )

    def dtype(self, name: str) -> np.dtype:
        """The type a tensor is read in."""
        return self.known[self[name].dtype]

    def read(self, name: str, index: Box = ()) -> np.ndarray:
        """A tensor, or a part of it, of the groups that this touches.

        Raises:
            InputError: one of these has a scale that stands for no number.
        """
        if name not in self._packed:
            return super().read(name, index)
        blocks, scales = self._packed[name]
        shape = self[name].shape
        experts, inputs, outputs = index or (slice(None),) * len(shape)
        (inputs,) = bounded((inputs,), shape[1:2])
        touched = slice(inputs.start // _GROUP, -(-inputs.stop // _GROUP))
        part = experts, outputs, touched
        exponents = map_tensor(name + _SCALES, scales, np.dtype(np.uint8))[part]
        if (exponents == _NO_SCALE).any():
            raise InputError(
                f"{scales.file}: tensor {name + _SCALES!r} has a scale of {_NO_SCALE}, which "
                "stands for no number"
            )
        codes = map_tensor(name + _BLOCKS, blocks, np.dtype(np.uint8))[part]
        # Unlike indexing, `take` lets other threads run.
        pairs = _pairs().take(exponents[..., None].astype(np.uint16) << 8 | codes, mode="clip")
        values = pairs.view(ml_dtypes.bfloat16)
        first = inputs.start - touched.start * _GROUP
        values = values.reshape(*exponents.shape[:2], -1)
        return values[..., first : first + inputs.stop - inputs.start].swapaxes(1, 2)


def _check(name: str, blocks: TensorInfo, scales: TensorInfo) -> None:
    """Check types and shapes of what holds a tensor."""
    fits = len(blocks.shape) == 4 and blocks.shape[-1] == _GROUP_BYTES
    expected = {
        _BLOCKS: (blocks, fits, f"[experts, outputs, groups, {_GROUP_BYTES}]"),
        _SCALES: (scales, scales.shape == blocks.shape[:-1], str(list(blocks.shape[:-1]))),
    }
    for end, (info, right, shape) in expected.items():
        if not right or info.dtype != _STORED:
            raise InputError(
                f"{info.file}: tensor {name + end!r} has type {info.dtype} and shape "
                f"{list(info.shape)}; expected {_STORED} and {shape}"
            )


@cache
def _pairs() -> np.ndarray:
    """The two numbers of a byte under a scale, as bfloat16 in one uint32: of scale 0 first."""
    values = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
    with np.errstate(over="ignore"):  # what is too large is infinite, and refused as such
        scaled = np.ldexp(values, np.arange(_NO_SCALE + 1)[:, None] - _BIAS)
    byte = np.arange(256)
    pairs = np.stack([scaled[:, byte & 15], scaled[:, byte >> 4]], axis=-1)
    return pairs.astype(ml_dtypes.bfloat16).view(np.uint32).reshape(-1)
