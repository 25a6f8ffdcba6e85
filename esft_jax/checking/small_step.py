"""Updates of a small model on the device at hand, against the same in plain XLA on the CPU."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.checking.check import Finding, precision
from esft_jax.checking.kernel import Subject, documents
from esft_jax.checking.tolerance import tolerance
from esft_jax.config import RunConfig
from esft_jax.data.batch import Batch
from esft_jax.errors import InputError, RunFailed, one_line
from esft_jax.model.config import (
    AttentionConfig,
    DeltaAttentionConfig,
    GroupedAttentionConfig,
    LatentAttentionConfig,
    ModelConfig,
)
from esft_jax.ops.platform import KERNELS, fastest_implementation, portable
from esft_jax.planning.program import run_parts, step_shapes
from esft_jax.sharding import make_mesh
from esft_jax.training.optimizer import make_optimizer
from esft_jax.training.state import init_state

UPDATES = 4
TOKENS, ROWS = 128, 2
# Large enough that wrong gradients are seen in the next losses.
LEARNING_RATE = 1e-3
# What a loss or a norm adds up goes through several layers and updates, forward and backward.
DEPTH = 2
# Upper bounds of sizes. Features of heads stay as they are.
SIZE, WIDTH, WORDS, EXPERTS, TOP_K, KEY_HEADS, RATIO, LATENT, RANK = (
    *(256, 128, 512, 16, 4, 2, 4, 64, 8),
)

# For a CPU, on which most of the time would be spent on making programs fast.
_QUICKLY: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}

STEP = "training step"
# Metrics of an update that are compared.
_PARTS = {"loss": "losses", "grad_norm": "gradient norms"}


def small_model(model: ModelConfig) -> ModelConfig:
    """A model with the switches of another: one layer of each kind that it has, and one more."""
    kinds = [(layer in model.moe_layers, model.kind(layer)) for layer in range(model.num_layers)]
    chosen = sorted({kinds.index(kind) for kind in kinds})
    more = [layer for layer in model.moe_layers if layer not in chosen]
    chosen = sorted([*chosen, *more[-1:]])
    second = model.second
    if second is not None:
        layers = tuple(i for i, layer in enumerate(chosen) if layer in second.layers)
        second = dataclasses.replace(second, layers=layers, attention=_smaller(second.attention))
    router = model.router
    experts = min(router.num_experts, EXPERTS * router.num_groups)
    reachable = router.top_groups * (experts // router.num_groups)
    return dataclasses.replace(
        model,
        vocab_size=min(model.vocab_size, WORDS),
        hidden_size=min(model.hidden_size, SIZE),
        num_layers=len(chosen),
        moe_layers=tuple(i for i, layer in enumerate(chosen) if layer in model.moe_layers),
        dense_width=min(model.dense_width, 2 * SIZE),
        expert_width=min(model.expert_width, WIDTH),
        shared_width=min(model.shared_width, WIDTH),
        attention=_smaller(model.attention),
        second=second,
        router=dataclasses.replace(
            router, num_experts=experts, top_k=min(router.top_k, TOP_K, reachable)
        ),
    )


def _smaller(kind: AttentionConfig) -> AttentionConfig:
    """Fewer heads; a window that is shorter than the rows."""
    if isinstance(kind, LatentAttentionConfig):
        return dataclasses.replace(
            kind,
            heads=min(kind.heads, RATIO),
            latent=min(kind.latent, LATENT),
            query_rank=kind.query_rank and min(kind.query_rank, LATENT),
        )
    key_heads = min(kind.key_heads, KEY_HEADS)
    heads = key_heads * min(kind.heads // kind.key_heads, RATIO)
    if isinstance(kind, DeltaAttentionConfig):
        return dataclasses.replace(kind, key_heads=key_heads, heads=heads)
    assert isinstance(kind, GroupedAttentionConfig)
    window = kind.window and min(kind.window, TOKENS // 4)
    return dataclasses.replace(kind, key_heads=key_heads, heads=heads, window=window)


def _small_trained(trained: Trained, model: ModelConfig) -> Trained:
    """What is trained of a small model."""
    if trained is None:
        return None
    last = model.router.num_experts - 1
    some = dict.fromkeys(model.moe_layers, tuple(sorted({0, last // 2, last})))
    if isinstance(trained, LoRA):
        rank = min(trained.rank, RANK)
        return LoRA.on(model, rank, trained.alpha, trained.targets, ExpertConfig(some))
    return ExpertConfig(some if trained.num_experts_selected else {}, trained.also)


def check_steps(config: RunConfig, subject: Subject) -> Iterator[Finding]:
    """Check losses and norms of gradients, in the run's type and in float32.

    Raises:
        RunFailed: JAX was told to use no CPU.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        raise RunFailed(
            "JAX_PLATFORMS: no CPU to compare with; expected cpu at its end, as in cuda,cpu"
        ) from None
    for dtype in dict.fromkeys((subject.dtype, "float32")):
        run = _SmallRun(config, subject, dtype)
        values = run.begin(cpu)
        with portable():
            exact = run.metrics(cpu, values)
        yield from _compare(run, values, exact)


