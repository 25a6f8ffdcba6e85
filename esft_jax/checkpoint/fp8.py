"""Weights in fp8 with a scale for each block, as DeepSeek-V3 is released (arXiv 2412.19437)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import ml_dtypes
import numpy as np

from esft_jax.blocks import Box, bounded
from esft_jax.checkpoint.tensor_files import DTYPES, TensorFiles, TensorInfo, map_tensor
from esft_jax.errors import InputError

_FP8 = "F8_E4M3"
_NO_NUMBER = 0x7F  # the code of NaN, without its sign
_SCALES = "_scale_inv"
_SCALE_DTYPES = DTYPES | {"F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu)}


class Fp8Files(TensorFiles):
    """Safetensors files of a folder, some of whose tensors are in fp8; they are read dequantised.

    A value in fp8 stands for its product with the scale of its block, in float32. The last blocks
    of a side may be smaller. The scales themselves are no tensors of the mapping.

    Attributes:
        block: rows and columns that share a scale.

    Raises:
        InputError: no tensor is in fp8; or scales are missing, or do not fit what they are of.
    """

    known = DTYPES | {_FP8: np.dtype(ml_dtypes.float8_e4m3fn)}

    def __init__(self, folder: str | Path, block: tuple[int, int]):
        super().__init__(folder)
        self.block, self._dequantised = block, np.dtype(np.float32)
        self._scales: dict[str, TensorInfo] = {}
        for name in [name for name in self if name.endswith(_SCALES)]:
            self._scales[name.removesuffix(_SCALES)] = self._infos.pop(name)
        for name, info in self._scales.items():
            kind = self[name].dtype if name in self else "no tensor"
            if kind != _FP8:
                raise InputError(
                    f"{info.file}: tensor {name + _SCALES!r}: expected {name!r} in {_FP8}; it is "
                    f"{kind}"
                )
        quantised = [name for name in self if self.in_fp8(name)]
        if not quantised:
            raise InputError(
                f"{self.folder / 'config.json'}: quantization_config: says fp8, which no tensor is "
                "in; expected no such key"
            )
        for name in quantised:
            self._check_scales(name)

    def _check_scales(self, name: str) -> None:
        """Check that a tensor has a scale for each of its blocks."""
        info, of = self[name], name + _SCALES
        if name not in self._scales:
            raise InputError(f"{info.file}: tensor {name!r} is in {_FP8}; its scales, {of!r}, miss")
        if len(info.shape) < 2:
            raise InputError(f"{info.file}: tensor {name!r} is in {_FP8}; expected no vector to be")
        scales, sides = self._scales[name], zip(info.shape[-2:], self.block, strict=True)
        expected = [*info.shape[:-2], *(-(-size // step) for size, step in sides)]
        if list(scales.shape) != expected:
            raise InputError(
                f"{scales.file}: tensor {of!r} has shape {list(scales.shape)}; expected {expected} "
                f"for {list(info.shape)} by weight_block_size of config.json"
            )
        if scales.dtype not in _SCALE_DTYPES:
            raise InputError(
                f"{scales.file}: tensor {of!r} has type {scales.dtype}; expected "
                f"{', '.join(_SCALE_DTYPES)}"
            )

    def to_carry(self, names: Iterable[str]) -> Self:
        """Some of the tensors, which are written again: bfloat16, where they are in fp8."""
        found = super().to_carry(names)
        found._dequantised = np.dtype(ml_dtypes.bfloat16)
        return found

    def dtype(self, name: str) -> np.dtype:
        """The type a tensor is read in."""
        return self._dequantised if self.in_fp8(name) else super().dtype(name)

    def read(self, name: str, index: Box = ()) -> np.ndarray:
        """A tensor, or a part of it with the scales that it touches.

        Raises:
            InputError: one of these is not finite.
        """
        info = self[name]
        if not self.in_fp8(name):
            return super().read(name, index)
        index = index or (slice(None),) * len(info.shape)
        *leading, rows, columns = bounded(index, info.shape)
        height, width = self.block
        touched = slice(columns.start // width, -(-columns.stop // width))
        inside = slice(columns.start - touched.start * width, columns.stop - touched.start * width)
        stored = self._scales[name]
        scales = map_tensor(name + _SCALES, stored, _SCALE_DTYPES[stored.dtype])
        values = map_tensor(name, info, self.known[_FP8])[*leading, rows, columns]
        values = values.astype(np.float32)
        for block in range(rows.start // height, -(-rows.stop // height)):
            part = slice(max(block * height - rows.start, 0), (block + 1) * height - rows.start)
            scale = scales[*leading, block : block + 1, touched].astype(np.float32)
            scale = self._finite(name, scale)
            values[..., part, :] *= np.repeat(scale, width, axis=-1)[..., inside]
        down, across = (slice(None, None, side.step) for side in index[-2:])
        return np.asarray(values)[..., down, across].astype(self._dequantised, copy=False)

    def in_fp8(self, name: str) -> bool:
        """Whether a tensor is."""
        return self[name].dtype == _FP8

    def codes(self, name: str, index: Box) -> np.ndarray:
        """A part of a tensor that is in fp8, as it is stored: uint8.

        Raises:
            InputError: a code stands for no number.
        """
        info = self[name]
        found = np.asarray(map_tensor(name, info, np.dtype(np.uint8))[index])
        if ((found & _NO_NUMBER) == _NO_NUMBER).any():
            raise InputError(f"{info.file}: tensor {name!r} has values that are not finite numbers")
        return found

    def scales(self, name: str, index: Box, *, transposed: bool = False) -> np.ndarray:
        """Scales of a tensor that is in fp8, float32 `[..., out, blocks of in]`: each output has
        those of its block.

        Args:
            index: a part of them.
            transposed: the tensor is `[..., in, out]`, and so are its scales.

        Raises:
            InputError: one of these is not finite.
        """
        stored, axis = self._scales[name], -1 if transposed else -2
        of_output = np.arange(self[name].shape[axis])[index[axis]] // self.block[axis]
        part: list[slice | np.ndarray] = [*index]
        part[axis] = of_output
        scales = map_tensor(name + _SCALES, stored, _SCALE_DTYPES[stored.dtype])[tuple(part)]
        return self._finite(name, np.asarray(scales).astype(np.float32))

    def _finite(self, name: str, scales: np.ndarray) -> np.ndarray:
        """Scales of a tensor, if they are."""
        if not np.isfinite(scales).all():
            raise InputError(
                f"{self._scales[name].file}: tensor {name + _SCALES!r} has values that are not "
                "finite numbers"
            )
        return scales
