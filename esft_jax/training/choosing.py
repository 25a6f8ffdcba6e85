"""The experts that a run trains: given ones, or the best by scores that it measures first."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Float

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.placement import Placement, expected_loads, place_experts
from esft_jax.adapt.slots import TunedLayout
from esft_jax.checkpoint.identity import check_same_base
from esft_jax.data.batch import Batch
from esft_jax.data.pipeline import PackedDataset, eval_batches, sample_rows
from esft_jax.model.transformer import Transformer
from esft_jax.processes import on_first_process
from esft_jax.progress import progress_over
from esft_jax.routing.choose import choose_experts, describe, load_tasks
from esft_jax.routing.score import score_experts
from esft_jax.routing.scores import SCORES_FILE, ExpertScores, load_scores
from esft_jax.sharding import EXPERT, device_multiple
from esft_jax.training.setup import Setup


def experts_to_train(setup: Setup, base: Transformer, say: Callable[[str], None]) -> ExpertConfig:
    """The experts that were given, or newly scored and selected ones; kept in the run folder."""
    experts, select = setup.experts, setup.config.select
    if experts is not None:
        _check_scored_on(setup)
        say(f"experts: {experts.num_experts_selected} given")
    else:
        scores = measure_scores(setup, base)
        on_first_process(lambda: scores.save(setup.run.scores), "scores")
        experts = choose_experts(select, [scores], setup.base.config, setup.config.dtype)
        say(
            f"experts: {experts.num_experts_selected} of {scores.token.size} selected by "
            f"{describe(select)}"
        )
    on_first_process(lambda: experts.save(setup.run.expert_cfg), "experts")
    return experts


def _check_scored_on(setup: Setup) -> None:
    """Check that the experts to train were chosen by scores of this base.

    Raises:
        InputError: naming the scores, and what of the base differs.
    """
    config, run = setup.config, setup.run
    if config.expert_cfg is not None:
        return
    # Without given ones, those that the run measured before it was interrupted.
    named = config.select.scores or (
        [str(run.scores)] if (run.scores / SCORES_FILE).exists() else []
    )
    if config.select.groups_from is not None:
        named = [*named, config.select.groups_from]
    for path, task in zip(named, load_tasks(named, setup.base.config), strict=True):
        if isinstance(task, ExpertScores):
            check_same_base(task.provenance, setup.identity, path, "measured on")


def measure_scores(setup: Setup, base: Transformer) -> ExpertScores:
    """Score the base model's experts on samples of the task's training data, its `score_set`.

    Raises:
        InputError: a score cannot be measured; see `score_experts`.
    """
    config, dataset, general = setup.config, setup.score_set, setup.general_set
    assert dataset is not None, "only what has no experts yet is scored"
    provenance = {
        "model": config.model,
        **setup.identity,
        "quantise": dataclasses.asdict(config.quantise) if config.quantise.chosen else None,
        "data_sha256": dataset.stats.sha256,
        "sequence_length": dataset.sequence_length,
        "seed": config.seed,
    }
    if general is not None:
        provenance["general_sha256"] = general.stats.sha256
    return score_experts(
        base,
        _sampled(setup, dataset, "score"),
        provenance,
        further=config.further_scores,
        general=() if general is None else _sampled(setup, general, "score the general sample"),
        seed=config.seed,
    )


def _sampled(setup: Setup, dataset: PackedDataset, what: str) -> Iterator[Batch]:
    """Batches of the rows that are scored on.

    Args:
        what: the stage, for its progress.
    """
    score = setup.config.score
    rows = sample_rows(dataset, score.samples, setup.config.seed)
    size = device_multiple(min(score.batch_size, len(rows)), setup.mesh)
    batches = eval_batches(dataset, size, jax.process_index(), jax.process_count(), rows=rows)
    return progress_over(batches, what, math.ceil(len(rows) / size))


def loads_of(setup: Setup) -> Float[np.ndarray, "L E"] | None:
    """Share of each layer's tokens that each expert gets, by the scores that the run measured; None
    where experts are given, or are not split over devices.
    """
    if not setup.config.measures_scores or setup.mesh.shape[EXPERT] == 1:
        return None
    return load_scores(setup.run.scores).token


def describe_placement(layout: TunedLayout, loads: Float[np.ndarray, "L E"]) -> str:
    """How evenly the tokens of tuned experts are spread over the devices, in words."""

    def busiest(placement: Placement) -> float:
        return expected_loads(placement, layout.selected, layout.shards, loads).max()

    before = place_experts(layout.selected, layout.num_experts, layout.shards)
    rows = np.bincount([row // layout.rows_per_shard for *_, row in layout.rows()])
    return (
        f"placement on {layout.shards} devices: {rows.min()} to {rows.max()} tuned experts each; "
        f"expected tokens of the busiest in any layer {busiest(before):.2f} times the mean, "
        f"now {busiest(layout.placement):.2f}"
    )
