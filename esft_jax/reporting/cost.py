"""What it costs to train a choice of experts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import trains
from esft_jax.adapt.parts import Part
from esft_jax.families import tensor_table
from esft_jax.model.config import ModelConfig
from esft_jax.model.transformer import Transformer
from esft_jax.training.operations import model_operations

ADAPTER_BYTES = 2  # of a parameter: bfloat16
STATE_BYTES = 16  # a float32 master, its gradient, and two moments of AdamW


@dataclass(frozen=True)
class Cost:
    """Of training and keeping a choice of routed experts.

    Attributes:
        parameters: trained.
        operations: floating-point operations per trained token.
    """

    parameters: int
    operations: float

    @property
    def adapter_bytes(self) -> int:
        """Size of the adapter in bfloat16."""
        return self.parameters * ADAPTER_BYTES

    @property
    def state_bytes(self) -> int:
        """Masters, gradients and moments in training, over all devices."""
        return self.parameters * STATE_BYTES


class CostModel:
    """Costs by arithmetic from a model's `config.json`; no weights are read."""

    def __init__(self, config: ModelConfig, length: int):
        self.config = config
        self.length = length
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        parameters = sum(int(np.prod(leaf.shape)) for leaf in leaves)
        self.full = Cost(parameters, model_operations(config, None, length))

    def of(
        self,
        chosen: Bool[np.ndarray, "L E"],
        token: Float[np.ndarray, "L E"],
        also: Iterable[Part] = (),
    ) -> Cost:
        """Of the routed experts in a mask, which serve what their token scores say, and of what is
        trained besides.
        """
        layers = self.config.moe_layers
        experts = ExpertConfig(
            {
                layer: tuple(np.flatnonzero(row).tolist())
                for layer, row in zip(layers, chosen, strict=True)
            },
            tuple(also),
        )
        served = dict(zip(layers, (token * chosen).sum(axis=1).tolist(), strict=True))
        besides = sum(
            math.prod(place.shape)
            for place in tensor_table(self.config).places.values()
            if trains(experts, place.role)
        )
        operations = model_operations(self.config, experts, self.length, served)
        return Cost(int(chosen.sum()) * self.config.expert_size + besides, operations)
