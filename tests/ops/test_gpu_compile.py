"""GPU programs, compiled for an H100 that is not at hand by the compiler in JAX's CUDA plugin.

A process of its own compiles them, so that the plugin does not disturb other tests.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.ops.layers import LAYERS, SMALL

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from esft_jax.ops.grouped_matmul import grouped_matmul
from esft_jax.topology import h100_devices

dtype, (rows, d, f, experts, tuned) = sys.argv[1], map(int, sys.argv[2:])

def gradients(x, tuned, frozen, sizes):
    def loss(x, tuned):
        out = grouped_matmul(x, (tuned, frozen), sizes, implementation="gpu")
        return (out.astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, (0, 1))(x, tuned)

arguments = (
    jax.ShapeDtypeStruct((rows, d), dtype),
    jax.ShapeDtypeStruct((tuned, d, f), jnp.float32),
    jax.ShapeDtypeStruct((experts, d, f), dtype),
    jax.ShapeDtypeStruct((experts + tuned,), jnp.int32),
)
device = jax.sharding.SingleDeviceSharding(h100_devices(1)[0])
traced = jax.jit(gradients, in_shardings=device, out_shardings=device).trace(*arguments)
compiled = traced.lower(lowering_platforms=("cuda",)).compile()
memory = compiled.memory_analysis()
print(json.dumps({
    "arguments": memory.argument_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
    "kernels": compiled.as_text().count('"__gpu$xla.gpu.triton"'),
}))
"""


def check(dtype, layer):
    """The kernels fit, and memory holds rows and a tuned bank but no frozen one."""
    if not any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in (12, 13)):
        pytest.skip("JAX's CUDA compiler is not installed: pip install 'esft-jax[cuda]'")
    command = [sys.executable, "-c", PROGRAM, dtype, *map(str, layer)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    rows, d, f, experts, tuned = layer
    width = {"bfloat16": 2, "float32": 4}[dtype]
    assert found["kernels"] == 3  # products, gradient of the rows, gradient of the tuned bank
    assert found["arguments"] > width * experts * d * f
    # The product and its cotangent, and the tuned bank in the rows' type; a margin for indices.
    assert found["temporary"] < 1.1 * width * (2 * rows * f + tuned * d * f) + 2**20


def test_a_small_layer():
    check("bfloat16", SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_real_layers(dtype, layer):
    check(dtype, layer)