class _SmallRun:
    """A few updates of a small model, as a configuration wants them."""

    def __init__(self, config: RunConfig, subject: Subject, dtype: str):
        self.dtype = dtype
        self.model = small_model(subject.model)
        self.trained = _small_trained(subject.trained, self.model)
        self.quantisation, self.init = subject.quantisation, config.init
        self.masters = config.optimizer.masters
        self.length = min(TOKENS, subject.length)
        parts = min(2, config.train.micro_batches)
        self.train = dataclasses.replace(config.train, batch_size=ROWS * parts, micro_batches=parts)
        self.data = dataclasses.replace(config.data, sequence_length=self.length, mix={})
        optimizer = dataclasses.replace(
            config.optimizer,
            learning_rate=LEARNING_RATE,
            rates={},
            schedule="constant",
            warmup_steps=0,
            warmup_share=None,
            decay_share=None,
        )
        self.optimizer = make_optimizer(optimizer, config.train.steps)

    def _parts(self, device: jax.Device) -> Any:
        return partial(
            run_parts,
            self.model,
            make_mesh(devices=[device]),
            self.trained,
            jnp.dtype(self.dtype),
            jnp.float32 if self.init == "random" else None,
            quantisation=self.quantisation,
            masters=jnp.dtype(self.masters),
        )

    def begin(self, device: jax.Device) -> Any:
        """State and frozen weights before the first update, on the host."""
        parts = self._parts(device)
        shapes = step_shapes(make_mesh(devices=[device]), self.optimizer, parts)

        def build() -> Any:
            _, tuned, frozen = parts()
            return init_state(self.optimizer, tuned, frozen), frozen

        places = jax.tree.map(lambda x: x.sharding, (shapes.state, shapes.frozen))
        made = jax.jit(build, out_shardings=places).lower().compile(_QUICKLY)
        return jax.device_get(made())

    def metrics(self, device: jax.Device, values: Any) -> dict[str, np.ndarray]:
        """Losses and norms of gradients of each update on a device."""
        shapes = step_shapes(make_mesh(devices=[device]), self.optimizer, self._parts(device))
        with precision(self.dtype):
            lowered = shapes.trace(self.train, self.data).lower()
        compiled = lowered.compile(_QUICKLY if device.platform == "cpu" else None)
        places = jax.tree.map(lambda x: x.sharding, (shapes.state, shapes.frozen))
        state, frozen = jax.tree.map(jax.device_put, values, places)
        found: dict[str, list[float]] = {name: [] for name in _PARTS}
        for update in range(UPDATES):
            state, metrics = compiled(state, frozen, self._batch(update))
            for name, numbers in found.items():
                numbers.append(float(metrics[name]))
        return {name: np.asarray(numbers) for name, numbers in found.items()}

    def _batch(self, update: int) -> Batch:
        random = np.random.default_rng(update)
        rows, length = self.train.batch_size, self.length
        tokens = random.integers(0, self.model.vocab_size, (rows, length + 1)).astype(np.int32)
        segments = np.repeat(documents(length, whole=False), rows, axis=0)
        index = np.arange(length, dtype=np.int32)
        begins = np.append(True, segments[0, 1:] != segments[0, :-1])
        positions = index - np.maximum.accumulate(np.where(begins, index, 0))
        return Batch(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            segment_ids=segments,
            positions=np.repeat(positions[None], rows, axis=0).astype(np.int32),
            loss_weights=(segments > 0).astype(np.float32),
        )


def _compare(run: _SmallRun, values: Any, exact: dict[str, np.ndarray]) -> Iterator[Finding]:
    device, implementation = jax.devices()[0], fastest_implementation()
    terms = run.model.hidden_size * run.model.num_layers
    bound = DEPTH * tolerance(run.dtype, terms)
    shape = f"{run.model.num_layers} layers, {UPDATES} updates"

    def errors() -> dict[str, float]:
        found = run.metrics(device, values)
        return {
            name: float(np.nan_to_num(abs(found[name] / exact[name] - 1), nan=math.inf).max())
            for name in _PARTS
        }

    def finding(part: str, error: float, problem: str | None) -> Finding:
        of = STEP, part, shape, run.dtype, implementation
        return Finding(*of, error, bound, problem=problem)

    try:
        found = errors()
    except InputError:
        raise
    except Exception as failed:
        problem: str | None = f"{STEP} ({run.dtype}): it does not run: {one_line(failed)}"
        yield finding("losses", math.inf, problem)
        return
    for name, part in _PARTS.items():
        problem = None
        if not found[name] <= bound:
            problem = (
                f"{STEP} ({run.dtype}, {shape}): {part}: differ by {found[name]:.2g} from "
                f"those of plain XLA on the CPU; expected at most {bound:.2g}"
            )
            if implementation != "xla":
                with portable():
                    right = all(other <= bound for other in errors().values())
                problem += f"; {KERNELS}=xla in the environment " + (
                    "is right, at its speed" if right else "is wrong, too"
                )
        yield finding(part, found[name], problem)
