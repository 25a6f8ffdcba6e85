"""What `method: lora` trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.errors import InputError

if TYPE_CHECKING:  # it imports JAX, and configurations import this module
    from esft_jax.model.config import ModelConfig

Target = Literal["attention", "dense_mlps", "shared_experts", "experts", "selected_experts"]


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates: of which matrices, and how large.

    Attributes:
        rank: columns of A and rows of B.
        alpha: the update of a matrix is `alpha / rank * A B`.
        targets: the kinds of layers whose matrices are updated.
        experts: the routed experts whose matrices are updated.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...]
    experts: ExpertConfig

    @property
    def roles(self) -> frozenset[str]:
        """Roles of the parameters that are updated, but for routed experts."""
        roles = {"attention": "attention", "dense_mlps": "dense_mlp"}
        roles["shared_experts"] = "shared_expert"
        return frozenset(role for target, role in roles.items() if target in self.targets)

    @property
    def scale(self) -> float:
        """Factor on `A B`."""
        return self.alpha / self.rank

    @classmethod
    def on(
        cls,
        model: ModelConfig,
        rank: int,
        alpha: float,
        targets: Iterable[Target],
        selected: ExpertConfig | None,
    ) -> LoRA:
        """Updates of a model.

        Args:
            selected: the experts that `selected_experts` stands for.

        Raises:
            InputError: the model has none of the targets, or a matrix to update has no such rank.
        """
        experts, targets = ExpertConfig({}), tuple(targets)
        if "experts" in targets:
            every = tuple(range(model.router.num_experts))
            experts = ExpertConfig(dict.fromkeys(model.moe_layers, every))
        elif "selected_experts" in targets:
            assert selected is not None
            experts = ExpertConfig(selected.experts)
        lora = cls(rank, alpha, targets, experts)
        if lora.lowest_layer(model) is None:
            raise InputError(f"lora.targets: the model has no {' and no '.join(targets)}")
        if rank > (largest := lora._smallest_side(model)):
            raise InputError(
                f"lora.rank: {rank}; expected at most {largest}, the smallest side of an updated "
                "matrix"
            )
        return lora

    def _smallest_side(self, model: ModelConfig) -> int:
        """Of the matrices that are updated."""
        sides = [model.hidden_size]
        if "attention" in self.targets:
            sides += (side for kind, _ in model.attentions for side in kind.sides)
        if "dense_mlps" in self.targets and model.num_dense_layers:
            sides.append(model.dense_width)
        if "shared_experts" in self.targets and model.shared_width:
            sides.append(model.shared_width)
        if self.experts.num_experts_selected:
            sides.append(model.expert_width)
        return min(sides)

    def lowest_layer(self, model: ModelConfig) -> int | None:
        """The first decoder layer with an update; None if there is none."""
        reached = {layer for layer, ids in self.experts.experts.items() if ids}
        if "attention" in self.targets:
            reached |= {0}
        if "dense_mlps" in self.targets:
            reached |= set(range(model.num_layers)) - set(model.moe_layers)
        if "shared_experts" in self.targets and model.shared_width:
            reached |= {model.moe_layers[0]}
        return min(reached, default=None)


# What a run trains: selected experts, low-rank updates, or (None) every parameter.
Trained = ExpertConfig | LoRA | None
