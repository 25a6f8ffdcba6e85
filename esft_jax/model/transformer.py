"""The decoder: embedding, dense blocks, MoE blocks, head.

Dense blocks are stacked on a leading `layers` axis, MoE blocks on another, and run under
`jax.lax.scan`.

Letters: B rows, S tokens of each, D model width, V vocabulary, L layers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from esft_jax.errors import InputError
from esft_jax.model.attention import Attention, Cache, Caches, empty_cache, make_attention
from esft_jax.model.config import ModelConfig
from esft_jax.model.mlp import MLP
from esft_jax.model.moe import MoE
from esft_jax.model.norm import RMSNorm
from esft_jax.model.params import ParamFactory, Role
from esft_jax.model.remat import BLOCK_INPUT, Remat
from esft_jax.model.rope import rotation
from esft_jax.model.router import RouterOutput
from esft_jax.model.scan import LayerOutput, scan_layers
from esft_jax.moe.carry import Carried, begin_gradient, carry_banks
from esft_jax.moe.transport import Transport
from esft_jax.moe.weights import Adapted
from esft_jax.ops.cross_entropy import soft_cap
from esft_jax.sharding import RULES, constrain_batch

# Which resident adapter each row of a batch has.
AdapterIds = Int[Array | np.ndarray, " B"] | Sequence[int]


class ModelOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        logits: float32 `[B, S, V]`.
        router: what each MoE layer's router decided; fields are `[L, B, S, ...]`.
    """

    logits: Float[Array, "B S V"]
    router: RouterOutput


