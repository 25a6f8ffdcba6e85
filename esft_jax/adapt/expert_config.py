"""The reference's `expert_cfg.json`: which experts of which layers are trained."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esft_jax.adapt.parts import FLAGS, PARTS, Part, merge_flags, ordered
from esft_jax.errors import InputError, shown
from esft_jax.files import read_json, write_text_atomic


@dataclass(frozen=True)
class ExpertConfig:
    """What is trained: routed experts by layer, and other parts of the network.

    Attributes:
        experts: Decoder layer index -> expert ids, in descending score. A layer may be absent or
            empty: none of its routed experts is trained.
        also: What else is trained, see `parts.PARTS`; in the order of these.
    """

    experts: Mapping[int, tuple[int, ...]]
    also: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        by_layer = {layer: tuple(self.experts[layer]) for layer in sorted(self.experts)}
        object.__setattr__(self, "experts", by_layer)
        object.__setattr__(self, "also", ordered(self.also))

    @property
    def num_experts_selected(self) -> int:
        """Number of selected (layer, expert) pairs."""
        return sum(len(ids) for ids in self.experts.values())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExpertConfig":
        """Read an `expert_cfg.json`; `InputError` names the file and the key that is wrong."""
        content = read_json(path)
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected a JSON object with the key 'experts'")
        unknown = sorted(content.keys() - {"experts", *FLAGS, "also"})
        if unknown:
            expected = ", ".join(("experts", *FLAGS, "also"))
            raise InputError(f"{path}: unknown key {shown(unknown[0])}; expected {expected}")
        if not isinstance(content.get("experts"), dict):
            raise InputError(f"{path}: key 'experts' must be an object of layer -> [expert ids]")
        also = content.get("also", [])
        if not isinstance(also, list):
            raise InputError(f"{path}: key 'also' must be a list, not {shown(also)}")
        for name in also:
            if not isinstance(name, str) or name not in PARTS:
                raise InputError(
                    f"{path}: also: {shown(name)} is unknown; expected some of {', '.join(PARTS)}"
                )
        try:
            parts = merge_flags(also, {flag: content[flag] for flag in FLAGS if flag in content})
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        experts = {
            layer_index(layer, f"{path}: experts"): _expert_ids(ids, f"{path}: experts.{layer}")
            for layer, ids in content["experts"].items()
        }
        return cls(experts, parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file as the reference does: one line, layers in the order of their names.

        Where some but not all modules that are no experts are trained, neither value of
        `non_expert_modules` is true of them: `also` names them in its place.
        """
        content: dict[str, Any] = {
            "experts": {
                str(layer): list(self.experts[layer]) for layer in sorted(self.experts, key=str)
            },
            "shared_experts": "shared_experts" in self.also,
        }
        others = [part for part in self.also if part != "shared_experts"]
        if others in ([], ["non_expert_modules"]):
            content["non_expert_modules"] = bool(others)
        else:
            content["also"] = others
        write_text_atomic(path, json.dumps(content))

    def validate(self, moe_layers: Sequence[int], num_experts: int) -> None:
        """Check the selection against a model.

        Args:
            moe_layers: Decoder layer indices of the model's MoE layers.
            num_experts: Routed experts per MoE layer.

        Raises:
            InputError: A layer has no experts, an id is out of range or repeated, or the
                configuration selects nothing at all.
        """
        self.validate_ids(moe_layers, num_experts)
        if not (self.num_experts_selected or self.also):
            raise InputError("expert config: nothing is selected; expected at least one expert")

    def validate_ids(self, moe_layers: Sequence[int], num_experts: int) -> None:
        """As `validate`; it may select nothing."""
        known = set(moe_layers)
        for layer, ids in self.experts.items():
            if layer not in known:
                expected = ", ".join(map(str, sorted(known)))
                raise InputError(
                    f"expert config: layer {layer} is no MoE layer; they are {expected}"
                )
            for expert in ids:
                if not 0 <= expert < num_experts:
                    raise InputError(
                        f"expert config: layer {layer}: expert {shown(expert)} is out of range;"
                        f" expected 0 to {num_experts - 1}"
                    )
            _check_distinct(ids, f"expert config: layer {layer}")


def layer_index(key: str, where: str) -> int:
    """The layer a JSON key names; `InputError` starts with `where` if it is no plain number."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", key):  # "1" and "01" would name one layer twice
        raise InputError(f"{where}: {shown(key)} is no layer index; expected a number such as '1'")
    return int(key)


def _expert_ids(ids: Any, where: str) -> tuple[int, ...]:
    if not isinstance(ids, list):
        raise InputError(f"{where}: expected a list of expert ids, not {shown(ids)}")
    for expert in ids:
        # bool is a subclass of int, but `true` is no expert id.
        if not isinstance(expert, int) or isinstance(expert, bool) or expert < 0:
            raise InputError(f"{where}: {shown(expert)} is no expert id; expected a number from 0")
    _check_distinct(ids, where)
    return tuple(ids)


def _check_distinct(ids: Sequence[int], where: str) -> None:
    seen: set[int] = set()
    for expert in ids:
        if expert in seen:
            raise InputError(f"{where}: expert {shown(expert)} is listed twice")
        seen.add(expert)
