"""What a model computes, as data: switches, never a model's name.

`esft_jax.families` reads these from the `config.json` of each family.

Letters: D hidden size, E experts, K experts per token.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, NamedTuple

from esft_jax.ops.activation import SWIGLU, Activation

GroupLimit = Literal["none", "max", "top2_sum"]


@dataclass(frozen=True)
class RouterConfig:
    """How a token chooses its experts.

    Attributes:
        num_experts: routed experts per layer (E).
        top_k: experts per token (K).
        score: what turns logits into scores over all experts. Softmax over the chosen logits alone
            is `softmax` with `renormalise`.
        logit_bias: a trained constant per expert is added to the logits.
        input_norm: it reads what comes into the layer, under a norm of its own without a weight,
            times a trained scale per feature, over the root of the hidden size.
        expert_scale: gates are multiplied by a trained constant per expert after all else; it is
            gain of the experts, and part of no score.
        selection_bias: a constant per expert is added to the scores for the choice, not to gates.
        group_limit: `none`; or only the `top_groups` best groups may be chosen from: those with the
            largest single score (`max`, DeepSeek-V2), or with the largest sum of two (`top2_sum`,
            DeepSeek-V3).
        num_groups: groups that the experts are split into, in order.
        top_groups: groups a token may choose from.
        renormalise: divide the chosen gates by their sum, or by `least_sum` if that is larger.
        least_sum: see `renormalise`.
        scale: factor on the gates, always applied.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    logit_bias: bool = False
    input_norm: bool = False
    expert_scale: bool = False
    selection_bias: bool = False
    group_limit: GroupLimit = "none"
    num_groups: int = 1
    top_groups: int = 1
    renormalise: bool = False
    least_sum: float = 1e-20
    scale: float = 1.0


@dataclass(frozen=True)
class YarnConfig:
    """YaRN's extension of the context (arXiv 2309.00071).

    Attributes:
        factor: new context over the original one.
        original_context: context length before the extension, in tokens.
        beta_fast, beta_slow: rotations that bound the interpolation ramp.
        mscale, mscale_all_dim: attention temperature coefficients; 0 means not given.
        truncate: round the bounds of the ramp to whole pairs.
        attention_factor: factor on cos and sin; None: from the coefficients.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    attention_factor: float | None = None

    def _magnitude(self, coefficient: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * coefficient * math.log(self.factor) + 1.0

    @property
    def rotation_scale(self) -> float:
        """Factor on cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention logits, at every length, of models that apply it."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864).

    Attributes:
        theta: base of the frequencies.
        rotated: features of a head that are paired: the first ones, where it has more.
        turning: pairs that turn: the first ones; None: all.
        pairing: which features turn together: `interleaved` (2i, 2i + 1), or `half` (i and
            i + rotated / 2).
        yarn: extension of the context, if any.
    """

    theta: float
    rotated: int
    pairing: Literal["interleaved", "half"]
    yarn: YarnConfig | None = None
    turning: int | None = None

    @property
    def rotation_scale(self) -> float:
        """Factor on cos and sin."""
        return 1.0 if self.yarn is None else self.yarn.rotation_scale


class NormConfig(NamedTuple):
    """An RMS norm.

    Attributes:
        eps: added to the mean square.
        offset: the scale is 1 + the weight.
    """

    eps: float
    offset: bool = False


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (MLA, arXiv 2405.04434).

    Attributes:
        heads: of queries, keys and values.
        query_rank: width of the queries' latent; None: queries come from the input.
        latent: width of the latent of keys and values.
        plain: features per query and key head without RoPE.
        rotated: those with RoPE, which all key heads share.
        value: features per value head.
        bias: of the projections from and to the hidden size (not of `q` itself).
        scale: factor on query-key products before the softmax.
    """

    heads: int
    query_rank: int | None
    latent: int
    plain: int
    rotated: int
    value: int
    bias: bool
    scale: float

    @property
    def head(self) -> int:
        """Features per query and key head."""
        return self.plain + self.rotated

    @property
    def sides(self) -> tuple[int, ...]:
        """Widths of its projections, but for the hidden size."""
        ranks = self.latent, self.query_rank or self.latent
        return *ranks, self.heads * self.head, self.heads * self.value