class Block(nnx.Module):
    """Attention and feed-forward, each under a norm, with residual connections.

    All layers of a stack are one block; those with attention of one kind share the stacked
    parameters of it.
    """

    def __init__(self, config: ModelConfig, params: ParamFactory, *, moe: bool):
        def attention(kind: int) -> Attention | None:
            layers = config.kinds(moe).count(kind)
            return make_attention(config, kind, params.stacked(layers)) if layers else None

        self.attention_norm = RMSNorm(config.hidden_size, config.norm, params)
        self.attention, self.second_attention = attention(0), attention(1)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm, params)
        self.config = config
        if config.output_norms:
            self.attention_output_norm = RMSNorm(config.hidden_size, config.norm, params)
            self.ffn_output_norm = RMSNorm(config.hidden_size, config.norm, params)
        if config.layer_scale:
            self.scale = params.scale(1, Role.LAYER_SCALE)
        if moe:
            self.moe = MoE(config, params)
        else:
            self.mlp = MLP(
                config.hidden_size, config.dense_width, params, Role.DENSE_MLP, config.activation
            )

    @property
    def attentions(self) -> tuple[Attention | None, Attention | None]:
        """Of each kind; None, if no layer has it."""
        return self.attention, self.second_attention

    def add_attention(
        self, x: Float[Array, "B S D"], out: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The residual stream behind attention."""
        if self.config.output_norms:
            out = self.attention_output_norm(out)
        return x + self.config.multipliers.residual * out

    def add_feed_forward(
        self, x: Float[Array, "B S D"], out: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The layer's output."""
        if self.config.output_norms:
            out = self.ffn_output_norm(out)
        x = x + self.config.multipliers.residual * out
        return x * self.scale[...].astype(x.dtype) if self.config.layer_scale else x


class Transformer(nnx.Module):
    """A decoder language model whose feed-forward layers hold experts, all or some of them.

    Attributes:
        config: its shape.
        dtype: type of activations and matrix products; norms, router, softmax and loss are
            float32.
        mesh: devices the parameters and the batch are split over, or None for one device.
        transport: how tokens reach the devices of their experts, and come back; decoding, which has
            few tokens, always gathers them.
        remat: what the backward pass computes again.
        experts_learn: base experts are differentiated. Without it they can be too, but the
            gradient of every layer is then made as large as that of all.
        tuned_experts: the selected experts under training, or factors of experts, or the experts of
            several adapters; or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        transport: Transport = "all_gather",
    ):
        self.config, self.dtype, self.mesh = config, jnp.dtype(dtype), mesh
        self.transport = transport
        self.remat: Remat = "none"
        self.experts_learn = False
        params = ParamFactory(rngs, param_dtype or dtype, config.init_std)
        self.embedding = params.weight(
            (config.vocab_size, config.hidden_size), (None, "embed"), Role.EMBEDDING
        )
        moe_layers = len(config.moe_layers)
        self.dense_blocks = (
            Block(config, params.stacked(config.num_dense_layers), moe=False)
            if config.num_dense_layers
            else None
        )
        self.moe_blocks = Block(config, params.stacked(moe_layers), moe=True)
        self.norm = RMSNorm(config.hidden_size, config.norm, params)
        if not config.tie_embeddings:
            self.head = params.weight(
                (config.hidden_size, config.vocab_size), (None, "vocab"), Role.HEAD
            )
        self.tuned_experts: Adapted | None = nnx.data(None)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B S"],
        segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
        positions: Int[Array | np.ndarray, "B S"] | None = None,
        adapter_ids: AdapterIds | None = None,
    ) -> ModelOutput:
        """Logits and router outputs.

        Args:
            tokens: token ids.
            segment_ids: documents packed in a row, 1, 2, ...; 0 is padding. Default: one document
                per row.
            positions: position of each token in its document. Default: counted from each
                document's first token.
            adapter_ids: the resident adapter of each row, -1 for the base (`attach_adapters`).
                Default: that of `choose_adapter`. A row with the id of none gets logits that are
                NaN, where it cannot be refused since it is known at run time only.

        Raises:
            InputError: `adapter_ids` for a model without resident adapters, or ids of none.
        """
        hidden, router = self.hidden_states(tokens, segment_ids, positions, adapter_ids=adapter_ids)
        return ModelOutput(self.logits(hidden), router)

    def hidden_states(
        self,
        tokens: Int[Array | np.ndarray, "B S"],
        segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
        positions: Int[Array | np.ndarray, "B S"] | None = None,
        earlier: Any = None,
        *,
        gate_probe: Float[Array, "L B S K"] | None = None,
        output_norms: bool = False,
        adapter_ids: AdapterIds | None = None,
    ) -> tuple[Float[Array, "B S D"], RouterOutput]:
        """What the head reads, and the router outputs; no logits.

        Args:
            tokens, segment_ids, positions, adapter_ids: those of `__call__`.
            earlier: a gradient of the banks of tuned experts, a tree of arrays `[R, ...]` as they
                are; theirs here is added to it. Only for one expert group.
            gate_probe, output_norms: of all MoE layers, see `MoE`.
        """
        tokens = jnp.asarray(tokens)
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids)
        positions = _positions(segment_ids) if positions is None else jnp.asarray(positions)
        rotations = [rotation(rope, positions) for _, rope in self.config.attentions]
        keep = segment_ids > 0
        adapter_ids, known = self._adapters_of(adapter_ids, len(tokens))

        def attend(block: Block, kind: int, x: Array) -> Array:
            x = checkpoint_name(constrain_batch(x, self.mesh), BLOCK_INPUT)
            attention = block.attentions[kind]
            assert attention is not None, "a layer of this kind has it"
            out = attention(block.attention_norm(x), *rotations[kind], segment_ids, self.mesh)
            return block.add_attention(x, out)

        def dense_layer(block: Block, kind: int, x: Array, *_: Any) -> tuple:
            x = attend(block, kind, x)
            return block.add_feed_forward(x, block.mlp(block.ffn_norm(x))), LayerOutput()

        def moe_layer(
            block: Block, kind: int, carry: tuple, layer: Array, _: None, adapted: Adapted | None
        ) -> tuple:
            x, carried = carry
            x = attend(block, kind, x)
            out, router, carried = block.moe(
                block.ffn_norm(x),
                x,
                keep,
                layer,
                adapted,
                carried,
                self.mesh,
                self.transport,
                None if gate_probe is None else gate_probe[layer],
                output_norms,
                adapter_ids,
            )
            return (block.add_feed_forward(x, out), carried), LayerOutput(router)

        x, carried = self._embed(tokens, known), None
        routers: list[RouterOutput] = []
        # Layers below the lowest tuned expert run in a scan of their own that no tuned parameter
        # enters, so that the backward pass never reaches them.
        first = self.tuned_experts.layout.first_layer if self.tuned_experts else 0
        for run in self.config.runs:
            kinds = self.config.kinds(run.moe)
            if not run.moe:
                x, *_ = scan_layers(dense_layer, self.dense_blocks, kinds, x, run, remat=self.remat)
                continue
            below, above = run.split(first)
            (x, _), router, _ = scan_layers(
                partial(moe_layer, adapted=None),
                self.moe_blocks,
                kinds,
                (x, None),
                below,
                remat=self.remat,
            )
            routers += [router] if router else []
            if above.size and carried is None:
                carried = self._carried()
            (x, carried), router, _ = scan_layers(
                partial(moe_layer, adapted=self.tuned_experts),
                self.moe_blocks,
                kinds,
                (x, carried),
                above,
                remat=self.remat,
                experts_learn=self.experts_learn,
            )
            routers += [router] if router else []
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routers)
        if earlier is not None:
            x = begin_gradient(x, carried, jax.tree.map(lambda bank: bank[None], earlier))
        return self._head_input(x), stacked

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """The head, float32 out."""
        logits = jnp.einsum(
            "bsd,dv->bsv",
            hidden,
            self.head_weight().astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return constrain_batch(soft_cap(logits, self.config.logit_cap), self.mesh)

    def head_weight(self) -> Float[Array, "D V"]:
        """The head's matrix; the embedding's transpose when they are tied."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def init_cache(self, batch: int, length: int) -> Caches:
        """An empty cache of each kind of attention, for `length` tokens per row; layers lead."""
        return tuple(
            empty_cache(self.config, kind, batch, length, self.dtype)
            for kind in range(len(self.config.attentions))
        )

    def decode(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        keep: Bool[Array, "B S"],
        caches: Caches,
        adapter_ids: AdapterIds | None = None,
    ) -> tuple[Float[Array, "B S V"], Caches]:
        """Logits of new tokens after those in the caches, and the caches with them.

        Args:
            positions: slot and position of each token; later slots are not seen.
            keep: False for padding behind a row's tokens, which no expert computes.
            caches: see `init_cache`.
            adapter_ids: see `__call__`.
        """
        config = self.config
        adapter_ids, known = self._adapters_of(adapter_ids, len(tokens))
        rotations = [rotation(rope, positions) for _, rope in config.attentions]

        def attend(block: Block, kind: int, x: Array, cache: Cache) -> tuple[Array, Cache]:
            attention = block.attentions[kind]
            assert attention is not None, "a layer of this kind has it"
            out, cache = attention.decode(
                block.attention_norm(x), *rotations[kind], positions, keep, cache
            )
            return block.add_attention(x, out), cache

        def dense_layer(block: Block, kind: int, x: Array, layer: Array, cache: Cache) -> tuple:
            x, cache = attend(block, kind, x, cache)
            out = block.add_feed_forward(x, block.mlp(block.ffn_norm(x)))
            return out, LayerOutput(cache=cache)

        def moe_layer(block: Block, kind: int, carry: tuple, layer: Array, cache: Cache) -> tuple:
            x, carried = carry
            x, cache = attend(block, kind, x, cache)
            out, _, carried = block.moe(
                block.ffn_norm(x),
                x,
                keep,
                layer,
                self.tuned_experts,
                carried,
                self.mesh,
                adapter_ids=adapter_ids,
            )
            return (block.add_feed_forward(x, out), carried), LayerOutput(cache=cache)

        x, carried = self._embed(tokens, known), self._carried()
        found: list[list[Cache]] = [[] for _ in caches]
        for run in config.runs:
            parts: list[Any] = [None, None]
            for kind, cache in enumerate(caches):
                begin, end = (
                    sum(config.kind(layer) == kind for layer in range(stop))
                    for stop in (run.first, run.first + run.size)
                )
                parts[kind] = jax.tree.map(lambda c, b=begin, e=end: c[b:e], cache)
            kinds = config.kinds(run.moe)
            if run.moe:
                (x, carried), _, new = scan_layers(
                    moe_layer, self.moe_blocks, kinds, (x, carried), run, parts
                )
            else:
                x, _, new = scan_layers(dense_layer, self.dense_blocks, kinds, x, run, parts)
            for kind, parts_found in enumerate(found):
                parts_found += [] if new[kind] is None else [new[kind]]
        joined = tuple(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *f) for f in found)
        return self.logits(self._head_input(x)), joined

    def _head_input(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.config.multipliers.logits * self.norm(constrain_batch(x, self.mesh))

    def _carried(self) -> Carried | None:
        if self.tuned_experts is None or self.tuned_experts.default_id is not None:
            return None
        return carry_banks(self.tuned_experts.banks, self.mesh)

    def _embed(
        self, tokens: Int[Array, "B S"], known: Bool[Array, " B"] | None
    ) -> Float[Array, "B S D"]:
        """Args: known: rows whose adapter there is; the others become NaN."""
        rows = constrain_batch(look_up(self.embedding[...], tokens, self.mesh), self.mesh)
        rows = rows.astype(self.dtype) * self.config.multipliers.embedding
        return rows if known is None else jnp.where(known[:, None, None], rows, jnp.nan)

    def _adapters_of(
        self, adapter_ids: AdapterIds | None, rows: int
    ) -> tuple[Int[Array, " B"] | None, Bool[Array, " B"] | None]:
        """The resident adapter of each row, and whether there is one by its id; None without
        resident adapters.
        """
        default = None if self.tuned_experts is None else self.tuned_experts.default_id
        if default is None or self.tuned_experts is None:
            if adapter_ids is not None:
                raise InputError("adapter_ids: the model has no resident adapters")
            return None, None
        if adapter_ids is None:
            return jnp.broadcast_to(default, rows), None
        count = len(self.tuned_experts.layout.rooms)
        if not isinstance(adapter_ids, jax.Array):
            check_adapter_ids(adapter_ids, count)
        ids = jnp.asarray(adapter_ids)
        if ids.shape != (rows,):
            raise InputError(
                f"adapter_ids: has shape {ids.shape}; expected ({rows},), one for each row"
            )
        known = (ids >= -1) & (ids < count)
        return jnp.where(known, ids, -1), known


def check_adapter_ids(adapter_ids: Sequence[int] | np.ndarray, count: int) -> None:
    """Raise an `InputError` for an id that none of `count` resident adapters has."""
    for row, adapter in enumerate(adapter_ids):
        if not -1 <= adapter < count:
            raise InputError(
                f"adapter_ids: row {row} is {adapter}; expected -1 for the base, or 0 to "
                f"{count - 1}"
            )


def look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B S"], mesh: Mesh | None
) -> Float[Array, "B S D"]:
    """Rows of the embedding.

    On a mesh, every device looks its own columns up for all tokens of its replica, and they are
    exchanged once. The compiler, left alone, would gather the rows of other replicas, too.
    """
    if mesh is None or mesh.size == 1:
        return table[tokens]
    columns, batch = RULES.spec((None, "embed"), table.shape, mesh), PartitionSpec(RULES.batch)

    def on_shard(table: Array, tokens: Array) -> Array:
        if columns[1] is None:
            return table[tokens]
        tokens = jax.lax.all_gather(tokens, RULES.embed, tiled=True)
        return jax.lax.all_to_all(table[tokens], RULES.embed, 0, 2, tiled=True)

    return jax.shard_map(
        on_shard, mesh=mesh, in_specs=(columns, batch), out_specs=batch, check_vma=False
    )(table, tokens)


def _positions(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Distance to the first token of the same segment."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
