"""Model shape as data, read from and written to a Hugging Face `config.json`.

The router is described by its mathematics (score function, group limit, renormalisation, scale),
never by a model's name, so that another family is a new reader here and nothing else.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from esft_jax.errors import InputError
from esft_jax.files import read_json

GroupLimit = Literal["none", "max"]


@dataclass(frozen=True)
class RouterConfig:
    """How a token chooses its experts.

    Attributes:
        num_experts: routed experts per layer (E).
        top_k: experts per token (K).
        group_limit: `none`, or `max`: only the `top_groups` groups with the largest single score
            may be chosen from (DeepSeek-V2 `group_limited_greedy`).
        num_groups: groups that the experts are split into, in order.
        top_groups: groups a token may choose from.
        renormalise: divide the chosen gates by their sum.
        scale: factor on the gates. The published DeepSeek-V2 code does not apply it when it
            renormalises; `from_hugging_face` resolves that, so here it always applies.
    """

    num_experts: int
    top_k: int
    group_limit: GroupLimit = "none"
    num_groups: int = 1
    top_groups: int = 1
    renormalise: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, with YaRN when `factor` is set (arXiv 2309.00071).

    Attributes:
        theta: base of the frequencies.
        factor: YaRN context extension; None for plain RoPE.
        original_context: context length before the extension, in tokens.
        beta_fast, beta_slow: rotations that bound the interpolation ramp.
        mscale, mscale_all_dim: YaRN's attention temperature coefficients; 0 means not given.
    """

    theta: float = 10000.0
    factor: float | None = None
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @staticmethod
    def _magnitude(factor: float, coefficient: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0

    @property
    def rotation_scale(self) -> float:
        """Factor on cos and sin."""
        if self.factor is None:
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.factor, self.mscale) / self._magnitude(
                self.factor, self.mscale_all_dim
            )
        return self._magnitude(self.factor, 1.0)

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention logits, at every length."""
        if self.factor is None or not self.mscale_all_dim:
            return 1.0
        return self._magnitude(self.factor, self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a DeepSeek-V2 style model. Widths are in features, lengths in tokens."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    first_dense_layers: int
    dense_width: int
    expert_width: int
    num_shared_experts: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_positions: int
    rms_norm_eps: float
    tie_embeddings: bool
    router: RouterConfig
    rope: RopeConfig
    init_std: float = 0.02

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layer indices that hold routed experts."""
        return tuple(range(self.first_dense_layers, self.num_layers))

    @property
    def qk_head_dim(self) -> int:
        """Features per query and key head: the part without and the part with RoPE."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """Factor on query-key products before the softmax."""
        return self.qk_head_dim**-0.5 * self.rope.softmax_scale

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what a model of given weights computes.

        Both spellings of a `config.json` give the same. Limits and initialisation do not count.
        """
        content = dataclasses.asdict(self)
        for key in ("max_positions", "init_std"):
            del content[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json` of a Hugging Face folder."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise InputError(f"{path}: not found; expected a Hugging Face model folder")
        raw = read_json(path)
        if not isinstance(raw, dict):
            raise InputError(f"{path}: expected a JSON object")
        try:
            return cls.from_hugging_face(raw)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def from_hugging_face(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Translate the parsed `config.json` of a `deepseek_v2` model.

        Both spellings of RoPE are read: `rope_parameters` (transformers 5) and `rope_theta` with
        `rope_scaling` (the published code).

        Raises:
            InputError: a missing key, or a value this implementation does not support.
        """
        _require(raw, "model_type", "deepseek_v2")
        for key, supported in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
            ("moe_layer_freq", 1),
            ("scoring_func", "softmax"),
            ("quantization_config", None),
        ):
            _require({key: supported, **raw}, key, supported)
        renormalise = _flag(raw, "norm_topk_prob")
        top_k = _integer(raw, "num_experts_per_tok")
        config = cls(
            vocab_size=_integer(raw, "vocab_size"),
            hidden_size=_integer(raw, "hidden_size"),
            num_layers=_integer(raw, "num_hidden_layers"),
            first_dense_layers=_integer(raw, "first_k_dense_replace", 0, least=0),
            dense_width=_integer(raw, "intermediate_size"),
            expert_width=_integer(raw, "moe_intermediate_size"),
            num_shared_experts=0
            if raw.get("n_shared_experts") is None
            else _integer(raw, "n_shared_experts", least=0),
            num_heads=_integer(raw, "num_attention_heads"),
            q_lora_rank=None if raw.get("q_lora_rank") is None else _integer(raw, "q_lora_rank"),
            kv_lora_rank=_integer(raw, "kv_lora_rank"),
            qk_nope_head_dim=_integer(raw, "qk_nope_head_dim"),
            qk_rope_head_dim=_integer(raw, "qk_rope_head_dim"),
            v_head_dim=_integer(raw, "v_head_dim"),
            max_positions=_integer(raw, "max_position_embeddings"),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            tie_embeddings=_flag(raw, "tie_word_embeddings"),
            router=RouterConfig(
                num_experts=_integer(raw, "n_routed_experts"),
                top_k=top_k,
                renormalise=renormalise and top_k > 1,
                # The published code multiplies by the factor only when it does not renormalise.
                scale=1.0
                if renormalise and top_k > 1
                else _number(raw, "routed_scaling_factor", 1.0),
                **_group_limit(raw),
            ),
            rope=_read_rope(raw),
            init_std=_number(raw, "initializer_range", 0.02),
        )
        config._check()
        return config

    def _check(self) -> None:
        router = self.router
        if not 0 <= self.first_dense_layers < self.num_layers:
            raise InputError(
                f"first_k_dense_replace: {self.first_dense_layers} leaves no MoE layer "
                f"among num_hidden_layers = {self.num_layers}"
            )
        if router.num_experts % router.num_groups:
            raise InputError(
                f"n_group: {router.num_groups} does not divide n_routed_experts = "
                f"{router.num_experts}"
            )
        reachable = router.top_groups * (router.num_experts // router.num_groups)
        if router.top_groups > router.num_groups or router.top_k > reachable:
            raise InputError(
                f"num_experts_per_tok: {router.top_k} of {reachable} reachable experts "
                f"(topk_group = {router.top_groups} of n_group = {router.num_groups})"
            )
        if self.qk_rope_head_dim % 2:
            raise InputError(f"qk_rope_head_dim: {self.qk_rope_head_dim} is odd; RoPE needs pairs")


def _require(raw: dict[str, Any], key: str, supported: Any) -> None:
    if raw.get(key) != supported:
        raise InputError(f"{key}: {raw.get(key)!r} is not supported; expected {supported!r}")


def _integer(raw: dict[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    value: Any = raw.get(key, default)
    if type(value) is not int or value < least:
        raise InputError(f"{key}: {value!r}; expected an integer from {least}")
    return value


def _number(raw: dict[str, Any], key: str, default: float | None = None, above: float = 0) -> float:
    value: Any = raw.get(key, default)
    if type(value) not in (int, float) or not above < value < math.inf:
        raise InputError(f"{key}: {value!r}; expected a number above {above:g}")
    return float(value)


def _flag(raw: dict[str, Any], key: str) -> bool:
    """Null stands for false."""
    value: Any = raw.get(key)
    if not isinstance(value, bool | None):
        raise InputError(f"{key}: {value!r}; expected true or false")
    return bool(value)


def _group_limit(raw: dict[str, Any]) -> dict[str, Any]:
    method = raw.get("topk_method") or "greedy"
    if method == "greedy":
        return {}
    if method == "group_limited_greedy":
        return {
            "group_limit": "max",
            "num_groups": _integer(raw, "n_group"),
            "top_groups": _integer(raw, "topk_group"),
        }
    raise InputError(f"topk_method: {method!r}; expected 'greedy' or 'group_limited_greedy'")


def _read_rope(raw: dict[str, Any]) -> RopeConfig:
    found = [_rope_of(raw, name) for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    if len(found) > 1 and found[0] != found[1]:
        raise InputError(
            "rope_scaling: says something else than rope_parameters; expected one of them, or both "
            "alike"
        )
    return found[0] if found else _rope_of(raw, "rope_scaling")


def _rope_of(raw: dict[str, Any], name: str) -> RopeConfig:
    """What one of the spellings says, with `rope_theta` inside or beside it."""
    parameters = raw.get(name) or {}
    if not isinstance(parameters, dict):
        raise InputError(f"{name}: {parameters!r}; expected an object")
    given = raw | parameters
    if given.get("partial_rotary_factor") is not None:
        _require(given, "partial_rotary_factor", 1.0)
    for key, other in (("rope_theta", raw), ("rope_type", {"rope_type": parameters.get("type")})):
        inside, beside = parameters.get(key), other.get(key)
        if inside is not None and beside is not None and inside != beside:
            raise InputError(f"{name}.{key}: {inside!r} and {beside!r}; expected one value")
    theta = _number(given, "rope_theta", 10000.0, above=1)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        raise InputError(f"{name}.rope_type: {kind!r}; expected 'default' or 'yarn'")
    try:
        return _read_yarn(parameters, theta)
    except InputError as error:
        raise InputError(f"{name}.{error}") from None


def _read_yarn(parameters: dict[str, Any], theta: float) -> RopeConfig:
    def optional(key: str, default: float) -> float:
        """Null and 0 stand for the default."""
        return _number(parameters, key) if parameters.get(key) else default

    rope = RopeConfig(
        theta=theta,
        factor=_number(parameters, "factor"),
        original_context=_integer(parameters, "original_max_position_embeddings"),
        beta_fast=optional("beta_fast", 32.0),
        beta_slow=optional("beta_slow", 1.0),
        mscale=optional("mscale", 0.0),
        mscale_all_dim=optional("mscale_all_dim", 0.0),
    )
    # `transformers` lets these change the rotation.
    _require({"truncate": True, **parameters}, "truncate", True)
    if parameters.get("attention_factor") is not None:
        _require(parameters, "attention_factor", rope.rotation_scale)
    return rope
