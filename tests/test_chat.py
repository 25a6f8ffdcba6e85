"""A conversation in the terminal."""

import io

import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax import chat
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import apply_adapter, load_adapter, save_adapter, trained_names
from esft_jax.checkpoint.load import load_base
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.decode import generation
from esft_jax.decode.generation import generate_tokens

NEW = 6


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """The experts of two layers, changed enough to be heard."""
    loaded, every = load_base(base, jnp.float32), tuple(range(8))
    experts, rng = ExpertConfig({1: every, 3: every}), np.random.default_rng(0)
    names = trained_names(loaded.source.config, experts, "")
    shapes = [(name, loaded.source.tensor(name).shape) for name in names]
    tensors = [(name, rng.normal(0, 1, shape).astype(np.float32)) for name, shape in shapes]
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(folder, tensors, experts, {"base_fingerprint": loaded.fingerprint})
    return folder


@pytest.fixture
def talk(base, monkeypatch, capsys):
    def run(lines, *options, code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        arguments = ["--model", str(base), "--max-new-tokens", str(NEW), *map(str, options)]
        assert chat.main(arguments) == code
        found = capsys.readouterr()
        return found.out if code == 0 else found.err

    return run


def answers(base, adapter, turns, system=None):
    """What a model says to each turn of a conversation, by the library."""
    loaded, tokenizer = load_base(base, jnp.float32), Tokenizer.load(base)
    if adapter is not None:
        apply_adapter(loaded.model, load_adapter(adapter), loaded.fingerprint)
    messages = [] if system is None else [{"role": "system", "content": system}]
    found = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        prompt = tokenizer.encode_prompt(messages)
        (ids,) = generate_tokens(
            loaded.model, [prompt], stop_ids=tokenizer.stop_ids, max_new_tokens=NEW
        )
        found.append(tokenizer.decode(ids))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def test_turns_follow_one_another_until_they_are_forgotten(base, talk, monkeypatch):
    monkeypatch.setattr(generation, "_STOP_BLOCK", 4)  # answers are shown while they grow
    turns = ["2 + 2 =", "And then?"]
    expected = answers(base, None, turns, system="Be brief.")
    again = answers(base, None, turns[1:], system="Be brief.")
    assert again != expected[1:]
    lines = [turns[0], "", turns[1], "/reset", turns[1], "/nothing", "/quit", "unheard"]
    said = "/nothing: unknown; expected /reset or /quit"
    assert talk(lines, "--system", "Be brief.") == "\n".join([*expected, *again, said, ""])


def test_base_and_adapter_are_asked_side_by_side(base, adapter, talk):
    turns = ["2 + 2 =", "And then?"]
    both = answers(base, None, turns), answers(base, adapter, turns)
    assert both[0][0] != both[1][0]
    lines = [f"base: {one} adapter: {other}" for one, other in zip(*both, strict=True)]
    assert talk(turns, "--adapter", adapter, "--beside-base").split() == " ".join(lines).split()
    assert talk(turns, "--adapter", adapter) == "\n".join([*both[1], ""])


def test_a_conversation_that_is_too_long_is_said_and_goes_on(base, talk):
    (answer,) = answers(base, None, ["2 + 2 ="])
    long, after = talk(["word " * 130, "2 + 2 ="]).split("\n", 1)
    assert long.startswith("conversation: ") and long.endswith("; /reset begins anew")
    assert after == f"{answer}\n"


def test_what_is_asked_for_in_vain_is_named(talk):
    assert "--beside-base: there is the base alone" in talk([], "--beside-base", code=2)
