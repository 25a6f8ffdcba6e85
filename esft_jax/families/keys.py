"""Reading keys of a `config.json`, and what many families say in the same words."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from esft_jax.errors import InputError
from esft_jax.model.config import (
    GroupedAttentionConfig,
    LatentAttentionConfig,
    RopeConfig,
    RouterConfig,
    SecondAttention,
    YarnConfig,
)

Raw = Mapping[str, Any]

# What `rope_parameters` and `rope_scaling` may say.
_ROPE_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "attention_factor",
}


def text_part(raw: Raw) -> Raw:
    """The keys of the language model in a `config.json` that describes other parts, too.

    Raises:
        InputError: there are none.
    """
    part = raw.get("text_config")
    if not isinstance(part, dict):
        raise InputError(f"text_config: {part!r}; expected an object")
    return part


def require(raw: Raw, key: str, *supported: Any) -> None:
    """Refuse a key whose value is none of the supported ones; the first stands for an absent key.

    Raises:
        InputError: naming the key.
    """
    value = raw.get(key, supported[0])
    if not any(type(value) is type(known) and value == known for known in supported):
        expected = " or ".join(repr(known) for known in supported)
        raise InputError(f"{key}: {value!r} is not supported; expected {expected}")


def integer(
    raw: Raw, key: str, default: int | None = None, *, least: int = 1, also: str | None = None
) -> int:
    """An integer; `default` stands for an absent key, and without one the key is needed.

    Args:
        also: another name of the key: transformers 5 renames some.

    Raises:
        InputError: naming the key; or both names are there, and differ.
    """
    value = raw.get(key, default)
    if also is not None and raw.get(also) is not None:
        value = raw.get(key, raw[also])
        if value != raw[also]:
            raise InputError(f"{key}: {value!r}, and {also}: {raw[also]!r}; they mean one thing")
    if type(value) is not int or value < least:
        raise InputError(f"{key}: {value!r}; expected an integer from {least}")
    return value


def number(raw: Raw, key: str, default: float | None = None, above: float = 0) -> float:
    """A finite number above a bound; see `integer`."""
    value = raw.get(key, default)
    if type(value) not in (int, float) or not above < value < math.inf:
        raise InputError(f"{key}: {value!r}; expected a number above {above:g}")
    return float(value)


def flag(raw: Raw, key: str, default: bool) -> bool:
    """True or false; null is false. See `integer`."""
    value = raw.get(key, default)
    value = False if value is None else value
    if type(value) is not bool:
        raise InputError(f"{key}: {value!r}; expected true or false")
    return value


def _optional_integer(raw: Raw, key: str, default: int | None) -> int | None:
    """See `integer`; null is None."""
    return None if raw.get(key, default) is None else integer(raw, key, default)


def read_rope(
    raw: Raw,
    head: int,
    pairing: Literal["interleaved", "half"],
    *,
    theta: float = 10000.0,
    rotated_share: float | None = None,
    proportional: bool = False,
) -> RopeConfig:
    """RoPE in both spellings: `rope_parameters` (transformers 5), or `rope_theta` and
    `rope_scaling`.

    Args:
        head: features of a head.
        theta: of an absent key.
        rotated_share: share of a head that turns, where the key is absent; None: the family turns
            all of it, and no other share is supported.
        proportional: the family knows this type: pairs go over the whole head, and only the first
            ones turn.

    Raises:
        InputError: naming the key.
    """

    def spelled(name: str) -> RopeConfig:
        parameters = raw.get(name) or {}
        if not isinstance(parameters, dict):
            raise InputError(f"{name}: {parameters!r}; expected an object")
        if proportional and parameters.get("rope_type") == "proportional":
            return _proportional_rope(parameters, name, head, pairing, theta)
        return _rope_of(raw, name, head, pairing, theta, rotated_share)

    found = [spelled(name) for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    if len(found) > 1 and found[0] != found[1]:
        raise InputError(
            "rope_scaling: says something else than rope_parameters; expected one of them, or both "
            "alike"
        )
    return found[0] if found else spelled("rope_scaling")


def _rope_of(
    raw: Raw,
    name: str,
    head: int,
    pairing: Literal["interleaved", "half"],
    theta: float,
    rotated_share: float | None,
) -> RopeConfig:
    """What one of the spellings says, with `rope_theta` inside or beside it."""
    parameters = raw.get(name) or {}
    given = {**raw, **parameters}
    beside_it = {**raw, "rope_type": parameters.get("type")}
    for key in ("rope_theta", "rope_type", "original_max_position_embeddings"):
        inside, beside = parameters.get(key), beside_it.get(key)
        if inside is not None and beside is not None and inside != beside:
            raise InputError(f"{name}.{key}: {inside!r} and {beside!r}; expected one value")
    share = rotated_share or 1.0
    if given.get("partial_rotary_factor") is not None:
        share = number(given, "partial_rotary_factor")
    if share > 1 or (rotated_share is None and share != 1):
        raise InputError(f"partial_rotary_factor: {share:g} is not supported; expected 1.0")
    rotated = int(head * share)
    if rotated % 2 or not rotated:
        raise InputError(
            f"partial_rotary_factor: {share:g} turns {rotated} features of a head of {head}; "
            "expected pairs"
        )
    base = number(given, "rope_theta", theta, above=1)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "yarn", "deepseek_yarn"):
        raise InputError(f"{name}.rope_type: {kind!r}; expected 'default' or 'yarn'")
    try:
        for key in sorted(parameters.keys() - _ROPE_KEYS):
            require(parameters, key, None)
        yarn = None if kind == "default" else _read_yarn(parameters, raw)
    except InputError as error:
        raise InputError(f"{name}.{error}") from None
    return RopeConfig(base, rotated, pairing, yarn)


def _proportional_rope(
    parameters: Raw, name: str, head: int, pairing: Literal["interleaved", "half"], theta: float
) -> RopeConfig:
    """Pairs of the whole head, of which the first ones turn."""
    try:
        known = {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}
        for key in sorted(parameters.keys() - known):
            require(parameters, key, None)
        require(parameters, "factor", None, 1, 1.0)
        share = number(parameters, "partial_rotary_factor", 1.0)
        base = number(parameters, "rope_theta", theta, above=1)
    except InputError as error:
        raise InputError(f"{name}.{error}") from None
    turning = int(share * head // 2)
    if share > 1 or head % 2 or not turning:
        raise InputError(
            f"{name}.partial_rotary_factor: {share:g} of a head of {head}; expected a pair at "
            "least, and all of it at most"
        )
    return RopeConfig(base, head, pairing, turning=None if turning == head // 2 else turning)


def _read_yarn(parameters: Raw, raw: Raw) -> YarnConfig:
    def optional(key: str, default: float) -> float:
        """Null and 0 stand for the default."""
        return number(parameters, key) if parameters.get(key) else default

    attention_factor = parameters.get("attention_factor")
    return YarnConfig(
        factor=number(parameters, "factor"),
        original_context=integer(
            {**raw, **parameters},
            "original_max_position_embeddings",
            raw.get("max_position_embeddings"),
        ),
        beta_fast=optional("beta_fast", 32.0),
        beta_slow=optional("beta_slow", 1.0),
        mscale=optional("mscale", 0.0),
        mscale_all_dim=optional("mscale_all_dim", 0.0),
        truncate=flag(parameters, "truncate", True),
        attention_factor=None
        if attention_factor is None
        else number(parameters, "attention_factor"),
    )


def read_latent_attention(
    raw: Raw, query_rank: int | None
) -> tuple[LatentAttentionConfig, RopeConfig]:
    """MLA as the DeepSeek families spell it.

    Args:
        query_rank: of an absent key; null means that queries come from the input.

    Raises:
        InputError: naming the key.
    """
    plain, rotated = integer(raw, "qk_nope_head_dim"), integer(raw, "qk_rope_head_dim")
    interleaved = flag(raw, "rope_interleave", True)
    rope = read_rope(raw, rotated, "interleaved" if interleaved else "half")
    attention = LatentAttentionConfig(
        heads=integer(raw, "num_attention_heads"),
        query_rank=_optional_integer(raw, "q_lora_rank", query_rank),
        latent=integer(raw, "kv_lora_rank"),
        plain=plain,
        rotated=rotated,
        value=integer(raw, "v_head_dim"),
        bias=flag(raw, "attention_bias", False),
        scale=(plain + rotated) ** -0.5 * (1.0 if rope.yarn is None else rope.yarn.softmax_scale),
    )
    return attention, rope


def read_biased_router(
    raw: Raw, *, groups: tuple[int, int] = (1, 1), renormalise: bool = True, scale: float = 1.0
) -> RouterConfig:
    """DeepSeek-V3's `noaux_tc`: sigmoid scores, a selection bias, groups by their two best.

    Args:
        groups: of absent keys: `n_group` and `topk_group`.
        renormalise, scale: of absent keys.

    Raises:
        InputError: naming the key.
    """
    require(raw, "scoring_func", "sigmoid")
    require(raw, "topk_method", "noaux_tc")
    experts = integer(raw, "n_routed_experts", also="num_local_experts")
    num_groups = integer(raw, "n_group", groups[0])
    top_groups = integer(raw, "topk_group", groups[1])
    if num_groups > 1 and experts // num_groups < 2:
        raise InputError(f"n_group: {num_groups} groups of {experts} experts; expected pairs")
    return RouterConfig(
        num_experts=experts,
        top_k=integer(raw, "num_experts_per_tok"),
        score="sigmoid",
        selection_bias=True,
        group_limit="top2_sum" if num_groups > 1 else "none",
        num_groups=num_groups,
        top_groups=top_groups,
        renormalise=flag(raw, "norm_topk_prob", renormalise),
        scale=number(raw, "routed_scaling_factor", scale),
    )


def read_grouped_attention(
    raw: Raw,
    *,
    bias: tuple[bool, bool],
    key_heads: int | None = None,
    norm: Literal["none", "head", "whole"] = "none",
    norm_first: bool = True,
    head: int | None = None,
    scale: float | None = None,
    clip: float | None = None,
) -> GroupedAttentionConfig:
    """GQA in the usual keys.

    Args:
        bias: of queries, keys and values; of the projection back.
        key_heads: heads of keys and values, where the key is absent; None: as many as of queries,
            which null means, too.
        norm, norm_first, clip: see `GroupedAttentionConfig`.
        head: features of a head, where the key is absent; None: an even share.
        scale: of scores before the softmax; None: one over the root of `head`.

    Raises:
        InputError: naming the key.
    """
    heads = integer(raw, "num_attention_heads")
    key_heads = _optional_integer(raw, "num_key_value_heads", key_heads) or heads
    if heads % key_heads:
        raise InputError(
            f"num_key_value_heads: {key_heads} does not divide num_attention_heads = {heads}"
        )
    if raw.get("head_dim") is not None:
        head = integer(raw, "head_dim")
    elif head is None:
        head = integer(raw, "hidden_size") // heads
    return GroupedAttentionConfig(
        heads=heads,
        key_heads=key_heads,
        head=head,
        input_bias=bias[0],
        output_bias=bias[1],
        norm=norm,
        norm_first=norm_first,
        clip=clip,
        scale=head**-0.5 if scale is None else scale,
    )


def sparse_layers(raw: Raw, layers: int) -> tuple[int, ...]:
    """Indices of the MoE layers as Qwen spells it: each `decoder_sparse_step`-th one.

    Raises:
        InputError: naming the key.
    """
    step, dense = integer(raw, "decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise InputError(f"mlp_only_layers: {dense!r}; expected a list of layer indices")
    found = tuple(n for n in range(layers) if (n + 1) % step == 0 and n not in set(dense))
    if not found:
        raise InputError(
            f"mlp_only_layers, decoder_sparse_step = {step}: leave no MoE layer among "
            f"num_hidden_layers = {layers}"
        )
    return found


def layers_of(kinds: Any, layers: int, kind: str, *others: str) -> tuple[int, ...]:
    """Indices of the layers of a kind.

    Args:
        kinds: what `layer_types` says.
        others: what it may say of the other layers.

    Raises:
        InputError: naming the key.
    """
    known = (kind, *others)
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise InputError(
            f"layer_types: {kinds!r}; expected {' or '.join(map(repr, known))} for each of "
            f"num_hidden_layers = {layers}"
        )
    return tuple(layer for layer, its in enumerate(kinds) if its == kind)


def windowed_layers(raw: Raw, layers: int, default: Iterable[int]) -> tuple[int, ...]:
    """Indices of the layers with a window, by `layer_types`.

    Args:
        default: these, where the key is absent or null.

    Raises:
        InputError: naming the key.
    """
    kinds = raw.get("layer_types")
    if kinds is None:
        return tuple(default)
    return layers_of(kinds, layers, "sliding_attention", "full_attention")


def read_windows(
    raw: Raw,
    attention: GroupedAttentionConfig,
    layers: int,
    windowed: tuple[int, ...],
    window: int = 4096,
) -> tuple[GroupedAttentionConfig, SecondAttention | None]:
    """Attention without windows, if a layer has it; and with windows of `sliding_window` tokens.

    Args:
        attention: of the layers without windows.
        windowed: indices of those with windows.
        window: their size, where the key is absent.

    Raises:
        InputError: naming the key.
    """
    if not windowed:
        return attention, None
    local = dataclasses.replace(attention, window=integer(raw, "sliding_window", window))
    if len(windowed) == layers:
        return local, None
    return attention, SecondAttention(windowed, local)


def extra_layers(raw: Raw, layers: int, default: int) -> tuple[str, ...]:
    """What the tensors of layers for multi-token prediction begin with; fine-tuning leaves them.

    Args:
        default: number of them where the key is absent.
    """
    count = integer(raw, "num_nextn_predict_layers", default, least=0, also="num_mtp_layers")
    return tuple(f"model.layers.{layers + extra}." for extra in range(count))


def dense_first(raw: Raw, layers: int, default: int) -> tuple[int, ...]:
    """Indices of the MoE layers: all but the lowest `first_k_dense_replace`.

    Raises:
        InputError: naming the key.
    """
    require(raw, "moe_layer_freq", 1)
    first = integer(raw, "first_k_dense_replace", default, least=0)
    if first >= layers:
        raise InputError(
            f"first_k_dense_replace: {first} leaves no MoE layer among num_hidden_layers = {layers}"
        )
    return tuple(range(first, layers))
