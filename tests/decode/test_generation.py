import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esft_jax.data.tokenizer import Tokenizer
from esft_jax.decode import generation as generate
from esft_jax.decode.generation import choose_tokens, generate_text, generate_tokens
from esft_jax.errors import InputError
from esft_jax.model.config import (
    LatentAttentionConfig,
    ModelConfig,
    RopeConfig,
    RouterConfig,
    YarnConfig,
)
from esft_jax.model.transformer import Transformer
from esft_jax.sharding import make_mesh, param_shardings

VOCABULARY = 23
CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_layers=2,
    moe_layers=(1,),
    dense_width=16,
    expert_width=8,
    shared_width=8,
    shared_gate=False,
    attention=LatentAttentionConfig(
        heads=2,
        query_rank=None,
        latent=8,
        plain=8,
        rotated=4,
        value=8,
        bias=False,
        scale=12**-0.5,
    ),
    max_positions=40,
    norm_eps=1e-6,
    tie_embeddings=False,
    router=RouterConfig(num_experts=8, top_k=2),
    rope=RopeConfig(10000.0, 4, "interleaved", YarnConfig(4.0, 10, mscale=0.7, mscale_all_dim=0.7)),
)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13, 3, 2]]
NEW = 8
NEVER = 0  # an id that greedy decoding never produces here


def random_model(seed, mesh=None):
    """A model of normal random numbers whose greedy decoding never produces `NEVER`."""
    model = nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0), mesh=mesh))
    graph, params = nnx.split(model)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32), params)
    params["head"][...][:, NEVER] = 0
    return nnx.merge(graph, jax.device_put(params, param_shardings(params, mesh)))


@pytest.fixture(scope="module")
def model():
    return random_model(7)


@pytest.fixture(scope="module")
def recompute(model):
    """Greedy decoding by running the whole sequence again for every token."""
    graph, params = nnx.split(model)
    forward = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs).logits)

    def run(prompt, steps):
        tokens, length = np.zeros((1, 40), np.int32), len(prompt)
        tokens[0, :length] = prompt
        for end in range(length, length + steps):
            logits = forward(params, tokens, (np.arange(40) < end).astype(np.int32)[None])
            tokens[0, end] = logits[0, end - 1].argmax()
        return tokens[0, length : length + steps].tolist()

    return run


@pytest.fixture(scope="module")
def greedy(recompute):
    return [recompute(prompt, NEW) for prompt in PROMPTS]


def decode(model, prompts=PROMPTS, **options):
    options = {"stop_ids": [NEVER], "max_new_tokens": NEW, **options}
    return generate_tokens(model, prompts, **options)


def test_greedy_equals_running_the_whole_sequence_again(model, greedy):
    assert all(NEVER not in ids for ids in greedy)
    assert len(set(map(tuple, greedy))) == len(PROMPTS)
    assert decode(model) == greedy


def test_stops_before_eos(model, greedy):
    eos = greedy[1][2]
    expected = [ids[: ids.index(eos)] if eos in ids else ids for ids in greedy]
    assert decode(model, stop_ids=[eos]) == expected
    assert min(map(len, expected)) <= 2 < max(map(len, expected))


def test_stops_at_each_of_several_tokens(model, greedy):
    """One that only the second row meets, and one that only the first does."""
    stops = [NEVER, greedy[1][2], greedy[0][3]]
    ends = [next((n for n, i in enumerate(ids) if i in stops), NEW) for ids in greedy]
    assert {ids[end] for ids, end in zip(greedy, ends, strict=True) if end < NEW} == {*stops[1:]}
    expected = [ids[:end] for ids, end in zip(greedy, ends, strict=True)]
    assert decode(model, stop_ids=stops) == expected
    assert decode(model, stop_ids=stops[::-1], stop=lambda ids: False) == expected


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_p": 0.9}])
def test_completions_that_need_no_more_are_stopped(model, monkeypatch, sampling):
    """Now and then: after blocks of three tokens here, and the others go on as they were."""
    whole = decode(model, **sampling)
    word = whole[0][1]
    monkeypatch.setattr(generate, "_STOP_BLOCK", 3)
    found = decode(model, stop=lambda ids: word in ids, **sampling)
    for ids, all_ids in zip(found, whole, strict=True):
        length = next((n for n in (3, 6) if word in all_ids[:n]), NEW)
        assert ids == all_ids[:length]
    assert len(found[0]) == 3
    assert decode(model, stop=lambda ids: False, **sampling) == whole


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_p": 0.9}])
def test_batches_and_neighbours_do_not_matter(model, sampling):
    more = [*PROMPTS, list(range(1, 21))]  # makes a wider batch, and a batch of one prompt
    done = []
    completions = decode(model, more, batch_size=4, advance=done.append, **sampling)
    assert completions[:4] == decode(model, **sampling)
    assert done == [4, 1]


