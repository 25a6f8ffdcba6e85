import dataclasses
import math

import numpy as np
import pytest

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.parts import RATE_PARTS, part_of, roles_of
from esft_jax.checkpoint.adapter import trained_names
from esft_jax.errors import InputError
from esft_jax.families import load_model_config, tensor_table
from esft_jax.model.config import ModelConfig
from esft_jax.model.params import CONSTANTS, Role
from esft_jax.routing.choose import check_select, choose_experts, describe
from esft_jax.routing.scores import ExpertScores
from esft_jax.selection_config import SelectConfig

EXPERT = 3 * 32 * 16  # parameters of one in the tiny model


@pytest.fixture(scope="module")
def model(base) -> ModelConfig:
    return load_model_config(base)


@pytest.fixture
def scores() -> ExpertScores:
    token = np.random.default_rng(0).dirichlet(np.ones(8), size=3)
    return ExpertScores((1, 2, 3), token, token / 2)


def adapter_parameters(model: ModelConfig, experts: ExpertConfig) -> int:
    """Numbers in the adapter's tensors, by their names."""
    places = tensor_table(model).places
    return sum(math.prod(places[name].shape) for name in trained_names(model, experts, "test"))


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"also": ("shared_experts",)},
        {"also": ("router", "norms", "embedding")},
        {"also": ("shared_experts", "non_expert_modules")},
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_budget_pays_for_all_that_is_trained_and_is_never_exceeded(model, scores, parts, size):
    fixed = adapter_parameters(model, ExpertConfig({1: (0,)}, **parts)) - EXPERT
    together = np.broadcast_to(np.eye(8, dtype=np.int64), (3, 8, 8))
    scores = ExpertScores(scores.layers, scores.token, scores.gate, together=together)

    def spent(**budget: int) -> int:
        select = SelectConfig(group_size=size, **budget, **parts)
        return adapter_parameters(model, choose_experts(select, [scores], model, "float32"))

    group = size * EXPERT
    for count in 1, 3, 5:
        budget = fixed + count * group
        assert spent(max_parameters=budget) == spent(max_bytes=4 * budget) == budget
        assert spent(max_parameters=budget + group - 1) == budget
        assert spent(max_bytes=4 * (budget + group) - 1) == budget
    assert spent(max_parameters=10**9) == fixed + 24 * EXPERT
    select = SelectConfig(group_size=size, max_parameters=fixed + group - 1, **parts)
    with pytest.raises(InputError, match=r"select.max_parameters: .* is too little; one expert"):
        check_select(select, model, "float32")


def test_mean_gates_are_those_of_routers_that_do_not_renormalise(model, scores):
    router = dataclasses.replace(model.router, renormalise=True)
    sharing = dataclasses.replace(model, router=router)
    select = SelectConfig(method="gate", top_k=2)
    check_select(select, model, "float32")
    with pytest.raises(InputError, match=r"select.method: gate: .* expected gate_share \(p = 0.2"):
        check_select(select, sharing, "float32")
    check_select(SelectConfig(method="gate_share"), sharing, "float32")
    # By what scores hold, too: of which router they are may be all that is known.
    of_shares = ExpertScores(scores.layers, scores.token, None, gate_share=scores.token)
    by_token = choose_experts(SelectConfig(top_k=2), [of_shares])
    assert choose_experts(SelectConfig(method="gate_share", top_k=2), [of_shares]) == by_token
    with pytest.raises(InputError, match="scores: method: gate: these are gate shares"):
        choose_experts(select, [of_shares])
    with pytest.raises(InputError, match="scores: method: gate_share: these are mean gates"):
        choose_experts(SelectConfig(method="gate_share"), [scores])
    counted = dataclasses.replace(scores, layers=(2, 3, 4))
    with pytest.raises(InputError, match="in layers 2 to 4; .* in 1 to 3; expected layers counted"):
        choose_experts(SelectConfig(), [counted], model)


def test_parts_that_a_model_does_not_have(model):
    tied = dataclasses.replace(model, tie_embeddings=True)
    bare = dataclasses.replace(model, shared_width=0)
    everything = ("shared_experts", "non_expert_modules")
    check_select(SelectConfig(also=everything), model, "float32")
    for shape, also, there in (
        (tied, "head", "shared_experts, router"),
        (bare, "shared_experts", "router, attention"),
    ):
        with pytest.raises(InputError, match=f"select.also: {also}: the model has .* of {there}"):
            check_select(SelectConfig(also=(also,)), shape, "float32")
        given = [ExpertConfig({1: (0,)}, (also,))]
        with pytest.raises(InputError, match=f"scores: expert config: also: {also}: the model"):
            choose_experts(SelectConfig(), given, shape)
    # Together they are what is there.
    check_select(SelectConfig(also=("non_expert_modules",)), tied, "float32")


