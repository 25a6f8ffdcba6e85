"""Adapters: the trained tensors under Hugging Face names, and what they were trained on.

A folder holds safetensors, `expert_cfg.json` and `manifest.json`. The adapters that the ESFT
authors released have no manifest, and their names may lack the prefix `model.`. LoRA adapters have
the layout of `peft` (`lora.py`).
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esft_jax.adapt.attach import attach_factors, attach_tuned_experts, check_plain
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import check_experts, trains
from esft_jax.blocks import Box, box_shape, read_block, write_blocks
from esft_jax.checkpoint.card import CARD, adapter_card
from esft_jax.checkpoint.folder import TensorSpec, new_folder, write_tensors
from esft_jax.checkpoint.manifest import MANIFEST, RUN_DTYPES, check_base, read_manifest, run_dtype
from esft_jax.checkpoint.model_tensors import ModelTensors, model_tensors
from esft_jax.checkpoint.peft import ADAPTER_CONFIG, LoRAAdapter, open_lora
from esft_jax.checkpoint.tensor_files import DTYPES, TensorFiles, is_finite
from esft_jax.errors import InputError
from esft_jax.families import tensor_table
from esft_jax.families.tensors import LeafPath, Placement
from esft_jax.model.config import ModelConfig
from esft_jax.model.quantised import is_quantised
from esft_jax.model.transformer import Transformer
from esft_jax.ops.quantised import Quantised
from esft_jax.processes import on_first_process

EXPERT_CONFIG = "expert_cfg.json"

_MAX_SHARD_BYTES = 4 << 30


class AdapterTensors(Mapping[str, np.ndarray]):
    """Tensors of an adapter by their full Hugging Face names, read when they are asked for."""

    def __init__(self, files: TensorFiles):
        self.files = files
        self.stored: dict[str, str] = {}
        for name in files:
            full = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
            if full in self.stored:
                raise InputError(
                    f"{files.folder}: {name!r} and {self.stored[full]!r} are the same tensor"
                )
            self.stored[full] = name

    def __getitem__(self, name: str) -> np.ndarray:
        return self.files.read(self.stored[name])

    def dtype(self, name: str) -> np.dtype:
        """The type a tensor is stored in."""
        return DTYPES[self.files[self.stored[name]].dtype]

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        folder: where it is.
        tensors: its tensors by Hugging Face name; data is read on access.
        expert_cfg: what was trained.
        manifest: its provenance; None for adapters that ESFT's authors released.
    """

    folder: Path
    tensors: AdapterTensors
    expert_cfg: ExpertConfig
    manifest: dict[str, Any] | None

    def check(
        self,
        config: ModelConfig,
        base_fingerprint: str | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        """Check that the adapter fits a model.

        Args:
            base_fingerprint: of the weights of the base it shall be merged into.
            tokenizer_fingerprint: of the base's tokenizer; this and the others are compared as
                far as they are given and a manifest has them.

        Raises:
            InputError: it belongs to another base, or its tensors are not exactly those that its
                `expert_cfg.json` names in this model.
        """
        expected = trained_names(config, self.expert_cfg, str(self.folder / EXPERT_CONFIG))
        for name in expected:
            if name not in self.tensors:
                raise InputError(
                    f"{self.folder}: tensor {name!r} is missing; {EXPERT_CONFIG} names it"
                )
        placements = tensor_table(config).places
        wanted = set(expected)
        for name in self.tensors:
            if name not in wanted:
                raise InputError(
                    f"{self.folder}: unexpected tensor {name!r}; {EXPERT_CONFIG} does not name it"
                )
            self.tensors.files.check(self.tensors.stored[name], placements[name].shape)
        base = {
            "base_fingerprint": base_fingerprint,
            "config_fingerprint": config.fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint,
        }
        check_base(self.folder, self.manifest, base)

    @property
    def run_dtype(self) -> np.dtype | None:
        """The type that its run computed in; where no manifest says it, that of its tensors."""
        stored = {self.tensors.dtype(name).name for name in self.tensors}
        only = [jnp.dtype(name) for name in RUN_DTYPES if stored == {name}]
        return run_dtype(self.manifest) or (only[0] if only else None)

    @property
    def names(self) -> list[str]:
        """Hugging Face names of the tensors that it replaces."""
        return list(self.tensors)

    def dtype(self, name: str, base: np.dtype) -> np.dtype:
        """Type of a merged tensor: that of the adapter."""
        return self.tensors.dtype(name)

    def merged(self, name: str, base: Callable[[], np.ndarray]) -> np.ndarray:
        """The trained tensor; the one of the base is not read."""
        return self.tensors[name]


def trained_names(config: ModelConfig, expert_cfg: ExpertConfig, where: str) -> list[str]:
    """Names of the tensors that an expert configuration trains, in the order of the model.

    Raises:
        InputError: the configuration does not fit the model; the message begins with `where`.
    """
    try:
        check_experts(expert_cfg, config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    table = tensor_table(config)
    selected = {
        name
        for layer, ids in expert_cfg.experts.items()
        for expert in ids
        for name in table.expert_names(layer, expert)
    }

    def trained(name: str, place: Placement) -> bool:
        return name in selected or trains(expert_cfg, place.role)

    return [name for name, place in table.places.items() if trained(name, place)]


def trained_tensors(model: Transformer, tuned: nnx.State) -> Iterator[tuple[str, np.ndarray]]:
    """The trained tensors of a model under training, in `model.dtype`; with factors, merged.

    On several processes all must consume it, in step.

    Args:
        model: merged from the parts of `partition`, after the last update.
        tuned: the tuned one of them; its values are not read.
    """
    tensors, trained = ModelTensors(model), {path for path, _ in nnx.to_flat_state(tuned)}
    names = [
        name
        for name, place in tensors.placements.items()
        if place.path in trained or tensors.is_tuned(name) or tensors.update(name) is not None
    ]
    return model_tensors(model, names, model.dtype)


def save_adapter(
    folder: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    expert_cfg: ExpertConfig,
    manifest: Mapping[str, Any],
) -> None:
    """Write an adapter; an older one in the same place is replaced once the new one is complete.

    On several processes all must call it; the first one writes.

    Args:
        tensors: what `trained_tensors` yields.
        expert_cfg: what was trained.
        manifest: provenance, with the key `base_fingerprint` (of `LoadedBase`); all of it must be
            JSON. With `dtype`, models that it is merged into are loaded in that type.

    Raises:
        KeyError: `manifest` has no `base_fingerprint`.
        InputError: the folder holds something else, or cannot be written.
    """
    if "base_fingerprint" not in manifest:
        raise KeyError("base_fingerprint")
    found = dict(tensors)

    def write() -> None:
        specs = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in found.items()}
        content = json.dumps(manifest, indent=2) + "\n"
        with new_folder(Path(folder), replace=True) as temporary:
            write_tensors(temporary, specs, found.items(), _MAX_SHARD_BYTES)
            expert_cfg.save(temporary / EXPERT_CONFIG)
            (temporary / MANIFEST).write_text(content, encoding="utf-8")
            card = adapter_card(Path(folder), manifest, expert_cfg)
            (temporary / CARD).write_text(card, encoding="utf-8")

    # No process returns, and perhaps opens the folder, before it is there.
    on_first_process(write, str(folder))


def load_adapter(folder: str | Path) -> Adapter | LoRAAdapter:
    """Open an adapter of ours, one that ESFT's authors released, or one of `peft`.

    Tensors are read for a check, and then again on access.

    Raises:
        InputError: missing or damaged files, or numbers that are not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected an adapter")
    if (folder / ADAPTER_CONFIG).exists():
        lora = open_lora(folder)
        lora.files.check_finite()
        return lora
    expert_cfg = ExpertConfig.load(folder / EXPERT_CONFIG)
    manifest = read_manifest(folder)
    files = TensorFiles(folder)
    files.check_finite()
    return Adapter(folder, AdapterTensors(files), expert_cfg, manifest)


def apply_adapter(
    model: Transformer,
    adapter: Adapter | LoRAAdapter,
    base_fingerprint: str | None,
    tokenizer_fingerprint: str | None = None,
) -> None:
    """Merge an adapter into a base model, in place; sharding and types stay.

    The model's former arrays are used up. Quantised weights stay as they are: trained experts get a
    bank beside them, and low-rank updates stay factors.

    Args:
        base_fingerprint: of the model (`LoadedBase.fingerprint`); None skips the comparison, for
            adapters without a manifest.
        tokenizer_fingerprint: of the tokenizer it shall be used with; None skips the comparison.

    Raises:
        InputError: the model has been prepared for training, or see `Adapter.check`: it is
            unchanged then. Or a tensor is not finite in the model's type: it is of no use then.
    """
    check_plain(model)
    adapter.check(model.config, base_fingerprint, tokenizer_fingerprint)
    names = _names_to_write(model, adapter) if is_quantised(model) else adapter.names
    placements, place_of = tensor_table(model.config).places, ModelTensors(model).place
    by_leaf: dict[LeafPath, list[tuple[str, Box]]] = defaultdict(list)
    for name in names:
        path, box = place_of(name)
        by_leaf[path].append((name, box))
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    for path, boxes in by_leaf.items():
        param = params[path]
        for name, box in boxes:
            place, array = placements[name], param.get_value()
            tensor = adapter.merged(name, partial(_read, array, box, place))
            block = finite_block(tensor, name, place, array.dtype, adapter.folder)
            param.set_value(write_blocks(array, [(box, block.reshape(box_shape(box)))]))
    nnx.update(model, nnx.from_flat_state(params))


def finite_block(
    tensor: np.ndarray, name: str, place: Placement, dtype: np.dtype, folder: Path
) -> np.ndarray:
    """A tensor of a model with an adapter, as it lies in a parameter of a type.

    Raises:
        InputError: it is not finite in this type; the message begins with the adapter's folder.
    """
    tensor = tensor.astype(dtype)
    if not is_finite(tensor):
        raise InputError(
            f"{folder}: merged, tensor {name!r} has values that are no finite numbers in {dtype}"
        )
    return place.to_block(tensor)


def _names_to_write(model: Transformer, adapter: Adapter | LoRAAdapter) -> list[str]:
    """Make room beside quantised weights, which no tensor can be merged into; the names of those to
    be written afterwards.
    """
    if isinstance(adapter, Adapter):
        shapes = model.moe_blocks.moe.experts.weights
        attach_tuned_experts(
            model,
            adapter.expert_cfg,
            read=lambda name, *_: np.zeros(getattr(shapes, name).shape[2:], np.float32),
        )
        return adapter.names
    places, state = tensor_table(model.config).places, nnx.state(model, nnx.Param)
    quantised = {
        tuple(map(str, path))
        for path, param in nnx.to_flat_state(state)
        if isinstance(param.get_value(), Quantised)
    }
    beside = [name for name in adapter.names if places[name].path in quantised]
    attach_factors(model, adapter.as_lora(model.config, beside), seed=0)
    tensors = ModelTensors(model)
    for name in beside:
        found = tensors.update(name)
        assert found is not None, "its role is a target"
        factors, row = found
        for param, factor in zip((factors.a, factors.b), adapter.factors(name), strict=True):
            box = slice(row, row + 1), *(slice(0, side) for side in factor.shape[::-1])
            param.set_value(write_blocks(param.get_value(), [(box, factor.T[None])]))
    return [name for name in adapter.names if name not in beside]


def _read(leaf: jax.Array, box: Box, place: Placement) -> np.ndarray:
    return place.from_block(read_block(leaf, box))
