import itertools

import numpy as np
import pytest

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.errors import InputError
from esft_jax.routing.scores import ExpertScores, load_scores
from esft_jax.routing.select import combine_experts, random_experts, select_experts
from esft_jax.selection_config import DEFAULT_TOP_P


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
    ("model", "layers", "experts"),
    [("GLM-4.5-Air", 45, 339), ("Qwen3-Coder-30B-A3B-Instruct", 48, 191)],
)
def test_published_selections_of_other_models(esft_sample, model, layers, experts):
    published = ExpertConfig.load(esft_sample / f"{model}_expert_config.json")
    scores = load_scores(esft_sample / f"{model}_summary.json")
    assert (scores.methods, scores.num_experts) == (("token", "gate_share"), 128)
    found = select_experts(scores, "token", DEFAULT_TOP_P["token"]).experts
    assert found == published.experts  # the order of the ids included
    assert (len(published.experts), published.num_experts_selected) == (layers, experts)
    with pytest.raises(InputError, match="these are gate shares"):
        select_experts(scores, "gate", 0.1)


def test_gate_shares_of_released_logs_are_normalised_by_token(esft_reference):
    scores = load_scores(esft_reference / "results" / "expert_scores" / "intent")
    log = scores.routing
    expected = np.zeros_like(scores.gate_share)
    for row, (ids, gates) in enumerate(zip(log.expert_ids, log.gates, strict=True)):
        for chosen, weights in zip(ids, gates, strict=True):
            expected[row, chosen] += weights / weights.sum()
    np.testing.assert_allclose(scores.gate_share, expected / log.num_tokens, rtol=1e-9)
    assert 0.25 < scores.gate.sum(axis=1).min() < scores.gate.sum(axis=1).max() < 0.53


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
    assert select_experts(scores, "token", 0.2, also=("shared_experts",)) == ExpertConfig(
        {1: (0,)}, also=("shared_experts",)
    )
    assert select_experts(scores, "token", 0.2, also=("non_expert_modules",)) == ExpertConfig(
        {1: (0,)}, also=("non_expert_modules",)
    )


