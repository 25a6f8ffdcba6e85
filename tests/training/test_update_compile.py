"""What an update needs beside what it reads and writes, compiled for a TPU and a GPU."""

import pytest

from tests.ops.test_gpu_compile import compile_for as compile_for_gpu
from tests.ops.test_tpu_compile import compile_for as compile_for_tpu

SHAPE = (8, 1024, 1536)  # of a bank

# An optimizer's update of a bank, whose masters and moments are kept in bfloat16.
UPDATE = """
import optax
from flax import nnx
from esft_jax.adapt.tuned import TunedParam
from esft_jax.optimizer_config import OptimizerConfig
from esft_jax.model.params import Role
from esft_jax.training.optimizer import make_optimizer
from esft_jax.training.rounding import Rounding
from esft_jax.training.state import init_state
from esft_jax.training.step import apply_gradients

name, shape = sys.argv[2], tuple(map(int, sys.argv[3:]))
optimizer = make_optimizer(OptimizerConfig(name=name), 1)
rows, nothing = np.arange(shape[0], dtype=np.int32), nnx.State({})

def bank():
    matrices = jnp.zeros(shape, jnp.bfloat16)
    param = TunedParam(matrices, axes=("experts", None, None), role=Role.ROUTED_EXPERT)
    return init_state(optimizer, nnx.State({"tuned_experts": param}), nothing, jnp.bfloat16)

def update(state, grads):
    rounding = Rounding.of(0, state.step, rows)
    return apply_gradients(optimizer, grads, nothing, rounding, state.tuned, state.opt_state)

state = jax.tree.map(lambda x: abstract(x.shape, x.dtype), jax.eval_shape(bank))
report(update, state, state.tuned)
"""

NAMES = [
    "adamw",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("adafactor", "lion", "muon", "sgd")),
]


def check(name: str, found: dict[str, int]) -> None:
    """No array of the size of a moment; for Muon one, of what it orthogonalises in place."""
    numbers = SHAPE[0] * SHAPE[1] * SHAPE[2]
    assert found["arguments"] >= 2 * 2 * numbers  # masters and gradients
    # Beside that, some of its eight matrices.
    most = 4 * numbers * (1 + 1 / 2) if name == "muon" else numbers / 16
    assert found["temporary"] < most


@pytest.mark.parametrize("name", NAMES)
def test_on_v5e(name: str) -> None:
    check(name, compile_for_tpu("v5e", UPDATE, name, *SHAPE))


@pytest.mark.parametrize("name", NAMES)
def test_on_an_h100(name: str) -> None:
    check(name, compile_for_gpu("h100", UPDATE, "bfloat16", name, *SHAPE))
