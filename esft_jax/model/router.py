"""The router: which experts a token meets, and with which weight."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.struct import dataclass
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from esft_jax.mesh import RULES
from esft_jax.model.config import RouterConfig
from esft_jax.model.params import ParamFactory


@dataclass
class RouterOutput:
    """What the router decided, for every token.

    The model's output stacks the MoE layers on a leading axis. Tokens that are masked out carry
    the phantom expert id E and gate 0.

    Attributes:
        expert_ids: chosen experts, int32 `[..., K]`, best first.
        gates: their weights, float32 `[..., K]`.
        probs: scores over all experts before top-k, float32 `[..., E]`.
    """

    expert_ids: Int[Array, "... K"]
    gates: Float[Array, "... K"]
    probs: Float[Array, "... E"]


def choose(
    scores: Float[Array, "T E"], config: RouterConfig
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Exact top-k of float32 scores under the group limit; ties go to the lower expert id."""
    allowed = scores
    if config.group_limit == "max":
        groups = scores.reshape(-1, config.num_groups, config.num_experts // config.num_groups)
        _, best = jax.lax.top_k(groups.max(axis=-1), config.top_groups)
        open_groups = jax.nn.one_hot(best, config.num_groups, dtype=bool).any(axis=1)
        allowed = jnp.where(open_groups[:, :, None], groups, 0.0).reshape(scores.shape)
    gates, ids = jax.lax.top_k(allowed, config.top_k)
    if config.renormalise:
        gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
    return ids, gates * config.scale


class Router(nnx.Module):
    """Softmax over experts, top-k after it (DeepSeek-V2). Scores are always float32: lower
    precision flips experts.
    """

    def __init__(self, size: int, config: RouterConfig, params: ParamFactory):
        self.weight = params.weight((size, config.num_experts), ("embed", None))
        self.config = config

    def __call__(
        self, x: Float[Array, "T D"], keep: Bool[Array, " T"], mesh: Mesh | None = None
    ) -> RouterOutput:
        """Route tokens; those not in `keep` go to the phantom expert with gate 0."""
        # A trained weight is rounded here as all others are, and as it will be saved. Not by two
        # casts: compilers may leave them out.
        kind = jnp.finfo(x.dtype)
        weight = self.weight[...].astype(jnp.float32)
        weight = jax.lax.reduce_precision(weight, kind.nexp, kind.nmant)
        logits = jnp.matmul(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
        probs = jax.nn.softmax(logits, axis=-1)
        select = partial(choose, config=self.config)
        if mesh is not None and mesh.size > 1:
            # Left alone, the compiler gathers the scores of all devices for a top-k.
            batch = PartitionSpec(RULES.batch)
            select = jax.shard_map(
                select, mesh=mesh, in_specs=batch, out_specs=(batch, batch), check_vma=False
            )
        ids, gates = select(probs)
        return RouterOutput(
            expert_ids=jnp.where(keep[:, None], ids, self.config.num_experts),
            gates=jnp.where(keep[:, None], gates, 0.0),
            probs=jnp.where(keep[:, None], probs, 0.0),
        )