@pytest.mark.parametrize("top_p", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_p_out_of_range(top_p):
    with pytest.raises(InputError, match=r"top_p: .* expected a number in \(0, 1\]"):
        select_experts(scores_of([0.5, 0.5]), "token", top_p)


@pytest.mark.usefixtures("unchecked")
def test_unknown_method():
    with pytest.raises(InputError, match="method: 'grad' is unknown; expected token or gate"):
        select_experts(scores_of([0.5, 0.5]), "grad", 0.2)


def test_top_k_takes_as_many_in_each_layer():
    scores = scores_of([0.2, 0.3, 0.3, 0.2], [0.0, 0.0, 0.0, 1.0])
    assert select_experts(scores, "token", top_k=2).experts == {1: (1, 2), 2: (3, 0)}


def test_a_budget_takes_the_best_of_all_layers():
    scores = scores_of([0.6, 0.3, 0.1], [0.4, 0.3, 0.3])
    found = [select_experts(scores, "token", max_experts=n).experts for n in range(1, 7)]
    assert found[0] == {1: (0,), 2: ()}
    assert found[1] == {1: (0,), 2: (0,)}
    assert found[2] == {1: (0, 1), 2: (0,)}  # a tie: the lower layer first, then the lower id
    assert found[3] == {1: (0, 1), 2: (0, 1)}
    assert found[4] == {1: (0, 1), 2: (0, 1, 2)}
    assert found[5] == {1: (0, 1, 2), 2: (0, 1, 2)}


def test_a_budget_may_be_divided_among_layers():
    scores = scores_of([0.6, 0.2, 0.1, 0.1], [0.3, 0.3, 0.2, 0.2])

    def found(count, allocation):
        chosen = select_experts(scores, "token", max_experts=count, allocation=allocation)
        return tuple(map(len, chosen.experts.values()))

    assert [found(n, "uniform") for n in (2, 3, 4, 7, 8)] == [(n, n) for n in (1, 1, 2, 3, 4)]
    # Sums before the experts: 0, .6, .8, .9 and 0, .3, .6, .8. Of two alike, p takes both or none.
    expected = {2: (1, 1), 3: (1, 2), 4: (1, 2), 5: (2, 3), 6: (2, 3), 7: (3, 4), 8: (4, 4)}
    for count, sizes in expected.items():
        assert found(count, "top_p") == sizes
        p = max(np.arange(1, 101) / 100, key=lambda p: _within(scores, p, count) * p)
        by_p = select_experts(scores, "token", p)
        assert by_p == select_experts(scores, "token", max_experts=count, allocation="top_p")
    for allocation in ("uniform", "top_p"):
        with pytest.raises(InputError, match="max_experts: 1 is out of range; expected at least 2"):
            select_experts(scores, "token", max_experts=1, allocation=allocation)


def _within(scores, p, count):
    return select_experts(scores, "token", p).num_experts_selected <= count


def test_no_choice_of_as_many_experts_serves_more_tokens():
    rng = np.random.default_rng(0)
    scores = scores_of(*rng.dirichlet(np.ones(4), size=2).round(4))
    chosen = select_experts(scores, "token", max_experts=3)
    served = sum(scores.token[layer - 1, list(ids)].sum() for layer, ids in chosen.experts.items())
    every = itertools.combinations(scores.token.reshape(-1), 3)
    assert served == pytest.approx(max(map(sum, every)))


def test_groups_are_taken_whole_by_the_sum_of_their_scores():
    scores = scores_of([0.4, 0.05, 0.1, 0.15, 0.2, 0.1])
    groups = np.array([[[0, 1], [2, 3], [4, 5]]])  # .45 .25 .3
    assert select_experts(scores, "token", 0.4, groups=groups).experts == {1: (0, 1)}
    assert select_experts(scores, "token", 0.46, groups=groups).experts == {1: (0, 4, 5, 1)}
    assert select_experts(scores, "token", top_k=4, groups=groups).experts == {1: (0, 4, 5, 1)}
    assert select_experts(scores, "token", max_experts=3, groups=groups).experts == {1: (0, 1)}
    with pytest.raises(InputError, match="max_experts: 1 is out of range; expected at least 2"):
        select_experts(scores, "token", max_experts=1, groups=groups)


@pytest.mark.parametrize("rules", [{}, {"top_p": 0.2, "top_k": 1}, {"top_k": 1, "max_experts": 2}])
def test_exactly_one_rule(rules):
    with pytest.raises(InputError, match="top_p, top_k, max_experts: expected exactly one of them"):
        select_experts(scores_of([0.5, 0.5]), "token", **rules)


def test_random_experts_have_the_counts_of_the_selection():
    like = ExpertConfig({1: (3, 1), 2: (), 3: tuple(range(5))}, also=("shared_experts",))
    drawn = [random_experts(like, seed, 64) for seed in range(400)]
    assert drawn[0] == random_experts(like, 0, 64) != drawn[1]
    for one in drawn:
        assert one.also == ("shared_experts",)
        assert {layer: len(set(ids)) for layer, ids in one.experts.items()} == {1: 2, 2: 0, 3: 5}
    # Every expert is drawn as often: 400 * 5 / 64 times, give or take five standard deviations.
    counts = np.bincount([expert for one in drawn for expert in one.experts[3]], minlength=64)
    assert abs(counts - 400 * 5 / 64).max() < 5 * (400 * 5 / 64) ** 0.5
    groups = {layer: np.arange(64).reshape(32, 2) for layer in (1, 2)}
    whole = random_experts(ExpertConfig({1: (3, 1), 2: (1, 2, 3, 4)}), 0, 64, groups)
    for ids in whole.experts.values():
        assert all(a % 2 == 0 and b == a + 1 for a, b in zip(ids[::2], ids[1::2], strict=True))


def test_union_and_intersection():
    one = ExpertConfig({1: (3, 1), 2: (0,)})
    other = ExpertConfig({1: (1, 2), 3: (5,)}, also=("non_expert_modules",))
    assert combine_experts([one, other], "union") == ExpertConfig(
        {1: (3, 1, 2), 2: (0,), 3: (5,)}, also=("non_expert_modules",)
    )
    assert combine_experts([one, other], "intersection").experts == {1: (1,), 2: (), 3: ()}
    assert combine_experts([one], "union") == combine_experts([one], "intersection") == one
