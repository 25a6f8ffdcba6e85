"""The model that a run begins with, on the mesh."""

import jax
import jax.numpy as jnp
from flax import nnx

from esft_jax.checkpoint.load import LoadedBase, load_source
from esft_jax.model.transformer import Transformer
from esft_jax.sharding import param_shardings
from esft_jax.training.setup import Setup


def load_pretrained(setup: Setup) -> LoadedBase:
    """The base model on the mesh.

    Raises:
        InputError: damaged weights, or some that are not finite.
    """
    assert setup.source is not None, "a run from random weights has no base"
    dtype = jnp.dtype(setup.config.dtype)
    base = load_source(setup.source, setup.config.model, dtype, setup.mesh)
    base.model.transport = setup.config.mesh.transport
    return base


def random_model(setup: Setup) -> Transformer:
    """A freshly initialised model on the mesh; every device makes only its part."""

    def make() -> Transformer:
        return Transformer(
            setup.model_config,
            rngs=nnx.Rngs(setup.config.seed),
            dtype=jnp.dtype(setup.config.dtype),
            param_dtype=jnp.float32,
            mesh=setup.mesh,
            transport=setup.config.mesh.transport,
        )

    graph, abstract = nnx.split(nnx.eval_shape(make))
    shardings = param_shardings(abstract, setup.mesh)
    return nnx.merge(graph, jax.jit(lambda: nnx.state(make()), out_shardings=shardings)())
