import numpy as np
import pytest

from esft_jax.errors import InputError
from esft_jax.experts.expert_config import ExpertConfig
from esft_jax.experts.scores import ExpertScores, load_scores
from esft_jax.experts.select import select_experts


def scores_of(*rows):
    token = np.array(rows)
    return ExpertScores(tuple(range(1, len(rows) + 1)), token, token / 2)


@pytest.mark.parametrize("source", ["", "summary.json"])
@pytest.mark.parametrize("task", ["intent", "law"])
def test_released_configurations(esft_reference, task, source):
    results = esft_reference / "results"
    config = select_experts(load_scores(results / "expert_scores" / task / source), "token", 0.2)
    released = ExpertConfig.load(results / "expert_configs" / f"{task}.json")
    assert config == released  # the order of the ids included


@pytest.mark.parametrize("task", ["intent", "law"])
def test_logs_and_summary_agree_for_the_gate_score(esft_reference, task):
    folder = esft_reference / "results" / "expert_scores" / task
    from_logs = select_experts(load_scores(folder), "gate", 0.1)
    assert from_logs == select_experts(load_scores(folder / "summary.json"), "gate", 0.1)
    assert 26 <= from_logs.num_experts_selected < 26 * 64


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.0001, (2,)),
        (0.4, (2,)),  # reached exactly: no second expert
        (0.4001, (2, 0)),
        (0.7, (2, 0)),
        (0.71, (2, 0, 1)),
        (1.0, (2, 0, 1, 3)),
    ],
)
def test_experts_are_added_while_the_sum_is_below_p(top_p, expected):
    scores = scores_of([0.3, 0.2, 0.4, 0.1])
    assert select_experts(scores, "token", top_p).experts == {1: expected}


def test_each_layer_stands_alone():
    scores = scores_of([0.9, 0.1, 0.0], [0.2, 0.3, 0.5])
    assert select_experts(scores, "token", 0.6).experts == {1: (0,), 2: (2, 1)}


def test_ties_go_to_the_lower_id():
    scores = scores_of([0.1, 0.3, 0.3, 0.3])
    assert select_experts(scores, "token", 0.5).experts == {1: (1, 2)}


def test_scores_count_with_four_decimals():
    # Unrounded, expert 1 would come first, and p would be missed by a hair.
    scores = scores_of([0.40001, 0.40004, 0.19995])
    assert select_experts(scores, "token", 0.4).experts == {1: (0,)}
    assert select_experts(scores, "token", 0.8).experts == {1: (0, 1)}


def test_sums_are_exact():
    # In floating point 0.7 + 0.1 + 0.1 lies below 0.9, and 0.07 * 10000 above 700.
    assert select_experts(scores_of([0.1, 0.7, 0.1, 0.1]), "token", 0.9).experts == {1: (1, 0, 2)}
    assert select_experts(scores_of([0.07] * 14 + [0.02]), "token", 0.07).experts == {1: (0,)}


def test_gate_p_is_absolute_mass():
    scores = scores_of([0.5, 0.3, 0.2])  # gates: 0.25, 0.15, 0.1
    assert select_experts(scores, "gate", 0.25).experts == {1: (0,)}
    assert select_experts(scores, "gate", 0.3).experts == {1: (0, 1)}
    assert select_experts(scores, "gate", 0.6).experts == {1: (0, 1, 2)}


def test_flags_are_passed_on():
    scores = scores_of([0.5, 0.5])
    assert select_experts(scores, "token", 0.2, shared_experts=True) == ExpertConfig(
        {1: (0,)}, shared_experts=True
    )
    assert select_experts(scores, "token", 0.2, non_expert_modules=True) == ExpertConfig(
        {1: (0,)}, non_expert_modules=True
    )


@pytest.mark.parametrize("top_p", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_p_out_of_range(top_p):
    with pytest.raises(InputError, match=r"top_p: .* expected a number in \(0, 1\]"):
        select_experts(scores_of([0.5, 0.5]), "token", top_p)


def test_unknown_method():
    with pytest.raises(InputError, match="method: 'grad' is unknown; expected token or gate"):
        select_experts(scores_of([0.5, 0.5]), "grad", 0.2)