@dataclass(frozen=True)
class GroupedAttentionConfig:
    """Grouped-query attention (GQA, arXiv 2305.13245); with as many key as query heads, MHA.

    Attributes:
        heads: of queries.
        key_heads: of keys and values; divides `heads`.
        head: features of every head.
        input_bias: of the projections to queries, keys and values.
        output_bias: of the one back.
        norm: RMS norm of queries and keys: of each head, or of the whole projection.
        norm_first: the norm comes before RoPE.
        clip: bound on queries, keys and values, after the norm.
        scale: factor on query-key products before the softmax.
        window: how many tokens a query sees, its own and those right before it; None: all.
        sinks: each head has a logit that joins the denominator of its softmaxes.
        output_gate: a sigmoid of the token multiplies what comes out of the softmax, each feature
            its own; the projection to queries makes its logits, too: behind the query of each head.
        shared_values: values are the projection to keys, before its norm and RoPE.
        value_norm: RMS norm of values, of each head, without a scale.
    """

    heads: int
    key_heads: int
    head: int
    input_bias: bool
    output_bias: bool
    norm: Literal["none", "head", "whole"]
    norm_first: bool
    clip: float | None
    scale: float
    window: int | None = None
    sinks: bool = False
    output_gate: bool = False
    shared_values: bool = False
    value_norm: bool = False

    @property
    def query_width(self) -> int:
        """Width of the projection to queries, and to their gates."""
        return self.heads * self.head * (2 if self.output_gate else 1)

    @property
    def value(self) -> int:
        """Features per value head."""
        return self.head

    @property
    def sides(self) -> tuple[int, ...]:
        """Widths of its projections, but for the hidden size."""
        return self.heads * self.head, self.key_heads * self.head


@dataclass(frozen=True)
class DeltaAttentionConfig:
    """Attention by the gated delta rule (arXiv 2412.06464).

    Attributes:
        key_heads: heads of queries and keys.
        heads: of values; a multiple of `key_heads`.
        key: features of every query and key head.
        value: of every value head.
        taps: tokens that the convolution before it sees, a token's own included.
        by_key_head: the projections lie in two matrices, each ordered by key head, then by what is
            projected to; else in four, each ordered by what is projected to, then by head.
    """

    key_heads: int
    heads: int
    key: int
    value: int
    taps: int
    by_key_head: bool

    @property
    def mixed(self) -> int:
        """Width of queries, keys and values of all heads together."""
        return 2 * self.key_heads * self.key + self.heads * self.value

    @property
    def sides(self) -> tuple[int, ...]:
        """Widths of its projections, but for the hidden size, and for the few numbers of beta and
        steps: a low-rank update may have a higher rank than these.
        """
        return self.mixed, self.heads * self.value


AttentionConfig = LatentAttentionConfig | GroupedAttentionConfig | DeltaAttentionConfig


@dataclass(frozen=True)
class SecondAttention:
    """Attention of another kind than most, in some of the layers.

    Attributes:
        layers: decoder layer indices of these.
        attention: its shape.
        rope: its rotation; None: as in the other layers.
    """

    layers: tuple[int, ...]
    attention: AttentionConfig
    rope: RopeConfig | None = None


