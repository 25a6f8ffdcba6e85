"""What the worker extension loads, without vLLM; with it, see `tests/families/test_vllm.py`."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from esft_jax.errors import InputError
from esft_jax.serving.vllm import ExpertAdapters, switch_adapter

PREFIX = "model.layers.{}.mlp.experts.{}"
MATRICES = "gate_proj", "up_proj", "down_proj"


class Worker(ExpertAdapters):
    """A worker that remembers what it was given last."""

    def __init__(self, base):
        model_config = SimpleNamespace(model=str(base), revision=None)
        self.vllm_config = SimpleNamespace(model_config=model_config)
        self.device = SimpleNamespace(type="cpu")
        self.method = SimpleNamespace(moe_kernel="of the weights before")
        self.given = None

    def get_model(self):
        modules = [SimpleNamespace(quant_method=self.method), SimpleNamespace()]
        return SimpleNamespace(modules=lambda: modules)

    def reload_weights(self, weights_iterator):
        assert self.method.moe_kernel is None
        self.given = {name: tensor.numpy() for name, tensor in weights_iterator}


def names(layer, experts=range(8)):
    return {
        f"{PREFIX.format(layer, expert)}.{matrix}.weight"
        for expert in experts
        for matrix in MATRICES
    }


def write_adapter(folder, tensors):
    folder.mkdir()
    (folder / "expert_cfg.json").write_text(json.dumps({"experts": {}}))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tensors(base):
    """Of the base."""
    return load_file(base / "model.safetensors")


@pytest.fixture
def worker(base):
    pytest.importorskip("torch", reason="needs torch, as vLLM does")
    return Worker(base)


def test_whole_layers_are_loaded_of_those_that_change(worker, tensors, tmp_path):
    one = {name: 2 * tensors[name] for name in names(1, [0, 5])}
    other = {name: 3 * tensors[name] for name in names(2, [1])}
    write_adapter(tmp_path / "one", one)
    # As those that the authors of ESFT released: without the prefix.
    short = {name.removeprefix("model."): tensor for name, tensor in other.items()}
    write_adapter(tmp_path / "other", short)

    def given(tuned, layers):
        assert worker.given.keys() == set().union(*map(names, layers))
        for name, tensor in worker.given.items():
            np.testing.assert_array_equal(tensor, tuned.get(name, tensors[name]), name)

    worker.unload_esft_adapter()
    assert worker.given is None
    worker.load_esft_adapter(str(tmp_path / "one"))
    given(one, [1])
    worker.load_esft_adapter(str(tmp_path / "other"))
    given(other, [1, 2])
    worker.load_esft_adapter(str(tmp_path / "other"))
    given(other, [2])
    worker.unload_esft_adapter()
    given({}, [2])


def test_what_cannot_be_loaded_is_named(worker, base, tensors, tmp_path):
    def refused(name, content, message):
        folder = write_adapter(tmp_path / name, content)
        with pytest.raises(InputError, match=message):
            worker.load_esft_adapter(str(folder))
        assert worker.given is None

    gate = min(names(1))
    refused("wide", {gate: tensors[gate][:1]}, r"has shape \[1, 16\]; the engine's model has \[32,")
    router = "model.layers.1.mlp.gate.weight"
    refused("router", {router: tensors[router]}, "gate.weight' is of no routed expert of the")
    with pytest.raises(InputError, match="nowhere: has no expert_cfg.json"):
        worker.load_esft_adapter(str(tmp_path / "nowhere"))
    for change, message in (
        (lambda name: name.replace(".experts.", ".mixture."), "holds no experts by names of their"),
        (
            lambda name: name.replace("1.mlp.experts.0.gate_proj.weight", "1.mlp.experts.0.scale"),
            "of quantised experts; expected an export",
        ),
    ):
        copy = shutil.copytree(base, tmp_path / f"base{len(message)}")
        save_file({change(n): t for n, t in tensors.items()}, copy / "model.safetensors")
        with pytest.raises(InputError, match=message):
            Worker(copy).load_esft_adapter(str(tmp_path / "wide"))


def test_an_engine_that_is_in_use_is_said(tmp_path):
    calls = []
    engine = SimpleNamespace(
        collective_rpc=lambda method, args=(): calls.append((method, *args)),
        reset_prefix_cache=lambda: len(calls) < 2,
    )
    switch_adapter(engine, tmp_path / "x" / ".." / "one")
    with pytest.raises(RuntimeError, match="the prefix cache is in use"):
        switch_adapter(engine, None)
    assert calls == [("load_esft_adapter", str(tmp_path / "one")), ("unload_esft_adapter",)]


def test_needs_no_jax():
    absent = "import sys; sys.modules.update(dict.fromkeys(('jax', 'flax', 'vllm', 'torch')))"
    code = f"{absent}; import esft_jax.serving.vllm"
    subprocess.run([sys.executable, "-c", code], check=True)
