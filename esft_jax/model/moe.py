"""The Mixture-of-Experts feed-forward layer: router, routed experts, shared experts.

Letters: B rows, S tokens of each, K experts per token, D model width, E experts, F expert width,
L MoE layers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from esft_jax.model.config import ModelConfig
from esft_jax.model.mlp import MLP
from esft_jax.model.norm import RMSNorm
from esft_jax.model.params import ParamFactory, Role
from esft_jax.model.router import Router, RouterOutput
from esft_jax.moe.carry import Carried
from esft_jax.moe.layer import Routing, adapted_moe
from esft_jax.moe.transport import Transport
from esft_jax.moe.weights import Adapted, ExpertWeights


class RoutedExperts(nnx.Module):
    """The base experts of a layer: `gate_up [E, D, 2F]` (gate first), `down [E, F, D]`, and their
    biases, `gate_up_bias [E, 2F]` and `down_bias [E, D]`, if they have some.

    In a scan over layers they are those of all layers, `[L, E, ...]`, or a `LearnedStack`.
    """

    def __init__(self, config: ModelConfig, params: ParamFactory):
        experts, size, width = config.router.num_experts, config.hidden_size, config.expert_width
        axes, role = ("experts", None, None), Role.ROUTED_EXPERT
        self.gate_up = params.weight((experts, size, 2 * width), axes, role)
        self.down = params.weight((experts, width, size), axes, role)
        if config.expert_bias:
            self.gate_up_bias = params.bias(2 * width, role, experts)
            self.down_bias = params.bias(size, role, experts)

    @property
    def params(self) -> ExpertWeights:
        """The parameters."""
        return ExpertWeights.held_by(self)

    @property
    def weights(self) -> ExpertWeights:
        """Their values."""
        return self.params.map(lambda param: param.get_value())


class MoE(nnx.Module):
    """Router, routed experts and shared experts."""

    def __init__(self, config: ModelConfig, params: ParamFactory):
        self.router = Router(config.hidden_size, config.router, params, config.norm_eps)
        self.experts = RoutedExperts(config, params)
        size, width = config.hidden_size, config.shared_width
        self.activation = config.activation
        self.shared_experts = (
            MLP(size, width, params, Role.SHARED_EXPERT, self.activation) if width else None
        )
        if config.shared_gate:
            self.shared_gate = params.weight((size, 1), ("embed", None), Role.SHARED_EXPERT)
        self.gated, self.normed = config.shared_gate, config.expert_norms
        if self.normed:
            self.input_norm = RMSNorm(size, config.norm, params)
            self.output_norm = RMSNorm(size, config.norm, params)
            self.shared_norm = RMSNorm(size, config.norm, params)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        plain: Float[Array, "B S D"],
        keep: Bool[Array, "B S"],
        layer: Int[Array, ""],
        adapted: Adapted | None,
        carried: Carried | None,
        mesh: Mesh | None,
        transport: Transport = "all_gather",
        gate_probe: Float[Array, "B S K"] | None = None,
        output_norms: bool = False,
        adapter_ids: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B S D"], RouterOutput, Carried | None]:
        """Apply the layer; tokens not in `keep` meet no routed expert.

        Args:
            x: the layer's input under its norm.
            plain: without it.
            layer: this layer's index among the MoE layers, to find its experts.
            adapted: what replaces or updates experts.
            carried: of it, from layer to layer (`carry_banks`).
            gate_probe: the factor of each assignment is multiplied by 1 + its entry. At 0, the
                derivative by an entry is the gate times the derivative by the gate.
            output_norms: whether `RouterOutput` gets them.
            adapter_ids: of each row, if `adapted` is several adapters.
        """
        shape, seen = x.shape, plain if self.router.config.input_norm else x
        routed = self.router(seen.reshape(-1, shape[-1]), keep.reshape(-1), mesh)
        routed = jax.tree.map(lambda a: a.reshape(*shape[:2], -1), routed)
        factors = self.router.factors(routed, x.dtype)
        if gate_probe is not None:
            factors *= 1 + gate_probe
        expert_ids = routed.expert_ids
        if adapted is not None and adapter_ids is not None:
            expert_ids = adapted.layout.of_adapters(expert_ids, adapter_ids)
        routing = Routing(expert_ids, factors)
        experts, inner = self.experts.weights, self.input_norm(plain) if self.normed else x

        def apply(routing: Routing, carried: Carried | None) -> tuple[Array, Carried | None]:
            return adapted_moe(
                inner, routing, experts, self.activation, layer, adapted, carried, mesh, transport
            )

        if output_norms:
            out, norms, carried = _one_by_one(apply, routing, inner, carried)
            routed = routed._replace(output_norms=norms)
        else:
            out, carried = apply(routing, carried)
        if self.normed:
            out = self.output_norm(out)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.gated:
                shared *= jax.nn.sigmoid(x @ self.shared_gate[...].astype(x.dtype))
            out = out + (self.shared_norm(shared) if self.normed else shared)
        return out, routed, carried


def _one_by_one(
    apply: Callable[[Routing, Carried | None], tuple[Array, Carried | None]],
    routing: Routing,
    x: Float[Array, "B S D"],
    carried: Carried | None,
) -> tuple[Float[Array, "B S D"], Float[Array, "B S K"], Carried | None]:
    """The sum over a token's experts, the norm of each term, and what is carried on.

    Layers with one expert per token, one after the other: their outputs are the terms, whatever the
    transport, and no array has K outputs of each token.
    """

    def add(before: tuple, assigned: Routing) -> tuple[tuple, Array]:
        total, carried = before
        out, carried = apply(assigned, carried)
        out = out.astype(jnp.float32)
        return (total + out, carried), jnp.linalg.norm(jax.lax.stop_gradient(out), axis=-1)

    each = jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0)[..., None], routing)
    begin = jnp.zeros(x.shape, jnp.float32), carried
    (total, carried), norms = jax.lax.scan(add, begin, each)
    return total.astype(x.dtype), jnp.moveaxis(norms, 0, -1), carried
