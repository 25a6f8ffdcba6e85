"""Runs beside quantised frozen weights."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import apply_adapter, load_adapter
from esft_jax.checkpoint.convert import convert_checkpoint
from esft_jax.checkpoint.export import save_model
from esft_jax.checkpoint.load import expert_reader, load_base, open_source
from esft_jax.config import RunConfig
from esft_jax.data.pipeline import eval_batches
from esft_jax.errors import InputError
from esft_jax.evaluation.load import load_tuned
from esft_jax.ops.quantisation import Quantisation
from esft_jax.ops.quantised import Quantised, quantise
from esft_jax.planning.analysis import open_case
from esft_jax.planning.program import local_bytes
from esft_jax.training import loop
from esft_jax.training.loop import run_training
from esft_jax.training.setup import open_setup
from esft_jax.training.step import token_loss

HOW = {"experts": "int4", "rest": "int8", "group_size": 16}
KINDS = ("gate_up", "down")


def run(config: RunConfig):
    return run_training(open_setup(config), say=lambda text: None)


def quantisation(**values) -> Quantisation:
    return Quantisation(**(HOW | values))


@pytest.fixture
def config(make_config):
    config = make_config(quantise=HOW, select={"top_p": 0.3})
    train = dataclasses.replace(config.train, verify_frozen=True)
    return dataclasses.replace(config, train=train)


def loss_on(model, config) -> float:
    graph, params = nnx.split(model)
    loss = jax.jit(lambda params, batch: token_loss(nnx.merge(graph, params), batch)[0])
    batches = list(eval_batches(open_setup(config).valid_sets["task"], 4, 0, 1))
    weight = sum(batch["loss_weights"].sum() for batch in batches)
    return sum(float(loss(params, batch)) for batch in batches) / weight


def test_a_run_and_its_adapter(config) -> None:
    result = run(config)
    manifest = json.loads((result.result / "manifest.json").read_text())
    assert manifest["quantise"] == HOW
    scores = json.loads((result.folder / "scores" / "scores.json").read_text())
    assert scores["provenance"]["quantise"] == HOW
    in_full = run(dataclasses.replace(config, quantise={}, output=f"{config.output}-full"))
    assert (result.total, result.trained) == (in_full.total, in_full.trained)

    # The adapter beside the quantised base is the model that was trained.
    beside = load_tuned(config.model, result.result, np.float32, None, quantisation())
    assert loss_on(beside.model, config) == pytest.approx(result.valid_loss, rel=1e-5)
    exact = load_tuned(config.model, result.result, np.float32, None)
    assert loss_on(exact.model, config) != pytest.approx(result.valid_loss, rel=1e-5)

    with pytest.raises(InputError, match=r"holds a run with quantise.experts = 'int4', not 'int8'"):
        open_setup(dataclasses.replace(config, quantise=HOW | {"experts": "int8"}))


def test_low_rank_updates_beside_quantised_weights(config) -> None:
    lora = {"rank": 2, "targets": ("attention", "shared_experts", "selected_experts")}
    config = dataclasses.replace(config, method="lora", lora=lora)
    result = run(config)
    beside = load_tuned(config.model, result.result, np.float32, None, quantisation())
    attention = beside.model.moe_blocks.attentions[0]
    assert isinstance(attention.out.get_value(), Quantised)
    assert loss_on(beside.model, config) == pytest.approx(result.valid_loss, rel=1e-5)


def test_what_is_trained_begins_in_full_precision(config, base) -> None:
    setup = open_setup(config)
    model = setup.load_base()
    experts = ExpertConfig(dict.fromkeys(model.config.moe_layers[1:], (5, 2)))
    loop.attach(model, experts, 0, read=expert_reader(setup.base.source))
    exact = load_base(base, np.float32).model.moe_blocks.moe.experts
    for kind in KINDS:
        bank = np.asarray(getattr(model.tuned_experts, kind)[...])
        for layer, expert, row in model.tuned_experts.layout.rows():
            np.testing.assert_array_equal(bank[row], getattr(exact, kind)[...][layer, expert])


def test_frozen_weights_are_the_nearest_numbers_on_any_mesh(config, base) -> None:
    one = load_base(base, np.float32, None, quantisation()).model
    split = open_setup(config).load_base()
    exact = load_base(base, np.float32).model
    for path in ("moe_blocks.moe.experts.gate_up", "moe_blocks.moe.experts.down",
                 "moe_blocks.attentions.0.out", "dense_blocks.mlp.down"):  # fmt: skip
        found, other, whole = (_leaf(model, path) for model in (one, split, exact))
        scheme = "int4" if "experts" in path else "int8"
        nearest = quantise(jnp.asarray(whole), scheme, 16)
        jax.tree.map(np.testing.assert_array_equal, found, nearest)
        jax.tree.map(np.testing.assert_array_equal, other, nearest)
    for path in ("embedding", "moe_blocks.moe.router.weight"):
        np.testing.assert_array_equal(_leaf(one, path), _leaf(exact, path))


def test_a_run_reads_what_a_converted_base_keeps(config, base, tmp_path) -> None:
    folder = tmp_path / "converted"
    convert_checkpoint(base, folder, quantisations=[quantisation()])
    kept, split = (
        open_setup(dataclasses.replace(config, model=str(path), output=f"{tmp_path / 'run'}"))
        for path in (folder, base)
    )
    assert [line for line in kept.describe() if line.startswith("quantise")] == [
        f"quantise.experts: read from {folder / 'quantised' / 'experts-int4-16'}",
        f"quantise.rest: read from {folder / 'quantised' / 'rest-int8-16'}",
    ]
    assert not [line for line in split.describe() if line.startswith("quantise")]
    found, expected = (nnx.state(setup.load_base()) for setup in (kept, split))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _leaf(model, path):
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model.get_value()


def test_parts_that_are_trained_are_not_quantised(make_config) -> None:
    config = make_config(
        quantise=HOW, select={"top_p": 0.3, "also": ["attention", "shared_experts"]}
    )
    model = open_setup(config).load_base()
    assert not isinstance(_leaf(model, "moe_blocks.attentions.0.out"), Quantised)
    assert not isinstance(_leaf(model, "moe_blocks.moe.shared_experts.down"), Quantised)
    assert isinstance(_leaf(model, "dense_blocks.mlp.down"), Quantised)
    result = run(config)
    beside = load_tuned(config.model, result.result, np.float32, None, quantisation())
    assert loss_on(beside.model, config) == pytest.approx(result.valid_loss, rel=1e-5)


def test_no_bank_in_full_precision_is_in_the_step(config, monkeypatch) -> None:
    compiled = []

    def keep_step(run: loop._Run, stopped, trackers):
        compiled.append((run.train_step.as_text(), run.frozen))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "train", keep_step)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    text, frozen = compiled[0]
    model = open_setup(config).base.config
    per_device = model.router.num_experts // 2
    layers, (size, width) = len(model.moe_layers), (model.hidden_size, model.expert_width)
    for matrix in (f"{size},{2 * width}", f"{width},{size}"):
        for stack in (f"{layers},{per_device}", f"{layers * per_device}", f"{per_device}"):
            assert not re.search(rf"\b(f32|bf16)\[{stack},{matrix}\]", text)
    assert re.search(rf"\bu8\[{layers},{per_device},{size // 2},{2 * width}\]", text)

    packed = sum(
        leaf.get_value().codes.nbytes + leaf.get_value().scales.nbytes
        for _, leaf in nnx.to_flat_state(frozen)
        if isinstance(leaf.get_value(), Quantised)
    )
    others = sum(
        leaf.get_value().nbytes
        for _, leaf in nnx.to_flat_state(frozen)
        if not isinstance(leaf.get_value(), Quantised)
    )
    output = f"{config.output}-planned"  # the run's folder has its experts
    given = dataclasses.replace(config, output=output, mesh={"data": 1}, train={"batch_size": 1})
    shapes = open_case(given, "cpu:1", experts_per_layer=2).shapes()
    assert local_bytes(shapes.frozen) == packed + others


def test_refusals(make_config, base, tmp_path) -> None:
    with pytest.raises(ValueError, match="quantise: method full freezes nothing"):
        make_config(method="full", quantise=HOW)
    with pytest.raises(ValueError, match=r"quantise.group_size: nothing is quantised"):
        make_config(quantise={"group_size": 32})
    model = load_base(base, np.float32, None, quantisation()).model
    with pytest.raises(InputError, match="save_model: the model holds quantised weights"):
        save_model(model, tmp_path / "saved", base)
    with pytest.raises(ValueError, match="expected a way to read full precision"):
        loop.attach(model, ExpertConfig({model.config.moe_layers[0]: (0,)}), 0)


def test_weights_that_are_not_finite_are_named(base, tmp_path) -> None:
    source = open_source(base)
    name = next(name for name in source.placements if ".experts.3." in name)
    read = type(source).tensor

    class Broken(type(source)):
        def tensor(self, asked, index=()):
            found = np.array(read(self, asked, index))
            if asked == name:
                found[0, 0] = np.nan
            return found

    source.__class__ = Broken
    from esft_jax.checkpoint.load import load_source

    with pytest.raises(InputError, match=rf"not finite: {re.escape(name)}"):
        load_source(source, "base", np.float32, None, quantisation())


def test_a_released_adapter_beside_quantised_experts(base, config) -> None:
    result = run(config)
    model = load_base(base, np.float32, None, quantisation()).model
    apply_adapter(model, load_adapter(result.result), None)
    assert model.tuned_experts is not None
