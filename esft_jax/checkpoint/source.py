"""Base weights on disk: a Hugging Face folder, a hub name, or a converted checkpoint.

Both forms answer the same two questions: a tensor by its Hugging Face name, and a block of one of
our stacked parameters.
"""

import hashlib
import math
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import jax
import ml_dtypes
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from esft_jax.blocks import Box, box_shape, intersect, within
from esft_jax.checkpoint.fp8 import Fp8Files
from esft_jax.checkpoint.mxfp4 import Mxfp4Files
from esft_jax.checkpoint.streaming import in_order, share
from esft_jax.checkpoint.tensor_files import DTYPE_NAMES, TensorFiles
from esft_jax.errors import InputError
from esft_jax.families import load_model_config, tensor_table
from esft_jax.families.tensors import LeafPath, Placement
from esft_jax.model.config import ModelConfig
from esft_jax.model.params import Role
from esft_jax.model.rope import inverse_frequencies
from esft_jax.ops.quantised import Quantised
from esft_jax.progress import Advance, Progress

_COMPARED_BYTES = 16 << 20


class Source(Protocol):
    """Where base weights are read from.

    Attributes:
        folder: holds `config.json` and the tokenizer.
        config: the model's shape.
        placements: the model's tensors and their places.
        carried: tensors that the model does not use, and that exports keep.
        fused: experts lie in tensors that hold all of a layer, and exports write them so.
    """

    fused: bool
    carried: TensorFiles
    folder: Path
    config: ModelConfig
    placements: dict[str, Placement]

    @property
    def fingerprint(self) -> str:
        """Hash of all weights; see `combine_digests`. All processes must ask together."""

    def dtype(self, name: str) -> np.dtype:
        """The type a tensor is read in; it loses nothing of what is stored."""

    def tensor(self, name: str) -> np.ndarray:
        """One tensor under its Hugging Face name, in that type."""

    def block(
        self, path: LeafPath, box: Box, dtype: np.dtype, advance: Advance | None = None
    ) -> np.ndarray:
        """A block of a stacked parameter, cast to a type.

        Args:
            advance: receives how many bytes of the block are there, again and again.
        """

    def keeps(self, path: LeafPath, like: Quantised) -> bool:
        """Whether the files hold a stacked parameter quantised like this."""

    def quantised(
        self, path: LeafPath, place: tuple[int, ...], like: Quantised
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of a matrix of a stacked parameter that the files keep.

        Args:
            place: of the matrix in the stack.
            like: all of the parameter; its shapes and scheme are read.
        """


class HuggingFaceSource:
    """A folder in Hugging Face layout.

    Raises:
        InputError: missing, unexpected or misshapen tensors, by name; damaged files.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = load_model_config(self.folder)
        table = tensor_table(self.config)
        self.placements, self._embedding = table.places, table.embedding
        self.files = _open(self.folder, self.config)
        fused = {name: s for name, s in table.fused_shapes.items() if name in self.files}
        self._fused = {name: part for name, part in table.fused.items() if part.name in fused}
        self.fused = bool(fused) or table.experts.stored_fused
        expected = fused | {
            name: place.shape for name, place in self.placements.items() if name not in self._fused
        }
        missing = [name for name in expected if name not in self.files]
        if missing:
            others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise InputError(f"{self.folder}: tensor {missing[0]!r} is missing{others}")
        for name, shape in expected.items():
            self.files.check(name, shape)
        unplaced = [name for name in self.files if name not in expected]
        self.carried = self.files.to_carry(
            name
            for name in unplaced
            # transformers writes shared experts of a width of 0.
            if name.startswith(self.config.carried) or 0 in self.files[name].shape
        )
        for name in unplaced:
            if name not in self.carried:
                self._check_implied(name)

    def _check_implied(self, name: str) -> None:
        """Refuse a tensor without a place among the parameters, unless it repeats what is known.

        Raises:
            InputError: it is no tensor of this model, or has other values than the model.
        """
        file, stored = self.files[name].file, self.files.read
        if name in self._fused:
            raise InputError(
                f"{file}: tensor {name!r} is there twice: {self._fused[name].name!r} holds it, too"
            )
        embedding = self._embedding
        if self.config.tie_embeddings and name == "lm_head.weight":
            self.files.check(name, self.placements[embedding].shape)
            if not _same_values(stored(name), stored(embedding)):
                raise InputError(
                    f"{file}: tensor {name!r} differs from {embedding!r}, which is the head by "
                    "tie_word_embeddings: true of config.json; expected equal ones, or false there"
                )
        elif (layer := _layer_of_rotary_buffer(name, self.config)) is not None:
            _, rope = self.config.attentions[self.config.kind(layer)]
            self.files.check(name, (rope.rotated // 2,))
            # Old exports have those before any extension of the context, too.
            known = (inverse_frequencies(r) for r in (rope, replace(rope, yarn=None)))
            found = stored(name)
            close = max(1e-5, 2 * float(ml_dtypes.finfo(found.dtype).eps))
            if not any(np.allclose(found.astype(np.float32), k, close, 1e-7) for k in known):
                raise InputError(
                    f"{file}: tensor {name!r} differs from what rope_theta and the like of "
                    "config.json say; expected the same frequencies, or none"
                )
        else:
            raise InputError(
                f"{file}: unexpected tensor {name!r}; config.json describes no such tensor"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all weights; every process reads a share of them."""
        names = list(self.placements)
        own = share(names, self.num_bytes, jax.process_index(), jax.process_count())
        found = np.zeros((len(names), hashlib.sha256().digest_size), np.uint8)
        rows = {name: row for row, name in enumerate(names)}
        with Progress("hash", sum(map(self.num_bytes, own)), unit="B") as progress:
            for name, digest in in_order(self.digest, own, self.num_bytes):
                found[rows[name]] = np.frombuffer(bytes.fromhex(digest), np.uint8)
                progress.advance(self.num_bytes(name))
        if jax.process_count() > 1:
            # Every row comes from one process, and is zero elsewhere.
            found = process_allgather(found).sum(axis=0, dtype=np.uint8)
        return combine_digests({name: found[row].tobytes().hex() for name, row in rows.items()})

    def digest(self, name: str) -> str:
        """Hash of a tensor; see `tensor_digest`."""
        return tensor_digest(name, self.tensor(name))

    def num_bytes(self, name: str) -> int:
        """Size of a tensor as it is read."""
        return self.dtype(name).itemsize * math.prod(self.placements[name].shape)

    @cached_property
    def by_leaf(self) -> dict[LeafPath, list[str]]:
        """Names of the tensors in each parameter."""
        return names_by_leaf(self.placements)

    def dtype(self, name: str) -> np.dtype:
        """The type a tensor is read in: the one it is stored in, or float32 for fp8 blocks."""
        part = self._fused.get(name)
        return self.files.dtype(part.name if part else name)

    def tensor(self, name: str, index: Box = ()) -> np.ndarray:
        """A tensor, or a part of it, in the type of `dtype`."""
        part = self._fused.get(name)
        if part is None:
            return self.files.read(name, index)
        index = index or tuple(slice(0, size) for size in self.placements[name].shape)
        return part.view(self.files.read(part.name, part.box(index)))

    def block(
        self, path: LeafPath, box: Box, dtype: np.dtype, advance: Advance | None = None
    ) -> np.ndarray:
        """A block of a stacked parameter, of the tensors that reach into it."""
        block = np.empty(box_shape(box), dtype)

        def copy(name: str) -> int:
            common = intersect(box, self.placements[name].box)
            if common is None:
                return 0
            part = block[within(common, box)]
            self._copy(name, common, part)
            return part.nbytes

        with ThreadPoolExecutor() as pool:
            for copied in pool.map(copy, self.by_leaf[path]):
                if advance is not None:
                    advance(copied)
        return block

    def part(self, name: str, box: Box, dtype: np.dtype) -> np.ndarray:
        """The same of a box within a single tensor's place."""
        block = np.empty(box_shape(box), dtype)
        self._copy(name, box, block)
        return block

    def keeps(self, path: LeafPath, like: Quantised) -> bool:
        """Whether the files hold a parameter like this: in the blocks of fp8.

        Raises:
            InputError: some of its tensors are not in fp8; names one.
        """
        if like.scheme != "fp8" or not isinstance(self.files, Fp8Files):
            return False
        for name in self.by_leaf[path]:
            part = self._fused.get(name)
            stored = part.name if part else name
            if not self.files.in_fp8(stored):
                key = "experts" if self.placements[name].role is Role.ROUTED_EXPERT else "rest"
                info = self.files[stored]
                raise InputError(
                    f"quantise.{key}: fp8 keeps what is published so; tensor {stored!r} of "
                    f"{info.file} is {info.dtype}; expected another scheme, or none"
                )
            if part and part.transposed and len({*self.files.block}) > 1:
                raise InputError(
                    f"quantise.experts: tensor {stored!r} has inputs first and blocks of "
                    f"{self.files.block}; expected square ones, another scheme, or none"
                )
        return True

    def quantised(
        self, path: LeafPath, place: tuple[int, ...], like: Quantised
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of a matrix that is in fp8; see `keeps`."""
        codes = np.empty(like.codes.shape[-2:], like.codes.dtype)
        scales = np.empty(like.scales.shape[-2:], like.scales.dtype)
        for name in self._by_matrix[path][place]:
            columns = self.placements[name].box[-1]
            for target, read in (codes, self._codes), (scales, self._scales):
                part = slice(0, len(target)), slice(0, columns.stop - columns.start)
                self.placements[name].copy_part(partial(read, name), part, target[:, columns])
        return codes, scales

    def _codes(self, name: str, index: Box) -> np.ndarray:
        """A part of a matrix `[out, in]` that is in fp8."""
        assert isinstance(self.files, Fp8Files)
        part = self._fused.get(name)
        if part is None:
            return self.files.codes(name, index)
        return part.view(self.files.codes(part.name, part.box(index)))

    def _scales(self, name: str, index: Box) -> np.ndarray:
        """A part of its scales `[out, blocks of in]`."""
        assert isinstance(self.files, Fp8Files)
        part = self._fused.get(name)
        if part is None:
            return self.files.scales(name, index)
        found = self.files.scales(part.name, part.box(index), transposed=part.transposed)
        return part.view(found)

    @cached_property
    def _by_matrix(self) -> dict[LeafPath, dict[tuple[int, ...], list[str]]]:
        """Names of the tensors in each matrix of each parameter."""
        found: dict[LeafPath, dict[tuple[int, ...], list[str]]] = {}
        for name, place in self.placements.items():
            found.setdefault(place.path, {}).setdefault(place.index, []).append(name)
        return found

    def _copy(self, name: str, box: Box, target: np.ndarray) -> None:
        """Copy a part of a tensor, by its place in the parameter."""
        place = self.placements[name]
        part = within(box, place.box)[len(place.index) :]
        place.copy_part(partial(self.tensor, name), part, target[(0,) * len(place.index)])


def _open(folder: Path, config: ModelConfig) -> TensorFiles:
    """Files by how weights are quantised there."""
    if config.fp8_block is not None:
        return Fp8Files(folder, config.fp8_block)
    return Mxfp4Files(folder) if config.mxfp4 else TensorFiles(folder)


def _same_values(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two matrices hold the same numbers, in whatever type; a few rows at a time."""
    step = max(_COMPARED_BYTES // (4 * one.shape[1]), 1)
    return all(
        np.array_equal(
            one[begin : begin + step].astype(np.float32),
            other[begin : begin + step].astype(np.float32),
        )
        for begin in range(0, len(one), step)
    )


def _layer_of_rotary_buffer(name: str, config: ModelConfig) -> int | None:
    """Whose frequencies a tensor holds, which old exports keep; None: it is no such tensor."""
    buffer = r"(?:layers\.(\d{1,9})\.self_attn\.)?rotary_emb\.inv_freq"
    match = re.fullmatch(re.escape(config.prefix) + buffer, name)
    if match is None or int(match[1] or 0) >= config.num_layers:
        return None
    return int(match[1] or 0)


def names_by_leaf(placements: dict[str, Placement]) -> dict[LeafPath, list[str]]:
    """Names of the tensors in each parameter."""
    found: dict[LeafPath, list[str]] = defaultdict(list)
    for name, place in placements.items():
        found[place.path].append(name)
    return found


def tensor_digest(name: str, tensor: np.ndarray) -> str:
    """SHA-256 of a tensor's name, type, shape and bytes."""
    shape = "x".join(map(str, tensor.shape))
    digest = hashlib.sha256(f"{name} {DTYPE_NAMES[tensor.dtype]} {shape}\n".encode())
    digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
    return digest.hexdigest()


def combine_digests(digests: dict[str, str]) -> str:
    """Fingerprint of a base model, from the digest of each tensor under its per-expert name.

    It does not depend on how tensors are spread over files, nor on whether experts are fused.
    """
    lines = "".join(f"{digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
