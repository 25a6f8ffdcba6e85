"""Where each tensor of a Hugging Face checkpoint lies among our stacked parameters.

Hugging Face stores one matrix `[out, in]` per projection, layer and expert; we store `[in, out]`,
gate and up side by side, with layers and experts stacked in front. A family fills a `Table`, the
only place that knows both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from esft_jax.blocks import Box, assign_transposed
from esft_jax.model.config import (
    DeltaAttentionConfig,
    GroupedAttentionConfig,
    LatentAttentionConfig,
    ModelConfig,
)
from esft_jax.model.params import Role
from esft_jax.model.scan import ATTENTIONS

LeafPath = tuple[str, ...]


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
        role: of the parameter.
        wide: the parameter is float32, whatever others are, and exports keep the tensor's type.
    """

    path: LeafPath
    index: tuple[int, ...]
    columns: tuple[int, int] | None
    transposed: bool
    shape: tuple[int, ...]
    role: Role
    wide: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is one, with more than one output: what low-rank updates are for."""
        return len(self.shape) == 2 and self.shape[0] > 1

    @property
    def _squeezed(self) -> bool:
        """Whether the parameter lacks the last axis but one, of size 1: that of a single row, or of
        the inputs of a convolution of each feature.
        """
        return len(self.shape) == 3 or (self.shape[:-1] == (1,) and not self.transposed)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor as the parameter holds it."""
        shape = (*self.shape[:-2], self.shape[-1]) if self._squeezed else self.shape
        return shape[::-1] if self.transposed else shape

    @property
    def box(self) -> Box:
        """The block of the parameter that holds the tensor."""
        matrix = [slice(0, size) for size in self.stored_shape]
        if self.columns is not None:
            matrix[-1] = slice(*self.columns)
        return (*(slice(i, i + 1) for i in self.index), *matrix)

    def to_block(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor as the block that its box selects."""
        tensor = tensor[..., 0, :] if self._squeezed else tensor
        stored = _transposed(tensor) if self.transposed else tensor
        return stored.reshape((1,) * len(self.index) + self.stored_shape)

    def from_block(self, block: np.ndarray) -> np.ndarray:
        """The tensor, from the block that its box selects."""
        stored = block.reshape(self.stored_shape)
        return (_transposed(stored) if self.transposed else stored).reshape(self.shape)

    def copy_part(self, read: Callable[[Box], np.ndarray], part: Box, target: np.ndarray) -> None:
        """Copy a part of the block, without its leading indices.

        Args:
            read: a part of the tensor.
        """
        index = part[::-1] if self.transposed else part
        if self._squeezed:
            found = read((*index[:-1], slice(0, 1), index[-1]))[..., 0, :]
        else:
            found = read(index)
        if self.transposed:
            assign_transposed(target, found)
        else:
            target[...] = found


def _transposed(matrix: np.ndarray) -> np.ndarray:
    found = np.empty(matrix.shape[::-1], matrix.dtype)
    assign_transposed(found, matrix)
    return found


class FusedSlice(NamedTuple):
    """One expert's matrix `[out, in]`, or bias `[out]`, inside a fused tensor.

    Attributes:
        name: of the fused tensor, `[E, out, in]` or `[E, out]`, with outputs of gate and up.
        expert: index on its first axis.
        outputs: indices of its outputs.
        transposed: the fused tensor is `[E, in, out]`.
    """

    name: str
    expert: int
    outputs: range
    transposed: bool

    def box(self, part: Box) -> Box:
        """What a part of the matrix or bias is of the fused tensor."""
        outputs, *inputs = self.outputs[part[0]], *part[1:]
        chosen = slice(outputs.start, outputs.stop, outputs.step)
        expert = slice(self.expert, self.expert + 1)
        return (expert, *inputs, chosen) if self.transposed else (expert, chosen, *inputs)

    def view(self, found: np.ndarray) -> np.ndarray:
        """What `box` selects, as a part of the matrix or bias."""
        return found[0].T if self.transposed else found[0]

    def write(self, fused: np.ndarray, tensor: np.ndarray) -> None:
        """Put the matrix or bias into the fused tensor."""
        target = fused[self.box(tuple(slice(0, size) for size in tensor.shape))][0]
        if self.transposed:
            assign_transposed(target, tensor)
        else:
            target[...] = tensor


class ExpertNames(NamedTuple):
    """How a family names its routed experts, within a layer.

    Attributes:
        prefix: what the names of experts begin with.
        gate, up, down: of the matrices of one expert.
        fused: names of `gate_up` and `down` of all experts of a layer, as they may be stored too.
        fused_biases: of their biases.
        transposed: the fused matrices are `[E, in, out]`, not `[E, out, in]`.
        interleaved: outputs of gate and up take turns in the fused tensors; else gate comes first.
        stored_fused: the family's files have the fused tensors, and no others; else either.
        known_to_peft: `peft` finds experts by these names in what transformers makes of the model.
    """

    prefix: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: tuple[str, str] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    fused_biases: tuple[str, str] = (
        "mlp.experts.gate_up_proj_bias",
        "mlp.experts.down_proj_bias",
    )
    transposed: bool = False
    interleaved: bool = False
    stored_fused: bool = False
    known_to_peft: bool = True


# The names that most families have.
PER_EXPERT = ExpertNames()


@dataclass
class Table:
    """All tensors of a family's checkpoint.

    Attributes:
        config: the model's shape.
        experts: how routed experts are named.
        places: every tensor, experts one by one, by its Hugging Face name.
        fused: where each matrix and bias of an expert, by its own name, lies in the fused form.
        fused_shapes: the fused tensors.
    """

    config: ModelConfig
    experts: ExpertNames = PER_EXPERT
    places: dict[str, Placement] = field(default_factory=dict)
    fused: dict[str, FusedSlice] = field(default_factory=dict)
    fused_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Place what is in no layer. A tied head has no tensor of its own."""
        config = self.config
        vocabulary = (config.vocab_size, config.hidden_size)
        self.add(self.embedding, ("embedding",), vocabulary, Role.EMBEDDING)
        self.add(f"{config.prefix}norm.weight", ("norm", "scale"), vocabulary[1:], Role.NORM)
        if not config.tie_embeddings:
            self.add("lm_head.weight", ("head",), vocabulary, Role.HEAD, transposed=True)

    def add(
        self,
        name: str,
        path: LeafPath,
        shape: tuple[int, ...],
        role: Role,
        index: tuple[int, ...] = (),
        columns: tuple[int, int] | None = None,
        *,
        transposed: bool = False,
        wide: bool = False,
    ) -> None:
        """Place one tensor."""
        self.places[name] = Placement(path, index, columns, transposed, shape, role, wide)

    @property
    def embedding(self) -> str:
        """The embedding's name."""
        return f"{self.config.prefix}embed_tokens.weight"

    def layers(self) -> Iterator["Layer"]:
        """Every decoder layer, to be filled."""
        config, kinds = self.config, (self.config.kinds(False), self.config.kinds(True))
        for number in range(config.num_layers):
            moe, row = config.place(number)
            kind = config.kind(number)
            yield Layer(self, number, moe, row, kind, kinds[moe][:row].count(kind))

    @property
    def roles(self) -> frozenset[Role]:
        """Of all parameters."""
        return frozenset(place.role for place in self.places.values())

    def expert_names(self, layer: int, expert: int) -> tuple[str, ...]:
        """Names of an expert's gate, up and down matrices, and of their biases, if there are some;
        `layer` is a decoder layer index.
        """
        names = self.experts
        prefix = f"{self.config.prefix}layers.{layer}.{names.prefix}.{expert}"
        return tuple(
            f"{prefix}.{part}.{kind}"
            for kind in ("weight", "bias")[: 1 + self.config.expert_bias]
            for part in (names.gate, names.up, names.down)
        )


class Layer(NamedTuple):
    """One decoder layer of a table.

    Attributes:
        number: its decoder layer index.
        moe: whether it holds routed experts.
        row: its index among the layers of its stack.
        kind: of its attention (`ModelConfig.attentions`).
        attention_row: its index among the layers of its stack with attention of its kind.
    """

    table: Table
    number: int
    moe: bool
    row: int
    kind: int
    attention_row: int

    @property
    def name(self) -> str:
        """What the names of its tensors begin with."""
        return f"{self.table.config.prefix}layers.{self.number}"

    def _add(
        self,
        name: str,
        path: LeafPath,
        shape: tuple[int, ...],
        role: Role,
        columns: tuple[int, int] | None = None,
        expert: tuple[int, ...] = (),
        *,
        wide: bool = False,
    ) -> None:
        stack, row = "moe_blocks" if self.moe else "dense_blocks", self.row
        if path[0] == "attention":
            path, row = (ATTENTIONS[self.kind], *path[1:]), self.attention_row
        self.table.add(
            f"{self.name}.{name}",
            (stack, *path),
            shape,
            role,
            (row, *expert),
            columns,
            transposed=len(shape) > 1,
            wide=wide,
        )

    def vector(
        self, name: str, path: LeafPath, size: int, role: Role, *, wide: bool = False
    ) -> None:
        """A vector."""
        self._add(name, path, (size,), role, wide=wide)

    def norm(self, name: str, path: LeafPath, width: int, *, wide: bool = False) -> None:
        """The scale of a norm."""
        self._add(f"{name}.weight", (*path, "scale"), (width,), Role.NORM, wide=wide)

    def linear(self, name: str, path: LeafPath, shape: tuple[int, int], *, bias: bool) -> None:
        """A projection `[out, in]` of attention, and its bias."""
        self._add(f"{name}.weight", path, shape, Role.ATTENTION)
        if bias:
            *module, leaf = path
            self._add(f"{name}.bias", (*module, f"{leaf}_bias"), shape[:1], Role.ATTENTION)

    def mlp(
        self,
        name: str,
        path: LeafPath,
        width: int,
        role: Role,
        parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        expert: tuple[int, ...] = (),
        *,
        bias: bool = False,
    ) -> None:
        """Gate, up and down of a gated feed-forward layer, and their biases."""
        size, (gate, up, down) = self.table.config.hidden_size, parts
        gate_up = (*path, "gate_up")
        self._add(f"{name}.{gate}.weight", gate_up, (width, size), role, (0, width), expert)
        self._add(f"{name}.{up}.weight", gate_up, (width, size), role, (width, 2 * width), expert)
        self._add(f"{name}.{down}.weight", (*path, "down"), (size, width), role, None, expert)
        if bias:
            gate_up = (*path, "gate_up_bias")
            self._add(f"{name}.{gate}.bias", gate_up, (width,), role, (0, width), expert)
            self._add(f"{name}.{up}.bias", gate_up, (width,), role, (width, 2 * width), expert)
            self._add(f"{name}.{down}.bias", (*path, "down_bias"), (size,), role, None, expert)

    def norms(
        self, attention: str = "input_layernorm", feed_forward: str = "post_attention_layernorm"
    ) -> None:
        """The two norms in front of attention and of the feed-forward part."""
        size = self.table.config.hidden_size
        self.norm(attention, ("attention_norm",), size)
        self.norm(feed_forward, ("ffn_norm",), size)

    def latent_attention(self) -> None:
        """MLA under the names of DeepSeek."""
        config, size = self.table.config.attentions[self.kind][0], self.table.config.hidden_size
        assert isinstance(config, LatentAttentionConfig)
        query = config.heads * config.head
        if config.query_rank is None:
            self.linear("self_attn.q_proj", ("attention", "q"), (query, size), bias=False)
        else:
            rank = config.query_rank
            down = ("attention", "q_down")
            self.linear("self_attn.q_a_proj", down, (rank, size), bias=config.bias)
            self.norm("self_attn.q_a_layernorm", ("attention", "q_norm"), rank)
            self.linear("self_attn.q_b_proj", ("attention", "q_up"), (query, rank), bias=False)
        self.linear(
            "self_attn.kv_a_proj_with_mqa",
            ("attention", "kv_down"),
            (config.latent + config.rotated, size),
            bias=config.bias,
        )
        self.norm("self_attn.kv_a_layernorm", ("attention", "kv_norm"), config.latent)
        key_value = config.heads * (config.plain + config.value)
        up = ("attention", "kv_up")
        self.linear("self_attn.kv_b_proj", up, (key_value, config.latent), bias=False)
        out = (size, config.heads * config.value)
        self.linear("self_attn.o_proj", ("attention", "out"), out, bias=config.bias)

    def grouped_attention(
        self, norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    ) -> None:
        """Queries, keys, values and the way back, each a projection of its own; and sinks.

        Args:
            norms: names of the norms of queries and keys, where there are some.
        """
        config, size = self.table.config.attentions[self.kind][0], self.table.config.hidden_size
        assert isinstance(config, GroupedAttentionConfig)
        widths = {"q": config.heads, "k": config.key_heads, "v": config.key_heads}
        if config.shared_values:
            del widths["v"]
        for name, heads in widths.items():
            shape = (config.query_width if name == "q" else heads * config.head, size)
            path = ("attention", name)
            self.linear(f"self_attn.{name}_proj", path, shape, bias=config.input_bias)
        if config.sinks:
            self._add("self_attn.sinks", ("attention", "sinks"), (config.heads,), Role.ATTENTION)
        out = (size, config.heads * config.head)
        self.linear("self_attn.o_proj", ("attention", "out"), out, bias=config.output_bias)
        if config.norm != "none":
            for name, leaf in zip(norms, "qk", strict=True):
                width = config.head * (widths[leaf] if config.norm == "whole" else 1)
                self.norm(name, ("attention", f"{leaf}_norm"), width)

    def delta_attention(self) -> None:
        """The gated delta rule; its projections joined as `DeltaAttentionConfig` says."""
        config, size = self.table.config.attentions[self.kind][0], self.table.config.hidden_size
        assert isinstance(config, DeltaAttentionConfig)
        heads, values = config.heads, config.heads * config.value
        parts = {
            "in_proj_qkv": ("mixed", config.mixed),
            "in_proj_z": ("gate", values),
            "in_proj_b": ("beta", heads),
            "in_proj_a": ("step", heads),
        }
        if config.by_key_head:
            parts = {
                "in_proj_qkvz": ("mixed_gate", config.mixed + values),
                "in_proj_ba": ("beta_step", 2 * heads),
            }
        for name, (leaf, width) in parts.items():
            self.linear(f"linear_attn.{name}", ("attention", leaf), (width, size), bias=False)
        self.linear("linear_attn.out_proj", ("attention", "out"), (size, values), bias=False)
        convolution, role = ("attention", "convolution"), Role.ATTENTION
        self._add("linear_attn.conv1d.weight", convolution, (config.mixed, 1, config.taps), role)
        self.vector("linear_attn.A_log", ("attention", "log_rate"), heads, role, wide=True)
        self.vector("linear_attn.dt_bias", ("attention", "step_offset"), heads, role)
        self.norm("linear_attn.norm", ("attention", "norm"), config.value, wide=True)

    def feed_forward(
        self,
        *,
        dense: str = "mlp",
        router: str = "mlp.gate",
        selection_bias: tuple[str, tuple[int, ...]] | None = None,
        shared: str | None = None,
        shared_gate: str | None = None,
    ) -> None:
        """A dense layer; or router, routed experts and shared experts.

        Args:
            dense, router, shared, shared_gate: names of modules.
            selection_bias: the bias's name, and its shape.
        """
        config, names = self.table.config, self.table.experts
        size, experts, width = config.hidden_size, config.router.num_experts, config.expert_width
        if not self.moe:
            self.mlp(dense, ("mlp",), config.dense_width, Role.DENSE_MLP)
            return
        self._add(f"{router}.weight", ("moe", "router", "weight"), (experts, size), Role.ROUTER)
        if config.router.logit_bias:
            self._add(f"{router}.bias", ("moe", "router", "logit_bias"), (experts,), Role.ROUTER)
        if config.router.selection_bias:
            assert selection_bias is not None
            name, shape = selection_bias
            self.table.add(
                f"{self.name}.{name}",
                ("moe_blocks", "moe", "router", "selection_bias"),
                shape,
                Role.SELECTION_BIAS,
                (self.row,),
            )
        parts = names.gate, names.up, names.down
        for expert in range(experts):
            prefix = f"{names.prefix}.{expert}"
            path, role = ("moe", "experts"), Role.ROUTED_EXPERT
            self.mlp(prefix, path, width, role, parts, (expert,), bias=config.expert_bias)
        self._fuse(names)
        if config.shared_width:
            assert shared is not None
            self.mlp(shared, ("moe", "shared_experts"), config.shared_width, Role.SHARED_EXPERT)
            if config.shared_gate:
                assert shared_gate is not None
                path, role = ("moe", "shared_gate"), Role.SHARED_EXPERT
                self._add(f"{shared_gate}.weight", path, (1, size), role)

    def _fuse(self, names: ExpertNames) -> None:
        """Where the matrices and biases of this layer's experts lie in the fused tensors."""
        table, config = self.table, self.table.config
        experts, size, width = config.router.num_experts, config.hidden_size, config.expert_width
        gate, up = range(width), range(width, 2 * width)
        if names.interleaved:
            gate, up = range(0, 2 * width, 2), range(1, 2 * width, 2)
        shapes = {names.fused[0]: (2 * width, size), names.fused[1]: (size, width)}
        biases = dict(zip(names.fused_biases, ((2 * width,), (size,)), strict=True))
        # Fused tensor, outputs and transposition of each tensor that an expert has.
        parts: list[tuple[str, range, bool]] = []
        for fused in (shapes, biases)[: 1 + config.expert_bias]:
            gate_up, down = (f"{self.name}.{name}" for name in fused)
            turned = names.transposed and fused is shapes
            for name, shape in zip((gate_up, down), fused.values(), strict=True):
                table.fused_shapes[name] = (experts, *(reversed(shape) if turned else shape))
            parts += [(gate_up, gate, turned), (gate_up, up, turned), (down, range(size), turned)]
        for expert in range(experts):
            own = table.expert_names(self.number, expert)
            for tensor, (name, chosen, turned) in zip(own, parts, strict=True):
                table.fused[tensor] = FusedSlice(name, expert, chosen, turned)
