"""What a run leaves behind: an adapter with its manifest, or a model."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.adapt.tuned import in_bank
from esft_jax.checkpoint.adapter import EXPERT_CONFIG, save_adapter, trained_tensors
from esft_jax.checkpoint.card import CARD, Figures, adapter_card, declared_license, model_card
from esft_jax.checkpoint.export import save_model
from esft_jax.checkpoint.manifest import read_manifest
from esft_jax.checkpoint.peft import save_lora
from esft_jax.files import write_text_atomic
from esft_jax.model.transformer import Transformer
from esft_jax.training.setup import Setup
from esft_jax.training.timing import RunTiming


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        folder: the run's folder.
        result: `adapter/` or `model/` in it; None if the run was stopped before its end.
        step: updates whose parameters the result holds.
        valid_loss: its mean validation loss in nats per token (of an own loss, what that gives),
            if there is a validation set.
        trained, total: parameters trained, and in the model.
        experts: the routed experts that were trained, or updated; None where all are.
        step_bytes: arguments and temporaries of the update, per device; None where the backend does
            not say.
        seconds: spent in this call.
        timing: of its steps, and of the run as a whole.
        stopped_by: the signal that stopped it before its end, such as `signal.SIGINT`.
    """

    folder: Path
    result: Path | None
    step: int
    valid_loss: float | None
    trained: int
    total: int
    experts: ExpertConfig | None
    step_bytes: int | None
    seconds: float
    timing: RunTiming
    stopped_by: int | None = None


@dataclass(frozen=True)
class Outcome:
    """Where the loop ended: the parameters to keep, or the signal that stopped it before."""

    step: int
    tuned: nnx.State | None
    valid_loss: float | None
    timing: RunTiming
    stopped_by: int | None = None


def write_result(setup: Setup, trained: Trained, model: Transformer, outcome: Outcome) -> Path:
    """Write `adapter/` (esft, lora) or `model/` (full).

    Args:
        model: merged with the parameters of `outcome`.
    """
    folder = setup.run
    if trained is None:
        base = setup.base
        source = base.source
        save_model(
            model,
            folder.model,
            base.folder,
            carried=None if source is None else source.carried,
            fused=None if source is None else source.fused,
            chat_format=setup.tokenizer.chat_format,
            card=_full_card(setup, outcome.step, outcome.valid_loss, ()),
        )
        return folder.model
    assert outcome.tuned is not None
    manifest = _manifest(setup, outcome.step, outcome.valid_loss)
    if isinstance(trained, LoRA):
        save_lora(folder.adapter, model, trained, manifest)
    else:
        save_adapter(folder.adapter, trained_tensors(model, outcome.tuned), trained, manifest)
    return folder.adapter


def write_card(setup: Setup, result: RunResult, figures: Figures) -> None:
    """Write the card of a run's result again, with what an evaluation found.

    Raises:
        InputError: the result is gone, or the card cannot be written.
    """
    folder = result.result
    assert folder is not None
    manifest = read_manifest(folder)
    if manifest is None:
        card = _full_card(setup, result.step, result.valid_loss, figures)
    else:
        path = folder / EXPERT_CONFIG
        experts = ExpertConfig.load(path) if path.exists() else None
        card = adapter_card(folder, manifest, experts, figures)
    write_text_atomic(folder / CARD, card)


def _full_card(setup: Setup, step: int, valid_loss: float | None, figures: Figures) -> str:
    model = setup.config.model
    what = f"`{model}` with all parameters fine-tuned by `esft_jax`."
    if setup.base.source is None:
        what = f"A model in the shape of `{model}`, trained from random weights by `esft_jax`."
    return model_card(setup.run.model, _manifest(setup, step, valid_loss), what, figures)


def _manifest(setup: Setup, step: int, valid_loss: float | None) -> dict[str, Any]:
    config = setup.config
    # How given experts were chosen is not known.
    given = config.expert_cfg is not None or not config.selects_experts
    scores = setup.run.scores / "scores.json"
    return {
        "base_model": config.model,
        "base_license": declared_license(setup.base.folder),
        **setup.identity,
        "dtype": config.dtype,
        # What the trained parameters were trained beside.
        "quantise": dataclasses.asdict(config.quantise) if config.quantise.chosen else None,
        "scores_sha256": _file_hash(scores) if config.measures_scores else None,
        "data_sha256": setup.train_set.stats.sha256,
        "select": None if given else dataclasses.asdict(config.select),
        "step": step,
        "valid_loss": valid_loss,
    }


def _file_hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def trained_parameters(model: Transformer, tuned: nnx.State) -> int:
    """Number of trained parameters, without the padding rows of the tuned bank."""
    count = 0
    for _, param in nnx.to_flat_state(tuned):
        value = param[...]
        if in_bank(param) and model.tuned_experts is not None:
            count += len(model.tuned_experts.layout.rows()) * int(np.prod(value.shape[1:]))
        else:
            count += value.size
    return count


def hash_of(frozen: nnx.State) -> str:
    """Hash of this process's parts of the frozen parameters."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(frozen):
        for shard in leaf.addressable_shards:
            digest.update(np.asarray(shard.data).tobytes())
    return digest.hexdigest()
