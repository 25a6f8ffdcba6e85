"""DeepSeek-V2 and V2-Lite: MLA, softmax routing, shared experts."""

from dataclasses import replace

from esft_jax.errors import InputError
from esft_jax.families.keys import (
    Raw,
    dense_first,
    flag,
    integer,
    number,
    read_latent_attention,
    require,
)
from esft_jax.families.tensors import Table
from esft_jax.model.config import ModelConfig, RopeConfig, RouterConfig


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    require(raw, "attention_bias", False)
    require(raw, "mlp_bias", False)
    require(raw, "scoring_func", "softmax")
    layers, width = integer(raw, "num_hidden_layers"), integer(raw, "moe_intermediate_size")
    shared = 0
    if raw.get("n_shared_experts", 2) is not None:  # null: none
        shared = integer(raw, "n_shared_experts", 2, least=0)
    attention, rope = read_latent_attention({**raw, "rope_interleave": True}, 1536)
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=integer(raw, "hidden_size"),
        num_layers=layers,
        moe_layers=dense_first(raw, layers, 0),
        dense_width=integer(raw, "intermediate_size"),
        expert_width=width,
        shared_width=shared * width,
        shared_gate=False,
        attention=attention,
        rope=_published(rope),
        router=_read_router(raw),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings"),
        init_std=number(raw, "initializer_range", 0.02),
    )


def _read_router(raw: Raw) -> RouterConfig:
    top_k = integer(raw, "num_experts_per_tok")
    renormalise = flag(raw, "norm_topk_prob", False) and top_k > 1
    method = raw.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise InputError(f"topk_method: {method!r}; expected 'greedy' or 'group_limited_greedy'")
    limited = method == "group_limited_greedy"
    scale = number(raw, "routed_scaling_factor", 1.0)
    return RouterConfig(
        num_experts=integer(raw, "n_routed_experts", also="num_experts"),
        top_k=top_k,
        group_limit="max" if limited else "none",
        num_groups=integer(raw, "n_group") if limited else 1,
        top_groups=integer(raw, "topk_group") if limited else 1,
        renormalise=renormalise,
        # The published code multiplies by the factor only when it does not renormalise.
        scale=1.0 if renormalise else scale,
    )


def _published(rope: RopeConfig) -> RopeConfig:
    """RoPE without what the published code does not know; `transformers` applies it."""
    if rope.yarn is None:
        return rope
    if not rope.yarn.truncate:
        raise InputError("rope_parameters.truncate: False is not supported; expected True")
    plain = replace(rope.yarn, attention_factor=None)
    if rope.yarn.rotation_scale != plain.rotation_scale:
        raise InputError(
            f"rope_parameters.attention_factor: {rope.yarn.attention_factor} is not supported; "
            f"expected {plain.rotation_scale}"
        )
    return replace(rope, yarn=plain)


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table = Table(config)
    for layer in table.layers():
        layer.latent_attention()
        layer.norms()
        layer.feed_forward(shared="mlp.shared_experts")
    return table
