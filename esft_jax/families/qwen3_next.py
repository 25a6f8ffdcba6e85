"""Qwen3-Next: the gated delta rule in most layers, gated GQA in others, a shared expert."""

from dataclasses import replace

from esft_jax.errors import InputError
from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    layers_of,
    number,
    read_grouped_attention,
    read_rope,
    require,
    sparse_layers,
)
from esft_jax.families.tensors import PER_EXPERT, ExpertNames, Table
from esft_jax.model.config import (
    AttentionConfig,
    DeltaAttentionConfig,
    ModelConfig,
    RouterConfig,
    SecondAttention,
)

_KINDS = "linear_attention", "full_attention"


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    layers = integer(raw, "num_hidden_layers", 48)
    router = RouterConfig(
        num_experts=integer(raw, "num_experts", 512, also="num_local_experts"),
        top_k=integer(raw, "num_experts_per_tok", 10),
        renormalise=flag(raw, "norm_topk_prob", True),
    )
    dense = integer(raw, "intermediate_size", 5632)
    return read_decoder(raw, layers, sparse_layers(raw, layers), dense, router, by_key_head=True)


def read_decoder(
    raw: Raw,
    layers: int,
    moe_layers: tuple[int, ...],
    dense_width: int,
    router: RouterConfig,
    *,
    by_key_head: bool,
) -> ModelConfig:
    """What Qwen3-Next and its successors have in common.

    Args:
        by_key_head: how the projections of linear attention lie (`DeltaAttentionConfig`).

    Raises:
        InputError: naming the key.
    """
    require(raw, "hidden_act", "silu")
    require(raw, "use_sliding_window", False, None)
    require(raw, "attn_output_gate", True, None)
    require(raw, "output_gate_type", "swish", "silu", None)
    bias = flag(raw, "attention_bias", False)
    full = read_grouped_attention(raw, bias=(bias, bias), key_heads=2, norm="head", head=256)
    attention, second = _by_layer(
        raw, layers, _read_delta_attention(raw, by_key_head), replace(full, output_gate=True)
    )
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=integer(raw, "hidden_size"),
        num_layers=layers,
        moe_layers=moe_layers,
        dense_width=dense_width,
        expert_width=integer(raw, "moe_intermediate_size", 512),
        shared_width=integer(raw, "shared_expert_intermediate_size", 512),
        shared_gate=True,
        attention=attention,
        rope=read_rope(raw, full.head, "half", rotated_share=0.25),
        router=router,
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 32768),
        carried=("mtp.",),
        init_std=number(raw, "initializer_range", 0.02),
        second=second,
        norm_offset=True,
    )


def _read_delta_attention(raw: Raw, by_key_head: bool) -> DeltaAttentionConfig:
    key_heads = integer(raw, "linear_num_key_heads", 16)
    heads = integer(raw, "linear_num_value_heads", 32)
    if heads % key_heads:
        raise InputError(
            f"linear_num_value_heads: {heads} is no multiple of linear_num_key_heads = {key_heads}"
        )
    return DeltaAttentionConfig(
        key_heads=key_heads,
        heads=heads,
        key=integer(raw, "linear_key_head_dim", 128),
        value=integer(raw, "linear_value_head_dim", 128),
        taps=integer(raw, "linear_conv_kernel_dim", 4),
        by_key_head=by_key_head,
    )


def _by_layer(
    raw: Raw, layers: int, delta: AttentionConfig, full: AttentionConfig
) -> tuple[AttentionConfig, SecondAttention | None]:
    """The attention of most layers, and that of the others."""
    kinds = raw.get("layer_types")
    if kinds is None:
        step = integer(raw, "full_attention_interval", 4)
        kinds = [_KINDS[(layer + 1) % step == 0] for layer in range(layers)]
    in_full = layers_of(kinds, layers, *reversed(_KINDS))
    if len(in_full) == layers:
        return full, None
    return delta, SecondAttention(in_full, full) if in_full else None


def names(config: ModelConfig, experts: ExpertNames = PER_EXPERT) -> Table:
    """See `esft_jax.families`."""
    table = Table(config, experts)
    for layer in table.layers():
        if isinstance(config.attentions[layer.kind][0], DeltaAttentionConfig):
            layer.delta_attention()
        else:
            layer.grouped_attention()
        layer.norms()
        layer.feed_forward(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
    return table
