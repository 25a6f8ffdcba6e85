"""This package's contender of `train_step.py`, and the inputs that all contenders share.

It is made of what `esft_jax.train` itself runs, on a mesh of one device.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import Measured, run_steps

import esft_jax
from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.checkpoint.export import save_model
from esft_jax.families import load_model_config
from esft_jax.model import Transformer
from esft_jax.optimizer_config import OptimizerConfig
from esft_jax.sharding import make_mesh, place_batch
from esft_jax.training.optimizer import make_optimizer
from esft_jax.training.state import place_state
from esft_jax.training.step import jit_train_step, make_eval_step, make_train_step


def prepare(
    folder: Path, config: dict[str, Any], batch: tuple[int, int], count: int, shares: list[int]
) -> dict[str, float]:
    """Write a randomly initialised model, `count` batches, and experts to tune.

    Tokens follow Zipf's law. For each share (in percent) the experts with the highest token
    scores on the batches are selected, the same number in every layer.

    Args:
        folder: receives `model/`, `batches.npz` and `experts-{share}.json`.
        config: content of `config.json`.
        batch: rows and tokens per row.

    Returns:
        For each share, the part of all assignments that go to its experts.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = Transformer(load_model_config(folder), rngs=nnx.Rngs(0))
    save_model(model, folder / "model", folder, jnp.float32)

    random = np.random.default_rng(0)
    odds = 1 / np.arange(1, config["vocab_size"] + 1)
    shape = (count, batch[0], batch[1] + 1)
    tokens = random.choice(len(odds), shape, p=odds / odds.sum()).astype(np.int32)
    np.savez(folder / "batches.npz", tokens=tokens[:, :, :-1], targets=tokens[:, :, 1:])

    scores = esft_jax.score_experts(model, [_batch(folder, i) for i in range(count)])
    shares_of_load = {}
    for share in shares:
        chosen = np.argsort(-scores.token, axis=1)[:, : round(scores.num_experts * share / 100)]
        layers = dict(zip(scores.layers, map(tuple, chosen.tolist()), strict=True))
        ExpertConfig(layers).save(folder / f"experts-{share}.json")
        load = np.take_along_axis(scores.token, chosen, axis=1).sum(axis=1)
        shares_of_load[str(share)] = float(load.mean())
    return shares_of_load


def _batch(folder: Path, index: int) -> dict[str, np.ndarray]:
    """Rows full of one document each, a loss on every token."""
    with np.load(folder / "batches.npz") as stored:
        tokens, targets = (stored[key][index % len(stored[key])] for key in ("tokens", "targets"))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": np.ones_like(tokens),
        "positions": positions,
        "loss_weights": np.ones(tokens.shape, np.float32),
    }


def measure(
    folder: Path,
    method: str,
    optimizer_config: dict[str, float],
    warmup: int,
    steps: int,
    threads: int,
    remat: str,
) -> Measured:
    """Run a method: `forward`, `full`, or `esft-{share}`.

    The number of threads follows from the cores that this process may use (`measuring.pin`).
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    model = esft_jax.load_model(folder / "model", jnp.float32, mesh)
    experts = None
    if method.startswith("esft"):
        experts = ExpertConfig.load(folder / f"experts-{method.removeprefix('esft-')}.json")
        attach_tuned_experts(model, experts)
    graph, tuned, frozen = partition(model, experts)
    del model
    batches = [place_batch(_batch(folder, i), mesh) for i in range(warmup + steps)]

    if method == "forward":
        forward = jax.jit(make_eval_step(graph)).lower(tuned, frozen, batches[0]).compile()

        def evaluate(index: int) -> tuple[float, None]:
            total, weight = forward(tuned, frozen, batches[index])
            return float(total) / float(weight), None

        return run_steps(evaluate, warmup, steps, _bytes(forward))

    optimizer = make_optimizer(OptimizerConfig(**optimizer_config), warmup + steps)
    state, shardings = place_state(optimizer, tuned, frozen, mesh)
    states = [state]
    del tuned, state  # what must live on does so in the list
    train = jit_train_step(make_train_step(graph, optimizer, remat=remat), shardings)
    compiled = train.lower(states[0], frozen, batches[0]).compile()

    def update(index: int) -> tuple[float, float]:
        state, metrics = compiled(states.pop(), frozen, batches[index])
        states.append(state)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return run_steps(update, warmup, steps, _bytes(compiled))


def _bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes
