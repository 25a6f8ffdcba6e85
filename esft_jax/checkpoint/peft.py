"""LoRA adapters in the layout of `peft`: `adapter_config.json` and `adapter_model.safetensors`.

Factors are stored under the Hugging Face name of the matrix they update, experts one by one:
`base_model.model.{module}.lora_A.weight` `[r, in]` and `.lora_B.weight` `[out, r]`, in the type of
the masters.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA, Target
from esft_jax.checkpoint.card import CARD, adapter_card
from esft_jax.checkpoint.folder import TensorSpec, new_folder, write_tensors
from esft_jax.checkpoint.manifest import MANIFEST, check_base, read_manifest, run_dtype
from esft_jax.checkpoint.model_tensors import ModelTensors
from esft_jax.checkpoint.tensor_files import TensorFiles, common_dtype
from esft_jax.errors import InputError
from esft_jax.families import tensor_table
from esft_jax.files import checked, read_json
from esft_jax.model.config import ModelConfig
from esft_jax.model.params import Role
from esft_jax.model.transformer import Transformer
from esft_jax.processes import on_first_process

ADAPTER_CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model"
# What `peft` can say and is not read here, with the value that says nothing.
_PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
}
# The same of kinds of LoRA that most versions of `peft` do not know: never written.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# How factors may begin. All else (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) changes the base as well.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoRAAdapter:
    """A LoRA adapter on disk, ours or one that `peft` wrote.

    Attributes:
        folder: where it is.
        files: its factors; data is read on access.
        rank, scale: of every update.
        manifest: its provenance; None if we did not write it.
    """

    folder: Path
    files: TensorFiles
    rank: int
    scale: float
    manifest: dict[str, Any] | None

    @property
    def run_dtype(self) -> np.dtype | None:
        """The type that its run computed in; None if we did not write it, or did not say it yet.

        The factors say nothing: they are in the type of their masters.
        """
        return run_dtype(self.manifest)

    @property
    def names(self) -> list[str]:
        """Hugging Face names of the matrices that it updates."""
        return [
            name.removeprefix(_PREFIX).replace(".lora_A.", ".")
            for name in self.files
            if name.endswith(".lora_A.weight")
        ]

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
            InputError: it belongs to another base, or its tensors are no factors of this model's
                matrices, or not those that its manifest names.
        """
        placements = tensor_table(config).places
        expected: set[str] = set()
        for name in self.names:
            shape = placements[name].shape if name in placements else ()
            if len(shape) != 2:
                raise InputError(f"{self.folder}: the model has no matrix {name!r} to update")
            factors = _factor_names(name)
            self.files.check(factors[0], (self.rank, shape[1]))
            self.files.check(factors[1], (shape[0], self.rank))
            expected |= set(factors)
        for stored in self.files:
            if stored not in expected:
                raise InputError(f"{self.folder}: unexpected tensor {stored!r}")
        if self.manifest is None:
            return
        where = f"{self.folder / MANIFEST}: updates"
        if set(self.names) != set(checked(list[str], self.manifest.get("updates"), where)):
            raise InputError(
                f"{self.folder}: its tensors are not those of {MANIFEST}: updates; expected both "
                "as they were written"
            )
        base = {
            "base_fingerprint": base_fingerprint,
            "config_fingerprint": config.fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint,
        }
        check_base(self.folder, self.manifest, base)

    def dtype(self, name: str, base: np.dtype) -> np.dtype:
        """Type to keep the sum of base and update in: the wider of the base's and the run's."""
        return common_dtype(filter(None, (base, self.run_dtype)))

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A `[rank, inputs]` and B `[outputs, rank]` of a matrix, float32."""
        a, b = (self.files.read(factor).astype(np.float32) for factor in _factor_names(name))
        return a, b

    def as_lora(self, model: ModelConfig, names: Iterable[str]) -> LoRA:
        """What has to be updated for some of its matrices to be."""
        places = tensor_table(model).places
        targets: dict[str, Target] = {
            Role.ATTENTION: "attention",
            Role.DENSE_MLP: "dense_mlps",
            Role.SHARED_EXPERT: "shared_experts",
        }
        experts: dict[int, set[int]] = defaultdict(set)
        found = set[Target]()
        for place in map(places.__getitem__, names):
            if place.role is Role.ROUTED_EXPERT:
                layer, expert = place.index
                experts[model.moe_layers[layer]].add(expert)
            else:
                found.add(targets[place.role])
        chosen = ExpertConfig({layer: tuple(sorted(ids)) for layer, ids in experts.items()})
        return LoRA(self.rank, self.scale * self.rank, tuple(sorted(found)), chosen)

    def merged(self, name: str, base: Callable[[], np.ndarray]) -> np.ndarray:
        """A matrix of the base with its update, float32."""
        a, b = self.factors(name)
        return base().astype(np.float32) + self.scale * (b @ a)


def open_lora(folder: Path) -> LoRAAdapter:
    """Open a folder with `adapter_config.json`.

    Raises:
        InputError: missing or damaged files, or more than plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{path}: expected a JSON object with peft_type = 'LORA'")
    for key, plain in (_PLAIN | dict.fromkeys(_VARIANTS)).items():
        found = config.get(key, plain)
        if found != plain and found:
            raise InputError(f"{path}: {key}: {found!r} is not supported; expected {plain!r}")
    beginning = config.get("init_lora_weights", True)
    if beginning not in _BEGINNINGS:
        known = ", ".join(map(str, _BEGINNINGS))
        raise InputError(
            f"{path}: init_lora_weights: {beginning!r} is not supported; expected one of {known}"
        )
    rank = checked(PositiveInt, config.get("r"), f"{path}: r")
    alpha = checked(float, config.get("lora_alpha"), f"{path}: lora_alpha")
    return LoRAAdapter(folder, TensorFiles(folder), rank, alpha / rank, read_manifest(folder))


def save_lora(
    folder: str | Path, model: Transformer, lora: LoRA, manifest: Mapping[str, Any]
) -> None:
    """Write an adapter; an older one in the same place is replaced once the new one is complete.

    On several processes all must call it; the first one writes.

    Args:
        model: with its factors.
        manifest: provenance, with the keys `base_fingerprint` and `base_model`.

    Raises:
        InputError: the model has no factors, or others than `lora` says.
    """
    tensors = ModelTensors(model)
    updates = {name: found for name in tensors.placements if (found := tensors.update(name))}
    if not updates:
        raise InputError(f"{folder}: the model has no low-rank factors to save")
    for name, (update, _) in updates.items():
        rank = update.a.get_value().shape[-1]
        if (rank, update.scale) != (lora.rank, lora.scale):
            raise InputError(
                f"{folder}: {name}: factors of rank {rank} and scale {update.scale:g}; expected "
                f"rank {lora.rank} and scale {lora.scale:g}"
            )
    factors = {
        stored: factor
        for name in updates
        for stored, factor in zip(_factor_names(name), tensors.factors(name), strict=True)
    }

    def write() -> None:
        specs = {name: TensorSpec(factor.dtype, factor.shape) for name, factor in factors.items()}
        config = _peft_config(model.config, lora, manifest["base_model"])
        with new_folder(Path(folder), replace=True) as temporary:
            write_tensors(temporary, specs, factors.items(), None, stem=_WEIGHTS)
            _write_json(temporary / ADAPTER_CONFIG, config)
            whole = {**manifest, "updates": list(updates)}
            _write_json(temporary / MANIFEST, whole)
            card = adapter_card(Path(folder), whole, None)
            (temporary / CARD).write_text(card, encoding="utf-8")

    # No process returns, and perhaps opens the folder, before it is there.
    on_first_process(write, str(folder))


def _factor_names(name: str) -> tuple[str, str]:
    module = _PREFIX + name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _peft_config(model: ModelConfig, lora: LoRA, base_model: str) -> dict[str, Any]:
    """What makes `peft` update the same matrices.

    With transformers 5, `peft` takes the names of MLP projections among `target_modules` for parts
    of its fused experts. So dense MLPs and shared experts are named as parameters, and experts by a
    pattern that is true of fused experts (where their index is missing) if it means all of them.
    """
    table = tensor_table(model)
    # Experts that `peft` does not find it would leave out, and say nothing. It refuses an adapter
    # of which it finds no module at all.
    roles = lora.roles
    if lora.experts.num_experts_selected and not table.experts.known_to_peft:
        roles = frozenset()
    # Names within a layer, in the order of the model.
    layers = f"{model.prefix}layers."
    within = {
        name.removeprefix(layers).partition(".")[2]: place.role
        for name, place in table.places.items()
        if place.is_matrix and place.role in roles
    }
    attention = [name for name, role in within.items() if role is Role.ATTENTION]
    parameters = [name for name, role in within.items() if role is not Role.ATTENTION]
    modules = []
    if attention:
        modules.append(rf"\d+\.({'|'.join(_escaped(attention))})")
    experts = table.experts
    (prefix,) = _escaped([experts.prefix])
    parts = "|".join(_escaped([experts.gate, experts.up, experts.down]))
    if "experts" in lora.targets:
        modules.append(rf"\d+\.{prefix}\.(\d+\.)?({parts})")
    else:
        for layer, ids in lora.experts.experts.items():
            if ids:
                chosen = "|".join(map(str, sorted(ids)))
                modules.append(rf"{layer}\.{prefix}\.({chosen})\.({parts})")
        if lora.experts.num_experts_selected:
            # No model has this module. Of fused experts, it asks for a half of a tensor, which
            # `peft` refuses; without it, `peft` would leave out the experts and say nothing.
            modules.append(rf"\d+\.{prefix}\.{experts.gate}")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": rf"{re.escape(layers)}({'|'.join(modules)})" if modules else [],
        "target_parameters": parameters or None,
        **_PLAIN,
    }


def _escaped(names: Iterable[str]) -> list[str]:
    return [re.escape(name.removesuffix(".weight")) for name in names]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
