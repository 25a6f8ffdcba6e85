"""Where each tensor of a Hugging Face checkpoint lives among our stacked parameters.

Hugging Face stores one matrix `[out, in]` per projection, layer and expert; we store `[in, out]`,
gate and up side by side, with layers and experts stacked in front. This table is the only place
that knows both.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from esft_jax.hf.blocks import Box, assign_transposed
from esft_jax.model.config import ModelConfig

LeafPath = tuple[str, ...]

# What the paths of routed experts begin with.
EXPERTS: LeafPath = ("moe_blocks", "moe", "experts")


@dataclass(frozen=True)
class Placement:
    """The place of one Hugging Face tensor.

    Attributes:
        path: the parameter, as a path in the state of `Transformer`.
        index: leading indices into it: none, `(layer,)` or `(layer, expert)`; layers count within
            their stack.
        columns: the slice of its last axis, or None for all of it.
        transposed: whether the parameter holds the transpose.
        shape: the tensor's shape in the Hugging Face checkpoint.
    """

    path: LeafPath
    index: tuple[int, ...]
    columns: tuple[int, int] | None
    transposed: bool
    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor as the parameter holds it."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def box(self) -> Box:
        """The block of the parameter that holds the tensor."""
        matrix = [slice(0, size) for size in self.stored_shape]
        if self.columns is not None:
            matrix[-1] = slice(*self.columns)
        return (*(slice(i, i + 1) for i in self.index), *matrix)

    def to_block(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor as the block that its box selects."""
        stored = _transposed(tensor) if self.transposed else tensor
        return stored.reshape((1,) * len(self.index) + stored.shape)

    def from_block(self, block: np.ndarray) -> np.ndarray:
        """The tensor, from the block that its box selects."""
        stored = block.reshape(self.stored_shape)
        return _transposed(stored) if self.transposed else stored


def _transposed(matrix: np.ndarray) -> np.ndarray:
    found = np.empty(matrix.shape[::-1], matrix.dtype)
    assign_transposed(found, matrix)
    return found


class FusedSlice(NamedTuple):
    """One expert's matrix inside a fused tensor: `tensor[expert, begin:end]`."""

    name: str
    expert: int
    begin: int
    end: int


def tensor_placements(config: ModelConfig) -> dict[str, Placement]:
    """Every tensor of the model under its Hugging Face name, experts one by one.

    A tied head has no tensor of its own.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    table = {
        "model.embed_tokens.weight": Placement(("embedding",), (), None, False, vocabulary),
        "model.norm.weight": Placement(("norm", "scale"), (), None, False, vocabulary[1:]),
    }
    if not config.tie_embeddings:
        table["lm_head.weight"] = Placement(("head",), (), None, True, vocabulary)
    for layer in range(config.num_layers):
        table |= _layer(config, layer)
    return table


def expert_names(layer: int, expert: int) -> tuple[str, str, str]:
    """Names of an expert's gate, up and down matrices; `layer` is a decoder layer index."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    return f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"


def fused_shapes(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """Tensors `[E, out, in]` that transformers 5 fuses all experts of a layer into."""
    experts, size, width = config.router.num_experts, config.hidden_size, config.expert_width
    shapes: dict[str, tuple[int, int, int]] = {}
    for layer in config.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        shapes[f"{prefix}.gate_up_proj"] = (experts, 2 * width, size)
        shapes[f"{prefix}.down_proj"] = (experts, size, width)
    return shapes


def fused_slices(config: ModelConfig) -> dict[str, FusedSlice]:
    """Where each expert matrix, by its own name, lies in the fused form."""
    size, width = config.hidden_size, config.expert_width
    found = {}
    for layer in config.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        for expert in range(config.router.num_experts):
            gate, up, down = expert_names(layer, expert)
            found[gate] = FusedSlice(f"{prefix}.gate_up_proj", expert, 0, width)
            found[up] = FusedSlice(f"{prefix}.gate_up_proj", expert, width, 2 * width)
            found[down] = FusedSlice(f"{prefix}.down_proj", expert, 0, size)
    return found


def _layer(config: ModelConfig, layer: int) -> dict[str, Placement]:
    dense = layer < config.first_dense_layers
    stack = "dense_blocks" if dense else "moe_blocks"
    row = layer if dense else layer - config.first_dense_layers
    size, prefix = config.hidden_size, f"model.layers.{layer}"
    table: dict[str, Placement] = {}

    def norm(name: str, path: LeafPath, width: int) -> None:
        table[f"{prefix}.{name}.weight"] = Placement(
            (stack, *path, "scale"), (row,), None, False, (width,)
        )

    def linear(name: str, path: LeafPath, shape: tuple[int, int]) -> None:
        table[f"{prefix}.{name}.weight"] = Placement((stack, *path), (row,), None, True, shape)

    def mlp(name: str, path: LeafPath, width: int, expert: tuple[int, ...] = ()) -> None:
        shapes = {"gate": (width, size), "up": (width, size), "down": (size, width)}
        columns = {"gate": (0, width), "up": (width, 2 * width), "down": None}
        for kind, shape in shapes.items():
            leaf = "down" if kind == "down" else "gate_up"
            table[f"{prefix}.{name}.{kind}_proj.weight"] = Placement(
                (stack, *path, leaf), (row, *expert), columns[kind], True, shape
            )

    norm("input_layernorm", ("attention_norm",), size)
    norm("post_attention_layernorm", ("ffn_norm",), size)
    heads, query = config.num_heads, config.num_heads * config.qk_head_dim
    if config.q_lora_rank is None:
        linear("self_attn.q_proj", ("attention", "q"), (query, size))
    else:
        linear("self_attn.q_a_proj", ("attention", "q_down"), (config.q_lora_rank, size))
        norm("self_attn.q_a_layernorm", ("attention", "q_norm"), config.q_lora_rank)
        linear("self_attn.q_b_proj", ("attention", "q_up"), (query, config.q_lora_rank))
    latent, key_value = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    linear(
        "self_attn.kv_a_proj_with_mqa",
        ("attention", "kv_down"),
        (latent + config.qk_rope_head_dim, size),
    )
    norm("self_attn.kv_a_layernorm", ("attention", "kv_norm"), latent)
    linear("self_attn.kv_b_proj", ("attention", "kv_up"), (heads * key_value, latent))
    linear("self_attn.o_proj", ("attention", "out"), (size, heads * config.v_head_dim))
    if dense:
        mlp("mlp", ("mlp",), config.dense_width)
        return table
    linear("mlp.gate", ("moe", "router", "weight"), (config.router.num_experts, size))
    for expert in range(config.router.num_experts):
        mlp(f"mlp.experts.{expert}", ("moe", "experts"), config.expert_width, (expert,))
    if config.num_shared_experts:
        width = config.num_shared_experts * config.expert_width
        mlp("mlp.shared_experts", ("moe", "shared_experts"), width)
    return table
