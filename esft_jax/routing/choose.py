"""From the section `select` of a configuration to experts; for `train`, `score` and `select`."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import check_experts, trains
from esft_jax.adapt.parts import check_also
from esft_jax.checkpoint.identity import check_same_base
from esft_jax.errors import InputError
from esft_jax.families import tensor_table
from esft_jax.files import read_json
from esft_jax.model.config import ModelConfig
from esft_jax.routing.groups import group_experts
from esft_jax.routing.scores import ExpertScores, as_wide, load_scores, score_words
from esft_jax.routing.select import combine_experts, random_experts, select_experts
from esft_jax.selection_config import DEFAULT_TOP_P, Allocation, SelectConfig


def choose_experts(
    select: SelectConfig,
    tasks: Sequence[ExpertScores | ExpertConfig],
    model: ModelConfig | None = None,
    dtype: str = "bfloat16",
    experts_per_token: int = 6,
) -> ExpertConfig:
    """The experts to train.

    Args:
        tasks: scores, or selections that were made before; one for each task.
        model: its shape. A budget needs it, and so do random experts without any scores.
        dtype: type of the adapter's tensors, for a budget in bytes.
        experts_per_token: of routing logs in `groups_from`; the model's, if it is given.

    Raises:
        InputError: the tasks do not fit each other or the model, or nothing is selected.
    """
    scored = [task for task in tasks if isinstance(task, ExpertScores)]
    _check_fit(select, tasks, model)
    max_experts = None if model is None else affordable_experts(select, model, dtype)
    top_k = experts_per_token if model is None else model.router.top_k
    groups = _groups(select, scored, top_k)
    chosen = [
        task
        if isinstance(task, ExpertConfig)
        else select_experts(
            task,
            select.method,
            select.threshold,
            top_k=select.top_k,
            max_experts=max_experts,
            allocation=select.allocation,
            groups=groups,
        )
        for task in tasks
    ]
    experts = combine_experts(chosen, select.combine)
    experts = ExpertConfig(experts.experts, (*experts.also, *select.also))
    if select.random_seed is not None:
        width = model.router.num_experts if model is not None else scored[0].num_experts
        by_layer = dict(zip(scored[0].layers, groups, strict=True)) if groups is not None else None
        experts = random_experts(experts, select.random_seed, width, by_layer)
    if not (experts.num_experts_selected or experts.also):
        raise InputError(f"select: the {select.combine} of the tasks' experts is empty")
    return experts


def given_experts(
    select: SelectConfig,
    chosen: str | None,
    kept: Path,
    model: ModelConfig,
    dtype: str,
    *,
    low_rank: bool,
) -> ExpertConfig | None:
    """The experts to train; None where they follow from scores that are not measured yet.

    Args:
        chosen: the file that names them, if there is one: `expert_cfg`.
        kept: where a run keeps the experts that it has chosen.
        dtype: type of the adapter's tensors, for a budget in bytes.
        low_rank: they get low-rank updates, which other parts get by `lora.targets`.

    Raises:
        InputError: the file, or the rule to choose by, does not fit the model or the method.
    """
    where = str(kept) if chosen is None else chosen
    if chosen is not None or kept.exists():
        experts = ExpertConfig.load(where)
        try:
            check_experts(experts, model)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    else:
        check_select(select, model, dtype)
        if not select.scores:
            return None
        where = "select.scores"
        experts = choose_experts(select, load_tasks(select.scores, model), model, dtype)
    if low_rank and not experts.num_experts_selected:
        raise InputError(f"{where}: selects no expert for lora.targets: selected_experts")
    if low_rank and experts.also:
        raise InputError(
            f"{where}: trains {', '.join(experts.also)} too; with method lora, lora.targets "
            "says what is trained besides routed experts"
        )
    return experts


# Beside a budget, in words.
_ALLOCATED: dict[Allocation, str] = {
    "global": "",
    "uniform": ", as many in each layer",
    "top_p": ", the same p in each layer",
}


def describe(select: SelectConfig, *, scored: bool = True) -> str:
    """The rule in words, such as `token score, p = 0.2`.

    Args:
        scored: some task was given by its scores, not by its experts.
    """
    words = [score_words(select.method)]
    if not scored:
        words = ["experts as given"]
    elif select.top_k is not None:
        words.append(f"{select.top_k} per layer")
    elif select.max_parameters is not None:
        words.append(f"at most {select.max_parameters:,} parameters{_ALLOCATED[select.allocation]}")
    elif select.max_bytes is not None:
        words.append(f"at most {select.max_bytes:,} bytes{_ALLOCATED[select.allocation]}")
    else:
        words.append(f"p = {select.threshold:g}")
    if select.group_size > 1:
        words.append(f"groups of {select.group_size}")
    if len(select.scores) > 1:
        words.append(f"{select.combine} of {len(select.scores)} tasks")
    if select.random_seed is not None:
        words.append(f"replaced by as many random ones (seed {select.random_seed})")
    return ", ".join(words)


def load_tasks(
    paths: Sequence[str], model: ModelConfig | None, experts_per_token: int = 6
) -> list[ExpertScores | ExpertConfig]:
    """Read scores (see `load_scores`) and `expert_cfg.json` files.

    Args:
        model: whose they are, if it is known.
        experts_per_token: of routing logs; the model's, if it is given.
    """
    top_k = experts_per_token if model is None else model.router.top_k
    given = {path: ExpertConfig.load(path) for path in paths if _is_expert_config(path)}
    scores = [load_scores(path, experts_per_token=top_k) for path in paths if path not in given]
    scored = iter(as_wide(scores, None if model is None else model.router.num_experts))
    return [given[path] if path in given else next(scored) for path in paths]


def _is_expert_config(path: str) -> bool:
    if not Path(path).is_file():
        return False
    content = read_json(path)
    return isinstance(content, dict) and "experts" in content


def affordable_experts(select: SelectConfig, model: ModelConfig, dtype: str) -> int | None:
    """How many experts a budget pays for, beside what else is trained; None without a budget.

    Raises:
        InputError: not even one group of experts, or where each layer gets some, one for each.
    """
    if select.max_parameters is not None:
        key, budget, unit = "max_parameters", select.max_parameters, 1
    elif select.max_bytes is not None:
        key, budget, unit = "max_bytes", select.max_bytes, jnp.dtype(dtype).itemsize
    else:
        return None
    rest = ExpertConfig({}, select.also)
    fixed = unit * sum(
        math.prod(place.shape)
        for place in tensor_table(model).places.values()
        if trains(rest, place.role)
    )
    expert = unit * model.expert_size
    count = (budget - fixed) // expert
    least = select.group_size * (1 if select.allocation == "global" else len(model.moe_layers))
    if count < least:
        raise InputError(
            f"select.{key}: {budget:,} is too little; one expert takes {expert:,}, all that is "
            f"trained besides {fixed:,}; expected at least {fixed + least * expert:,}"
        )
    return int(count)


def check_select(select: SelectConfig, model: ModelConfig, dtype: str) -> None:
    """Check what can be known of a selection before anything is scored.

    Raises:
        InputError: it does not fit the model.
    """
    total = model.router.num_experts
    check_also(select.also, tensor_table(model).roles, "select.also")
    if select.method == "gate" and model.router.renormalise:
        raise InputError(
            "select.method: gate: the model's router renormalises its gates, so that their means "
            "are gate shares; expected gate_share "
            f"(p = {DEFAULT_TOP_P['gate_share']} without a rule)"
        )
    if total % select.group_size:
        raise InputError(
            f"select.group_size: {select.group_size} does not divide the model's {total} experts"
        )
    if select.top_k is not None and select.top_k > total:
        raise InputError(f"select.top_k: {select.top_k}; the model has {total} experts per layer")
    if select.groups_from is not None:
        _check_scores(_grouping(select, model.router.top_k), model, select.groups_from)
    affordable_experts(select, model, dtype)


def _check_fit(
    select: SelectConfig, tasks: Sequence[ExpertScores | ExpertConfig], model: ModelConfig | None
) -> None:
    """Check tasks against the model, or against the first scores."""
    paths = select.scores or ["scores"] * len(tasks)
    named = list(zip(paths, tasks, strict=True))
    scored = [(path, task) for path, task in named if isinstance(task, ExpertScores)]
    shape = None
    if model is not None:
        shape = model.moe_layers, model.router.num_experts
    elif scored:
        shape = scored[0][1].layers, scored[0][1].num_experts
    base = {} if model is None else {"config_fingerprint": model.fingerprint}
    for number, (where, scores) in enumerate(scored):
        check_same_base(scores.provenance, base, where, "measured on")
        for _, other in scored[:number]:  # some may not say it
            check_same_base(scores.provenance, other.provenance, where, "measured on")
    for where, task in named:
        if isinstance(task, ExpertConfig):
            if select.has_rule or select.group_size > 1:
                raise InputError(
                    f"{where}: is a selection already; top_p, top_k, a budget and group_size "
                    "choose from scores"
                )
            try:
                if model is not None:
                    check_experts(task, model)
                elif shape is not None:
                    task.validate(*shape)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            continue
        try:
            task.of(select.method)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if model is not None:
            _check_scores(task, model, where)
        if (task.layers, task.num_experts) != shape:
            raise InputError(f"{where}: scores of another model than {scored[0][0]}")
        if select.group_size > 1 and task.num_experts % select.group_size:
            raise InputError(
                f"select.group_size: {select.group_size} does not divide {task.num_experts} experts"
            )
        if select.top_k is not None and select.top_k > task.num_experts:
            raise InputError(
                f"select.top_k: {select.top_k}; {where} has {task.num_experts} experts per layer"
            )
    needs_model = select.max_parameters is not None or select.max_bytes is not None
    if model is None and needs_model:
        raise InputError("--model: a budget needs the size of an expert; expected a model's folder")
    if shape is None and select.random_seed is not None:
        raise InputError("--model: random experts need their number; expected a model's folder")


def _check_scores(scores: ExpertScores, model: ModelConfig, where: str) -> None:
    layers, experts = model.moe_layers, model.router.num_experts
    if tuple(scores.layers) != tuple(layers) or scores.num_experts != experts:
        from_one = tuple(layer - 1 for layer in scores.layers) == tuple(layers)
        raise InputError(
            f"{where}: scores of {scores.num_experts} experts in layers {scores.layers[0]} to "
            f"{scores.layers[-1]}; the model has {experts} in {layers[0]} to {layers[-1]}"
            + ("; expected layers counted from 0" if from_one else "")
        )


def _grouping(select: SelectConfig, experts_per_token: int) -> ExpertScores:
    assert select.groups_from is not None
    found = load_scores(select.groups_from, experts_per_token=experts_per_token)
    if found.together is None:
        raise InputError(
            f"{select.groups_from}: does not say which experts are chosen together; expected "
            "scores by `score`, or routing logs"
        )
    return found


def _groups(
    select: SelectConfig, scored: Sequence[ExpertScores], experts_per_token: int
) -> Int64[np.ndarray, "L G N"] | None:
    if select.group_size == 1:
        return None
    source = scored[0]
    if select.groups_from is not None:
        source = _grouping(select, experts_per_token)
        if (source.layers, source.num_experts) != (scored[0].layers, scored[0].num_experts):
            raise InputError(f"{select.groups_from}: counts of another model than the scores")
    if source.together is None:
        raise InputError(
            "select.group_size: the scores do not say which experts are chosen together; expected "
            "scores by `score`, routing logs, or select.groups_from"
        )
    return np.stack([group_experts(counts, select.group_size) for counts in source.together])
