"""The model that a run begins with."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from esft_jax.checkpoint.load import load_source
from esft_jax.checkpoint.source import Source
from esft_jax.host_memory import Memory
from esft_jax.model.config import ModelConfig
from esft_jax.model.transformer import Transformer
from esft_jax.moe.transport import Transport
from esft_jax.ops.quantisation import Quantisation
from esft_jax.sharding import param_shardings


@dataclass(frozen=True)
class Base:
    """The model before training, opened: all but its weights is read.

    Attributes:
        name: as the configuration calls it.
        folder: where its `config.json` and tokenizer lie.
        source: its files, opened; None for `init: random`.
        config: its shape.
    """

    name: str
    folder: Path
    source: Source | None
    config: ModelConfig

    def load(
        self,
        dtype: DTypeLike,
        mesh: Mesh,
        transport: Transport,
        seed: int,
        quantisation: Quantisation | None = None,
        trained: frozenset[str] = frozenset(),
        frozen_memory: Memory = "device",
    ) -> Transformer:
        """The model on a mesh, with the weights of the source, or else with new ones.

        Args:
            dtype: of computation, and of the weights that are read; new ones are float32.
            transport: see `Transformer`.
            seed: of new weights.
            quantisation, trained, frozen_memory: of weights that are read; see `load_base`.

        Raises:
            InputError: damaged weights, or some that are not finite.
        """
        if self.source is None:
            model = _new_model(self.config, dtype, mesh, seed)
        else:
            model = load_source(
                self.source, self.name, dtype, mesh, quantisation, trained, frozen_memory
            ).model
        model.transport = transport
        return model


def _new_model(config: ModelConfig, dtype: DTypeLike, mesh: Mesh, seed: int) -> Transformer:
    """Freshly initialised; every device makes only its part."""

    def make() -> Transformer:
        rngs = nnx.Rngs(seed)
        return Transformer(config, rngs=rngs, dtype=dtype, param_dtype=jnp.float32, mesh=mesh)

    graph, abstract = nnx.split(nnx.eval_shape(make))
    shardings = param_shardings(abstract, mesh)
    return nnx.merge(graph, jax.jit(lambda: nnx.state(make()), out_shardings=shardings)())