def test_every_parameter_belongs_to_a_part_but_for_constants():
    assert roles_of(RATE_PARTS) == set(Role) - CONSTANTS
    assert part_of(Role.ROUTER, {"non_expert_modules", "router"}) == "router"
    assert part_of(Role.SELECTION_BIAS, RATE_PARTS) is None


def test_groups_come_from_other_scores_where_they_are_named(scores, tmp_path):
    together = np.zeros((3, 8, 8), np.int64)
    for a in range(4):  # i and 7 - i always come together
        for i, j in (a, a), (a, 7 - a), (7 - a, a), (7 - a, 7 - a):
            together[:, i, j] = 5
    ExpertScores(scores.layers, scores.token, scores.gate, together=together).save(tmp_path)
    select = SelectConfig(top_k=2, group_size=2, groups_from=str(tmp_path))
    for ids in choose_experts(select, [scores]).experts.values():
        assert sum(ids) == 7
    random = SelectConfig(top_k=4, group_size=2, groups_from=str(tmp_path), random_seed=0)
    for ids in choose_experts(random, [scores]).experts.values():
        assert {7 - i for i in ids} == set(ids) and len(ids) == 4
    with pytest.raises(InputError, match="the scores do not say which experts are chosen together"):
        choose_experts(SelectConfig(group_size=2), [scores])


def test_tasks_that_do_not_fit(model, scores):
    other = ExpertScores((1, 2), scores.token[:2], scores.gate[:2])
    with pytest.raises(InputError, match="b: scores of another model than a"):
        choose_experts(SelectConfig(scores=("a", "b")), [scores, other])
    expected = "scores of 8 experts in layers 1 to 2; the model has 8 in 1 to 3"
    with pytest.raises(InputError, match=expected):
        choose_experts(SelectConfig(), [other], model)
    with pytest.raises(InputError, match="a: expert config: layer 1: expert 8 is out of range"):
        choose_experts(SelectConfig(scores=("a",)), [ExpertConfig({1: (8,)})], model)
    # Without a model, by the scores beside it.
    for given, message in (
        (ExpertConfig({1: (8,)}), "b: expert config: layer 1: expert 8 is out of range"),
        (ExpertConfig({7: (0,)}), "b: expert config: layer 7 is no MoE layer"),
    ):
        with pytest.raises(InputError, match=message):
            choose_experts(SelectConfig(scores=("a", "b")), [scores, given])
    with pytest.raises(InputError, match="select.group_size: 3 does not divide the model's 8"):
        check_select(SelectConfig(group_size=3), model, "float32")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "token score, p = 0.2"),
        ({"method": "gate"}, "gate score, p = 0.1"),
        ({"method": "gate_share"}, "gate share, p = 0.2"),
        ({"top_k": 4, "group_size": 2}, "token score, 4 per layer, groups of 2"),
        ({"max_bytes": 12345}, "token score, at most 12,345 bytes"),
        (
            {"method": "gate_taylor", "max_parameters": 12345, "allocation": "uniform"},
            "gate-Taylor score, at most 12,345 parameters, as many in each layer",
        ),
        (
            {"method": "contribution", "max_bytes": 99, "allocation": "top_p"},
            "contribution, at most 99 bytes, the same p in each layer",
        ),
        (
            {"scores": ("a", "b"), "random_seed": 1},
            "token score, p = 0.2, union of 2 tasks, replaced by as many random ones (seed 1)",
        ),
    ],
)
def test_rules_in_words(keys, words):
    assert describe(SelectConfig(**keys)) == words


def test_scores_of_several_bases_do_not_mix(model, scores):
    def of(**provenance: str) -> ExpertScores:
        return ExpertScores(scores.layers, scores.token, scores.gate, provenance)

    select = SelectConfig(top_k=1, scores=("a", "b"))
    one, other, old = of(base_fingerprint="1" * 64), of(base_fingerprint="2" * 64), of()
    choose_experts(select, [one, old])
    with pytest.raises(InputError, match="b: base_fingerprint: measured on another base"):
        choose_experts(select, [one, other])
    with pytest.raises(InputError, match="c: base_fingerprint: measured on another base"):
        choose_experts(SelectConfig(top_k=1, scores=("a", "b", "c")), [old, one, other])
    here = of(config_fingerprint=model.fingerprint)
    choose_experts(select, [here, old], model)
    with pytest.raises(InputError, match="b: config_fingerprint: measured on another base"):
        choose_experts(select, [old, of(config_fingerprint="3" * 64)], model)