def test_a_long_prompt_is_run_in_blocks(model, recompute, monkeypatch):
    monkeypatch.setattr(generate, "_PREFILL_BLOCK", 8)
    prompts = [list(range(1, 21)), [3, 2, 1]]
    expected = [recompute(prompt, 5) for prompt in prompts]
    assert decode(model, prompts, max_new_tokens=5) == expected


def test_a_mesh_changes_nothing(greedy):
    mesh = make_mesh(2, 2, jax.devices()[:4])
    prompts, expected = PROMPTS[:3], greedy[:3]  # not a multiple of the devices
    assert decode(random_model(7, mesh), prompts) == expected


def test_no_expert_computes_padding_or_finished_rows(model, greedy, monkeypatch):
    kept = []
    run = Transformer.decode

    def spy(self, tokens, positions, keep, *rest):
        jax.debug.callback(lambda keep: kept.append(keep.sum(axis=1).tolist()), keep, ordered=True)
        return run(self, tokens, positions, keep, *rest)

    monkeypatch.setattr(Transformer, "decode", spy)
    eos = greedy[0][1]  # in no other row's first two tokens
    assert all(eos not in ids[:2] for ids in greedy[1:])
    decode(model, [PROMPTS[1], PROMPTS[0]], stop_ids=[eos], max_new_tokens=3)
    jax.effects_barrier()
    assert kept == [[6, 2], [1, 1], [1, 1], [1, 0]]


def test_samples_depend_on_the_seed_alone(model):
    draws = [decode(model, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    twins = decode(model, [[1, 2, 3]] * 4, temperature=2.0)
    assert len(set(map(tuple, twins))) == 4


@pytest.mark.parametrize("sampling", [{"top_p": 1e-6}, {"temperature": 1e-6}])
def test_the_narrow_ends_of_sampling_are_greedy(model, greedy, sampling):
    assert decode(model, **{"temperature": 1.0, **sampling}) == greedy


def test_draws_follow_the_nucleus():
    probs = np.array([0.1, 0.4, 0.2, 0.3])
    draws = 4000
    keys = jax.random.split(jax.random.key(0), draws)
    logits = jnp.broadcast_to(jnp.log(probs), (draws, 4))

    def frequencies(temperature, top_p):
        tokens = choose_tokens(logits, keys, jnp.int32(3), (temperature, top_p))
        return np.bincount(tokens, minlength=4) / draws

    np.testing.assert_allclose(frequencies(1.0, 1.0), probs, atol=0.03)
    # .4 and .3 do not reach .75, with .2 they do
    np.testing.assert_allclose(frequencies(1.0, 0.75), [0, 4 / 9, 2 / 9, 3 / 9], atol=0.03)
    square = probs**2 / (probs**2).sum()
    np.testing.assert_allclose(frequencies(0.5, 1.0), square, atol=0.03)


def test_nothing_to_complete(model):
    assert decode(model, []) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompts": [[1], [1] * 33]},
            "prompt 1: 33 tokens and 8 new ones; the model's limit is 40",
        ),
        ({"prompts": [[1], []]}, "prompt 1: no tokens; expected at least one"),
        ({"prompts": [[1], [2, 99999]]}, "prompt 1: tokens from 2 to 99999; the model has"),
        ({"prompts": [[-1]]}, "prompt 0: tokens from -1 to -1; the model has"),
        ({"seed": 2**63}, f"seed: {2**63} is out of range"),
        ({"stop_ids": []}, "stop_ids: is empty; expected at least one token"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is out of range; expected at least 1"),
        ({"batch_size": 0}, "batch_size: 0 is out of range; expected at least 1"),
        ({"temperature": -1.0}, "temperature: -1.0 is out of range; expected a number from 0"),
        ({"temperature": float("nan")}, "temperature: nan is out of range"),
        ({"top_p": 0.0}, "top_p: 0.0 is out of range; expected a number in (0, 1]"),
    ],
)
def test_bad_input_is_named(model, change, message):
    with pytest.raises(InputError) as error:
        decode(model, **change)
    assert str(error.value).startswith(message)


class Letters(Tokenizer):
    """A tokenizer of one id per letter."""

    stop_ids = (NEVER,)

    def __init__(self):
        """No backend."""

    def encode_text(self, text):
        return [22, *(ord(letter) - ord("a") + 1 for letter in text)]

    def encode_user(self, text):
        return self.encode_text("u" + text)

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_texts_are_answered_as_turns_or_continued(model):
    texts = ["ab", "c", "de", "f"]  # "u" is what the chat template of `Letters` adds

    def joined(prompts):
        return [" ".join(map(str, ids)) for ids in decode(model, prompts)]

    turns = joined([[22, 21, 1, 2], [22, 21, 3], [22, 21, 4, 5], [22, 21, 6]])
    assert generate_text(model, Letters(), texts, max_new_tokens=NEW) == turns
    plain = joined([[22, 1, 2], [22, 3], [22, 4, 5], [22, 6]])
    assert generate_text(model, Letters(), texts, raw=True, max_new_tokens=NEW) == plain
    assert turns != plain
