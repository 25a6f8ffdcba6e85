"""A run of `method: lora`, from scores to an adapter, stopped and continued on another mesh."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import apply_adapter, load_adapter
from esft_jax.checkpoint.load import load_base
from esft_jax.data.pipeline import eval_batches
from esft_jax.errors import InputError
from esft_jax.training.loop import run_training
from esft_jax.training.setup import open_setup
from esft_jax.training.step import token_loss

LORA = {"rank": 2, "alpha": 8.0, "targets": ("attention", "shared_experts", "selected_experts")}


def run(config):
    return run_training(open_setup(config), say=lambda text: None)


def steps(config, count, **changes):
    train = dataclasses.replace(config.train, steps=count)
    return dataclasses.replace(config, train=train, **changes)


def factors(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def config(make_config):
    config = make_config(method="lora", lora=LORA, select={"top_p": 0.3})
    train = dataclasses.replace(config.train, verify_frozen=True)
    return dataclasses.replace(config, train=train)


@pytest.mark.parametrize("masters", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_and_its_adapter(config, masters) -> None:
    optimizer = dataclasses.replace(config.optimizer, masters=masters)
    config = dataclasses.replace(config, optimizer=optimizer)
    result = run(config)
    stored, selected = factors(result.folder), result.experts
    assert {tensor.dtype.name for tensor in stored.values()} == {masters}
    assert ExpertConfig.load(result.folder / "expert_cfg.json") == selected
    assert sum(tensor.size for tensor in stored.values()) == result.trained
    experts = {name.partition(".lora_")[0] for name in stored if ".mlp.experts." in name}
    assert len(experts) == 3 * selected.num_experts_selected
    assert all(np.any(tensor != 0) for name, tensor in stored.items() if "_B" in name)
    manifest = json.loads((result.result / "manifest.json").read_text())
    assert (manifest["select"]["top_p"], manifest["step"]) == (0.3, 4)

    # The adapter, merged into its base, is the model that was trained.
    base = load_base(config.model, np.float32)
    apply_adapter(base.model, load_adapter(result.result), base.fingerprint)
    graph, params = nnx.split(base.model)
    loss = jax.jit(lambda params, batch: token_loss(nnx.merge(graph, params), batch)[0])
    batches = list(eval_batches(open_setup(config).valid_sets["task"], 4, 0, 1))
    weight = sum(batch["loss_weights"].sum() for batch in batches)
    merged = sum(float(loss(params, batch)) for batch in batches) / weight
    assert merged == pytest.approx(result.valid_loss, rel=1e-5)

    with pytest.raises(InputError, match=r"holds a run with lora.rank = 2, not 3"):
        open_setup(dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=3)))


@pytest.mark.slow
def test_a_run_continues_on_another_mesh(config, tmp_path) -> None:
    """Where rows and base experts lie elsewhere."""
    result, again = run(config), dataclasses.replace(config, output=str(tmp_path / "again"))
    stored = factors(result.folder)
    run(steps(again, 2))
    moved = run(steps(again, 4, mesh=dataclasses.replace(config.mesh, data=1, expert=4)))
    assert moved.step == result.step == 4
    continued = factors(moved.folder)
    assert continued.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_allclose(continued[name], tensor, atol=1e-4, err_msg=name)


def test_given_experts_are_checked(make_config, tmp_path) -> None:
    path = tmp_path / "experts.json"

    def message(experts):
        experts.save(path)
        with pytest.raises(InputError) as found:
            open_setup(make_config(method="lora", lora=LORA, expert_cfg=str(path)))
        return str(found.value)

    with pytest.raises(InputError, match="experts.json: cannot be read: No such file"):
        open_setup(make_config(expert_cfg=str(path)))  # nothing else is trained instead
    assert "trains router too; with method lora" in message(ExpertConfig({1: (0,)}, ("router",)))
    assert "layer 0 is no MoE layer" in message(ExpertConfig({0: (0,)}))
    # The same of a selection that another run has made.
    ExpertConfig({1: (0,)}, also=("shared_experts",)).save(path)
    select = {"scores": [str(path)]}
    with pytest.raises(
        InputError, match="select.scores: trains shared_experts too; with method lora"
    ):
        open_setup(make_config(method="lora", lora=LORA, select=select))
