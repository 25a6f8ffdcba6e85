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

PROGRAM = '''
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from esft_jax.ops.grouped_matmul import grouped_matmul

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 85899345920
  memory_bandwidth: 3352000000000
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
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
device = jax.sharding.SingleDeviceSharding(topology.devices[0])
traced = jax.jit(gradients, in_shardings=device, out_shardings=device).trace(*arguments)
compiled = traced.lower(lowering_platforms=("cuda",)).compile()
memory = compiled.memory_analysis()
print(json.dumps({
    "arguments": memory.argument_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
    "kernels": compiled.as_text().count('"__gpu$xla.gpu.triton"'),
}))
'''


def check(dtype, layer):
    """The kernels fit, and memory holds rows and a tuned bank but no frozen one."""
    if not any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in (12, 13)):
        pytest.skip("JAX's CUDA compiler is not installed: pip install 'esft-jax[cuda]'")
    command = [sys.executable, "-c", PROGRAM, dtype, *map(str, layer)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
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