@dataclass(frozen=True)
class Multipliers:
    """Constant factors of models that are scaled so (muP): on embedding, residual, logits."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


class LayerRun(NamedTuple):
    """Consecutive decoder layers of one stack.

    Attributes:
        moe: they hold routed experts.
        start, stop: their indices among the layers of their stack.
        first: index of the lowest among all layers.
    """

    moe: bool
    start: int
    stop: int
    first: int

    @property
    def size(self) -> int:
        """Number of layers."""
        return self.stop - self.start

    def split(self, index: int) -> tuple["LayerRun", "LayerRun"]:
        """The layers below an index among those of their stack, and the others."""
        middle = min(max(index, self.start), self.stop)
        above = self._replace(start=middle, first=self.first + middle - self.start)
        return self._replace(stop=middle), above


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Widths are in features, lengths in tokens.

    Attributes:
        family: key in `esft_jax.families` of who knows the tensors' names; no model reads it.
        attention, rope: of all layers, but for those of `second`.
        second: another kind of attention in some layers, if there is one.
        moe_layers: decoder layer indices that hold routed experts; the others are dense.
        dense_width: of the feed-forward part of dense layers.
        expert_width: of a routed expert.
        expert_bias: both products of a routed expert have biases.
        activation: of all feed-forward layers.
        shared_width: of the shared experts together; 0: none.
        shared_gate: the shared experts' output is multiplied by a sigmoid of the token.
        norm_offset: norms multiply by 1 + their weight.
        output_norms: what attention and the feed-forward part add has a norm, too.
        expert_norms: so has what routed and shared experts give, each of its own, and the input of
            the routed ones has one beside that of the shared ones.
        layer_scale: a layer's output is multiplied by a constant of its own.
        logit_cap: see `ops.cross_entropy.soft_cap`.
        tie_embeddings: the head is the embedding.
        max_positions: the longest row the model is made for.
        carried: what the names of tensors begin with that the model does not use, and that exports
            keep.
        fp8_block: rows and columns of the weights on disk that share a scale, where some are in
            fp8; None: none are. No model computes in fp8.
        mxfp4: some weights on disk are in MXFP4. No model computes in it.
        init_std: standard deviation of newly initialised weights.
        prefix: what the names of all tensors but the head's begin with.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    moe_layers: tuple[int, ...]
    dense_width: int
    expert_width: int
    shared_width: int
    shared_gate: bool
    attention: AttentionConfig
    rope: RopeConfig
    router: RouterConfig
    norm_eps: float
    tie_embeddings: bool
    max_positions: int
    expert_bias: bool = False
    activation: Activation = SWIGLU
    multipliers: Multipliers = Multipliers()
    carried: tuple[str, ...] = ()
    fp8_block: tuple[int, int] | None = None
    mxfp4: bool = False
    init_std: float = 0.02
    family: str = ""
    prefix: str = "model."
    second: SecondAttention | None = None
    norm_offset: bool = False
    output_norms: bool = False
    expert_norms: bool = False
    layer_scale: bool = False
    logit_cap: float | None = None

    @property
    def norm(self) -> NormConfig:
        """Of all norms that have no constants of their own."""
        return NormConfig(self.norm_eps, self.norm_offset)

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what a model of given weights computes.

        All spellings of a `config.json` give the same. Limits, initialisation and switches at
        their defaults do not count.
        """
        content = _said(self)
        left = "max_positions", "init_std", "carried", "fp8_block", "mxfp4", "family", "prefix"
        for key in left:
            content.pop(key, None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def quantised(self) -> str | None:
        """What some weights on disk are in, if anything that no model computes in."""
        if self.fp8_block is not None:
            return "fp8"
        return "MXFP4" if self.mxfp4 else None

    @property
    def expert_size(self) -> int:
        """Parameters of a routed expert."""
        size, width = self.hidden_size, self.expert_width
        return 3 * size * width + (2 * width + size) * self.expert_bias

    @property
    def num_dense_layers(self) -> int:
        """Decoder layers without routed experts."""
        return self.num_layers - len(self.moe_layers)

    @cached_property
    def runs(self) -> tuple[LayerRun, ...]:
        """The decoder, from the lowest layer up, as runs of layers of one stack."""
        moe, found, counts = set(self.moe_layers), [], {True: 0, False: 0}
        for kind, layers in groupby(range(self.num_layers), key=lambda layer: layer in moe):
            members = list(layers)
            start = counts[kind]
            counts[kind] += len(members)
            found.append(LayerRun(kind, start, counts[kind], members[0]))
        return tuple(found)

    def place(self, layer: int) -> tuple[bool, int]:
        """Whether a decoder layer holds routed experts, and its index among those that do as it."""
        moe = layer in self.moe_layers
        return moe, sum((other in self.moe_layers) == moe for other in range(layer))

    @cached_property
    def attentions(self) -> tuple[tuple[AttentionConfig, RopeConfig], ...]:
        """Each kind of attention that there is, and its rotation."""
        kinds = ((self.attention, self.rope),)
        if self.second is None:
            return kinds
        return *kinds, (self.second.attention, self.second.rope or self.rope)

    def kind(self, layer: int) -> int:
        """Of the attention of a decoder layer: its index in `attentions`."""
        return int(self.second is not None and layer in self.second.layers)

    def kinds(self, moe: bool) -> tuple[int, ...]:
        """Of the attention of each layer of a stack."""
        layers = range(self.num_layers)
        return tuple(self.kind(n) for n in layers if (n in self.moe_layers) == moe)


def _said(config: Any) -> dict[str, Any]:
    """Fields of a dataclass, and of those in it, that are not at their defaults."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            found[field.name] = _said(value) if dataclasses.is_dataclass(value) else value
    return found
