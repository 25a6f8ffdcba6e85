"""The router: which experts a token meets, and with which weight.

Letters: T tokens, D model width, E experts, K experts per token.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from esft_jax.model.config import RouterConfig
from esft_jax.model.norm import normalise
from esft_jax.model.params import ParamFactory, Role
from esft_jax.sharding import RULES


class RouterOutput(NamedTuple):
    """What the router decided, for every token.

    The model's output stacks the MoE layers on a leading axis. Tokens that are masked out carry
    the phantom expert id E and gate 0.

    Attributes:
        expert_ids: chosen experts, int32 `[..., K]`, best first.
        gates: their weights, float32 `[..., K]`.
        scores: over all experts before the choice, without its bias, float32 `[..., E]`.
        output_norms: Euclidean norms of what the chosen experts add to the layer's sum, factors
            included, float32 `[..., K]`; None unless they are asked for.
    """

    expert_ids: Int[Array, "... K"]
    gates: Float[Array, "... K"]
    scores: Float[Array, "... E"]
    output_norms: Float[Array, "... K"] | None = None


def choose(
    scores: Float[Array, "T E"], bias: Float[Array, " E"] | None, config: RouterConfig
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Exact top-k of float32 scores under the group limit; ties go to the lower expert id.

    Args:
        bias: added to the scores for the choice only; gates are made of the scores.
    """
    ranked = scores if bias is None else scores + bias
    if config.group_limit != "none":
        groups = ranked.reshape(-1, config.num_groups, config.num_experts // config.num_groups)
        strongest = 1 if config.group_limit == "max" else 2
        strength = jax.lax.top_k(groups, strongest)[0].sum(axis=-1)
        _, best = jax.lax.top_k(strength, config.top_groups)
        open_groups = jax.nn.one_hot(best, config.num_groups, dtype=bool).any(axis=1)
        # Not 0: a biased score may be negative.
        ranked = jnp.where(open_groups[:, :, None], groups, -jnp.inf).reshape(scores.shape)
    gates, ids = jax.lax.top_k(ranked, config.top_k)
    if bias is not None:
        gates = jnp.take_along_axis(scores, ids, axis=-1)
    if config.renormalise:
        total = gates.sum(axis=-1, keepdims=True)
        gates = gates / jnp.maximum(total, config.least_sum)
    return ids, gates * config.scale


def _rounded(param: nnx.Param, dtype: jnp.dtype) -> Float[Array, "..."]:
    """A parameter, in float32, rounded as all others are, and as it will be saved."""
    kind = jnp.finfo(dtype)
    # Not by two casts: compilers may leave them out.
    return jax.lax.reduce_precision(param[...].astype(jnp.float32), kind.nexp, kind.nmant)


class Router(nnx.Module):
    """Scores over all experts, top-k after them. Scores are always float32: lower precision flips
    experts.
    """

    def __init__(self, size: int, config: RouterConfig, params: ParamFactory, norm_eps: float):
        self.weight = params.weight((size, config.num_experts), ("embed", None), Role.ROUTER)
        if config.selection_bias:
            self.selection_bias = params.bias(config.num_experts, Role.SELECTION_BIAS)
        if config.logit_bias:
            self.logit_bias = params.bias(config.num_experts, Role.ROUTER)
        if config.input_norm:
            self.input_scale = params.scale(size, Role.ROUTER)
        if config.expert_scale:
            self.expert_scale = params.scale(config.num_experts, Role.ROUTER)
        self.config, self.norm_eps = config, norm_eps

    def __call__(
        self, x: Float[Array, "T D"], keep: Bool[Array, " T"], mesh: Mesh | None = None
    ) -> RouterOutput:
        """Route tokens; those not in `keep` go to the phantom expert with gate 0."""
        rounded, wide = partial(_rounded, dtype=x.dtype), x.astype(jnp.float32)
        if self.config.input_norm:
            scale = rounded(self.input_scale) * x.shape[-1] ** -0.5
            wide = normalise(x, self.norm_eps) * scale
        logits = jnp.matmul(wide, rounded(self.weight), precision=jax.lax.Precision.HIGHEST)
        if self.config.logit_bias:
            logits += rounded(self.logit_bias)
        score = jax.nn.softmax if self.config.score == "softmax" else jax.nn.sigmoid
        scores = score(logits)
        bias = self.selection_bias[...] if self.config.selection_bias else None
        select = partial(choose, config=self.config)
        if mesh is not None and mesh.size > 1:
            # Left alone, the compiler gathers the scores of all devices for a top-k.
            batch = PartitionSpec(RULES.batch)
            select = jax.shard_map(
                select,
                mesh=mesh,
                in_specs=(batch, PartitionSpec()),
                out_specs=(batch, batch),
                check_vma=False,
            )
        ids, gates = select(scores, bias)
        return RouterOutput(
            expert_ids=jnp.where(keep[:, None], ids, self.config.num_experts),
            gates=jnp.where(keep[:, None], gates, 0.0),
            scores=jnp.where(keep[:, None], scores, 0.0),
        )

    def factors(self, routed: RouterOutput, dtype: jnp.dtype) -> Float[Array, "... K"]:
        """What the outputs of chosen experts are multiplied by: gates, and the experts' scales."""
        if not self.config.expert_scale:
            return routed.gates
        scale = _rounded(self.expert_scale, dtype)
        return routed.gates * scale.at[routed.expert_ids].get(mode="fill", fill_value=0)
