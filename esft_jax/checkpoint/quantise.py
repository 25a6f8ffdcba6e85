"""Keep matrices of a converted checkpoint quantised beside it, as loading would quantise them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from esft_jax.checkpoint.arrays import create_array, write_array
from esft_jax.checkpoint.converted import ConvertedSource, is_converted
from esft_jax.checkpoint.journal import Journal
from esft_jax.checkpoint.quantised import (
    FORMAT,
    MANIFEST,
    QUANTISED,
    Manifest,
    PartName,
    Place,
    arrays_of,
    check_kept,
    matrix_block,
    matrix_box,
    matrix_bytes,
    quantised_params,
    quantised_reader,
)
from esft_jax.checkpoint.source import HuggingFaceSource, Source, combine_digests
from esft_jax.errors import InputError
from esft_jax.families.tensors import LeafPath
from esft_jax.files import check_no_links, write_text_atomic
from esft_jax.model.config import ModelConfig
from esft_jax.ops.quantisation import Quantisation, Scheme
from esft_jax.ops.quantised import Quantised
from esft_jax.processes import any_process, on_all_processes


@dataclass(frozen=True)
class _Part:
    """A part of the model, and how it is quantised.

    Attributes:
        params: shapes of its parameters.
    """

    name: PartName
    scheme: Scheme
    group_size: int
    params: dict[LeafPath, Quantised]

    @property
    def folder(self) -> str:
        """Its name beside the parameters."""
        return f"{self.name}-{self.scheme}-{self.group_size}"


def check_quantisation(source: Source, how: Quantisation) -> None:
    """Check that all matrices of a base can be quantised so.

    Raises:
        InputError: one cannot be.
    """
    for part in _parts(source.config, how):
        for path, like in part.params.items():
            check_kept(source, path, like)


def quantise_converted(
    folder: str | Path, how: Quantisation, published: HuggingFaceSource | None = None
) -> None:
    """Keep matrices of a finished conversion quantised beside it; what is there already stays.

    A kill leaves a folder that does not count, and that the same call completes. On several
    processes all must call it; each quantises a share.

    Args:
        published: what it was converted from; read for what is published quantised.

    Raises:
        InputError: a matrix cannot be quantised so, or is not published so.
    """
    if not is_converted(Path(folder)):
        raise InputError(f"{folder}: is no converted checkpoint; expected one, or a source")
    source = ConvertedSource(folder)
    check_quantisation(published or source, how)
    for part in _parts(source.config, how):
        target = source.folder / QUANTISED / part.folder
        if not any_process((target / MANIFEST).is_file()):
            _keep(part, source, target, published)


def describe_quantisation(source: Source, how: Quantisation) -> list[str]:
    """A line for each part that a converted checkpoint could keep as a run wants it: whether it
    does.
    """
    if not isinstance(source, ConvertedSource):
        return []
    lines = []
    for part in _parts(source.config, how):
        if all(source.keeps(path, like) for path, like in part.params.items()):
            said = f"read from {source.folder / QUANTISED / part.folder}"
        else:
            kept = ", ".join(folder.name for folder in source.kept) or "nothing quantised"
            said = (
                f"quantised while loading; {source.folder} keeps {kept}, and no {part.folder} "
                "(`convert --quantise`)"
            )
        lines.append(f"quantise.{part.name}: {said}")
    return lines


def _parts(config: ModelConfig, how: Quantisation) -> Iterator[_Part]:
    """The parts that are quantised."""
    halves: list[tuple[PartName, Quantisation]] = [
        ("experts", dataclasses.replace(how, rest=None)),
        ("rest", dataclasses.replace(how, experts=None)),
    ]
    for name, own in halves:
        if params := quantised_params(config, own):
            like = next(iter(params.values()))
            yield _Part(name, like.scheme, like.group_size, params)


def _keep(
    part: _Part, source: ConvertedSource, target: Path, published: HuggingFaceSource | None
) -> None:
    """Write a folder of matrices, or complete it."""
    matrices = {
        f"{'.'.join(path)}/{'.'.join(map(str, place))}": (path, place)
        for path, like in part.params.items()
        for place in np.ndindex(like.shape[:-2])
    }
    journal = Journal(target, matrices, str(source.folder))
    process = jax.process_index()
    with on_all_processes(f"{target}: quantisation"):
        if process == 0:
            check_no_links(target.parent)
            journal.begin(source.fingerprint)
    with on_all_processes(f"{target}: quantisation"):
        write = _writer(part, source, target, published)
        journal.work_off(
            lambda name: write(name, *matrices[name]),
            lambda name: matrix_bytes(part.params[matrices[name][0]]),
            process,
            jax.process_count(),
            f"quantise {part.name}",
        )
    with on_all_processes(f"{target}: quantisation"):
        if process == 0:
            manifest = Manifest(
                FORMAT,
                source.fingerprint,
                part.name,
                part.scheme,
                part.group_size,
                [".".join(path) for path in part.params],
                combine_digests(journal.digests()),
            )
            text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
            write_text_atomic(target / MANIFEST, text)
            journal.end()


def _writer(
    part: _Part, source: ConvertedSource, target: Path, published: HuggingFaceSource | None
) -> Callable[[str, LeafPath, Place], str]:
    """What writes a matrix; it returns the hash of its name, codes and scales."""
    origin: Source = source
    if as_published := part.scheme == "fp8":
        assert published is not None, "checked: else all of it is kept already"
        origin = published
    readers, arrays = {}, {}
    for path, like in part.params.items():
        readers[path] = quantised_reader(origin, path, like)
        arrays[path] = [
            (place, create_array(place, own.shape, matrix_block(own.shape), np.dtype(own.dtype)))
            for place, own in arrays_of(target, path, like)
        ]

    def write(name: str, path: LeafPath, place: Place) -> str:
        matrix, digest = readers[path](place), hashlib.sha256(name.encode())
        if as_published:
            codes, scales = map(jnp.asarray, matrix)
            found = Quantised(codes, scales, part.scheme, part.group_size)
            _check_same(source, path, place, found)
        for values, (where, array) in zip(matrix, arrays[path], strict=True):
            stacked = values.reshape(matrix_block(array.shape))
            write_array(where, array, matrix_box(place, array.shape), stacked)
            digest.update(np.ascontiguousarray(values).view(np.uint8).data)
        return digest.hexdigest()

    return write


def _check_same(source: ConvertedSource, path: LeafPath, place: Place, found: Quantised) -> None:
    """Check that what is published stands for what was converted."""
    box = matrix_box(place, found.shape)
    exact = source.block(path, box, np.dtype(np.float32))[(0,) * len(place)]
    if not np.array_equal(found.astype(jnp.float32), exact):
        raise InputError(
            f"{source.folder}: {'.'.join(path)} has other numbers than the source in fp8; expected "
            "the source that it was converted from"
        )
