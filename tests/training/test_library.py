"""The step as a library: own loops, own optimizers, own losses."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import esft_jax
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.data.batch import Batch
from esft_jax.errors import InputError

ROOT = Path(__file__).parents[2]
EXPERTS = ExpertConfig({1: (3,), 3: (1, 6)})


def own_loops() -> list[str]:
    """Programs of the README that make their own loop."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    return [block for block in blocks if "make_train_step" in block]


def test_the_loop_of_the_readme_runs_as_printed(base, chats, tmp_path, monkeypatch, capsys) -> None:
    (program,) = own_loops()
    for name, target in {"models/tiny-moe": base, "data/intent/train.jsonl": chats}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.symlink_to(target)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(program, "README.md", "exec"), names)
    first = float(
        names["loss"](esft_jax.load_model(base), next(esft_jax.eval_batches(names["data"], 8)))[0]
    )
    assert 0 < float(capsys.readouterr().out) < first / 8  # of which every row weighs 1
    loaded = esft_jax.load_base(base, "float32")
    adapter = esft_jax.load_adapter("my-adapter")
    assert adapter.expert_cfg == names["experts"]
    esft_jax.apply_adapter(loaded.model, adapter, loaded.fingerprint)
    tokens = np.arange(3, 20, dtype=np.int32)[None]
    np.testing.assert_allclose(
        loaded.model(tokens).logits, names["model"](tokens).logits, atol=1e-5
    )


@pytest.fixture(scope="module")
def parts(base):
    """Structure, tuned and frozen parameters."""
    model = esft_jax.load_model(base)
    esft_jax.attach_tuned_experts(model, EXPERTS)
    return esft_jax.partition(model, EXPERTS)


@pytest.fixture(scope="module")
def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(3, 4096, (4, 16)).astype(np.int32)
    weights = np.arange(64).reshape(4, 16) % 7 > np.arange(4)[:, None]  # uneven in the rows
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        segment_ids=np.ones_like(tokens),
        positions=np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape),
        loss_weights=weights.astype(np.float32),
    )


def one_step(parts, batch, optimizer, **options):
    graph, tuned, frozen = parts
    state = esft_jax.init_state(optimizer, tuned, frozen)
    step = jax.jit(esft_jax.make_train_step(graph, optimizer, **options))
    return state, *step(state, frozen, batch)


OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), 0),
    "adam": (optax.adam(1e-3), 2),
    "masked": (
        optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        2,
    ),
    "accumulating": (optax.MultiSteps(optax.lion(1e-3), 1).gradient_transformation(), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_state_for_the_tuned_partition_only(parts, name) -> None:
    _, tuned, frozen = parts
    optimizer, copies = OPTIMIZERS[name]
    state = jax.eval_shape(lambda t: esft_jax.init_state(optimizer, t, frozen), tuned)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == copies * sum(leaf.size for leaf in jax.tree.leaves(tuned))
    # Done before, it is done once.
    once = esft_jax.tuned_only(optimizer)
    again = jax.eval_shape(lambda t: esft_jax.init_state(once, t, frozen), tuned)
    assert jax.tree.structure(again) == jax.tree.structure(state)


def test_plain_gradient_descent_is_what_optax_says(parts, batch) -> None:
    graph, tuned, frozen = parts
    _, after, _ = one_step(parts, batch, optax.sgd(0.1))

    def mean(tuned: nnx.State) -> jax.Array:
        total, weight = esft_jax.token_loss(nnx.merge(graph, tuned, frozen), batch)
        return total / weight

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, tuned, jax.jit(jax.grad(mean))(tuned))
    jax.tree.map(
        lambda found, it: np.testing.assert_allclose(found, it, atol=1e-6), after.tuned, expected
    )


def test_an_own_loss_is_its_sum_over_its_weight(parts, batch) -> None:
    """However the batch falls on micro-batches, and whatever the scale of the weights."""

    def half(model, batch):
        total, weight = esft_jax.token_loss(model, batch)
        return total / 512, weight / 512  # less than 1 in all

    optimizer = optax.sgd(0.1)
    _, plain, expected = one_step(parts, batch, optimizer)
    for micro_batches in 1, 2:
        _, after, found = one_step(parts, batch, optimizer, loss=half, micro_batches=micro_batches)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
        assert found["loss_weight"] == batch["loss_weights"].sum() / 512
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6),
            after.tuned,
            plain.tuned,
        )


def test_a_batch_without_any_weight_is_no_update_of_the_experts(parts, batch) -> None:
    nothing = batch | {"loss_weights": np.zeros_like(batch["loss_weights"])}
    for options in {}, {"loss": lambda model, batch: esft_jax.token_loss(model, batch)}:
        before, after, metrics = one_step(parts, nothing, optax.sgd(0.1), **options)
        assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
        jax.tree.map(np.testing.assert_array_equal, before.tuned, after.tuned)


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [
        (lambda model, batch: model(batch["tokens"]).logits.sum(), "ArrayImpl|Tracer"),
        (lambda model, batch: (jnp.ones(4), jnp.ones(())), r"\[\(4,\), \(\)\]"),
        (lambda model, batch: None, "NoneType"),
    ],
)
def test_a_loss_that_gives_something_else_is_refused(parts, batch, loss, shapes) -> None:
    with pytest.raises(InputError, match=f"loss: gives a .*({shapes}).*; expected two scalars"):
        one_step(parts, batch, optax.sgd(0.1), loss=loss)


def test_what_is_known_of_the_default_loss_only_is_refused_for_others(parts) -> None:
    for options in {"balance_weight": 0.1}, {"sources": ("one", "other")}:
        with pytest.raises(InputError, match=f"loss: {next(iter(options))} is for the default"):
            esft_jax.make_train_step(
                parts[0], optax.sgd(1.0), loss=lambda model, batch: (0, 1), **options
            )
