"""Several adapters of one base in one model, a row of the batch for any of them.

What they trained lies beside the base (`adapt/resident.py`), which is not changed.
"""

from collections.abc import Sequence

from esft_jax.adapt.attach import check_plain
from esft_jax.adapt.resident import BASE, ResidentExperts, ResidentLayout, Selected
from esft_jax.blocks import box_shape, write_blocks
from esft_jax.checkpoint.adapter import Adapter, finite_block
from esft_jax.checkpoint.peft import LoRAAdapter
from esft_jax.errors import InputError
from esft_jax.families import tensor_table
from esft_jax.model.config import ModelConfig
from esft_jax.model.transformer import Transformer, check_adapter_ids
from esft_jax.moe.weights import ExpertWeights
from esft_jax.ops.quantised import Quantised
from esft_jax.sharding import EXPERT


def attach_adapters(
    model: Transformer,
    adapters: Sequence[Adapter | LoRAAdapter],
    base_fingerprint: str | None = None,
    tokenizer_fingerprint: str | None = None,
) -> None:
    """Give a base model several adapters at once; the first has the id 0.

    `model(tokens, adapter_ids=...)`, `model.decode` and `generate_tokens` take an id for each row
    of a batch, -1 for the base. Where none is given, rows are of the adapter of `choose_adapter`,
    the base at first. The logits of a row are those of the model that its adapter is merged into.

    Args:
        model: a base, of any types, quantised or split over devices; its weights stay.
        adapters: they train routed experts alone, for all else is shared by the rows of a batch.
        base_fingerprint, tokenizer_fingerprint: see `apply_adapter`.

    Raises:
        InputError: there is no adapter; one does not fit the model, or trains more than routed
            experts; or the model has been prepared for training, or has adapters already. The model
            is unchanged then. Or a tensor is not finite in the model's type.
    """
    check_plain(model)
    if not adapters:
        raise InputError("adapters: none is given; expected at least one")
    fingerprints = base_fingerprint, tokenizer_fingerprint
    checked = [check_resident(model.config, adapter, *fingerprints) for adapter in adapters]
    shards = 1 if model.mesh is None else model.mesh.shape[EXPERT]
    rooms = tuple(-(-sum(map(len, ids)) // shards) for _, ids in checked)
    config, base = model.config, model.moe_blocks.moe.experts.weights
    layout = ResidentLayout(rooms, len(config.moe_layers), config.router.num_experts, shards)
    dtype = model.dtype if isinstance(base.down, Quantised) else base.down.dtype
    model.tuned_experts = ResidentExperts(base, dtype, layout, model.mesh)
    for adapter_id, (adapter, selected) in enumerate(checked):
        _write(model, adapter_id, adapter, selected)


def exchange_adapter(
    model: Transformer,
    adapter_id: int,
    adapter: Adapter | LoRAAdapter | None,
    base_fingerprint: str | None = None,
    tokenizer_fingerprint: str | None = None,
) -> None:
    """Put an adapter in the place of a resident one; nothing is compiled again.

    Args:
        model: one of `attach_adapters`.
        adapter_id: of the adapter that leaves.
        adapter: it has at most as many experts as the first one that had this id; None leaves the
            base in its place.
        base_fingerprint, tokenizer_fingerprint: see `apply_adapter`.

    Raises:
        InputError: the model has no adapter of this id, or the adapter does not fit, or is larger;
            the model is unchanged then. Or a tensor is not finite in the model's type: rows with
            this id are of the base then.
    """
    resident = _resident(model, adapter_id)
    if adapter is None:
        resident.set_table(adapter_id, {})
        return
    checked = check_resident(model.config, adapter, base_fingerprint, tokenizer_fingerprint)
    _write(model, adapter_id, *checked)


def choose_adapter(model: Transformer, adapter_id: int) -> None:
    """From here on, rows of a batch are of this adapter where a call of the model names none.

    Args:
        model: one of `attach_adapters`.
        adapter_id: -1 for the base.

    Raises:
        InputError: the model has no adapter of this id.
    """
    _resident(model, adapter_id, base=True).set_default(adapter_id)


def _resident(model: Transformer, adapter_id: int, *, base: bool = False) -> ResidentExperts:
    resident = model.tuned_experts
    if not isinstance(resident, ResidentExperts):
        raise InputError("the model has no resident adapters; expected one of attach_adapters")
    if not base and adapter_id == BASE:
        raise InputError("adapter_ids: -1 is the base, which stays; expected 0 or more")
    check_adapter_ids([adapter_id], len(resident.layout.rooms))
    return resident


def check_resident(
    config: ModelConfig,
    adapter: Adapter | LoRAAdapter,
    base_fingerprint: str | None = None,
    tokenizer_fingerprint: str | None = None,
) -> tuple[Adapter, Selected]:
    """An adapter that can be resident, and its experts of every MoE layer.

    Raises:
        InputError: it cannot, or does not fit the model; see `Adapter.check`.
    """
    if isinstance(adapter, LoRAAdapter):
        raise InputError(
            f"{adapter.folder}: is of LoRA; expected tuned experts, to have several at once"
        )
    adapter.check(config, base_fingerprint, tokenizer_fingerprint)
    if also := adapter.expert_cfg.also:
        raise InputError(
            f"{adapter.folder}: trains {', '.join(also)}, too; expected routed experts alone, to "
            "have several at once"
        )
    experts = adapter.expert_cfg.experts
    return adapter, [sorted(experts.get(layer, ())) for layer in config.moe_layers]


def _write(model: Transformer, adapter_id: int, adapter: Adapter, selected: Selected) -> None:
    """Write an adapter's experts to its rows."""
    resident = model.tuned_experts
    assert isinstance(resident, ResidentExperts)
    try:
        rows = resident.layout.rows(adapter_id, selected)
    except InputError as error:
        raise InputError(f"{adapter.folder}: {error}") from None
    resident.set_table(adapter_id, {})  # until all of it is there
    params, places = ExpertWeights.held_by(resident)._asdict(), tensor_table(model.config).places
    for name in adapter.names:
        place = places[name]
        layer, expert = place.index
        param, row = params[place.path[-1]], rows[layer, expert]
        array = param.get_value()
        box = (slice(row, row + 1), *place.box[2:])
        tensor = adapter.tensors[name]
        block = finite_block(tensor, name, place, array.dtype, adapter.folder)
        param.set_value(write_blocks(array, [(box, block.reshape(box_shape(box)))]))
    resident.set_table(adapter_id, rows)
