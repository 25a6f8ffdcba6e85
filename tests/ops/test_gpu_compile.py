"""GPU programs, compiled for GPUs that are not at hand by the compiler in JAX's CUDA plugin.

A process of its own compiles them, so that the plugin does not disturb other tests.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from esft_jax.accelerators import GPUS
from tests.ops.layers import BIASES, LAYERS, LOW_RANK, QUANTISED, QUANTISED_LAYERS, SMALL

COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from esft_jax.topology import gpu_devices

mesh, spec = Mesh(np.array(gpu_devices(sys.argv.pop(1), 1)), ("x",)), PartitionSpec()

def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

def report(gradients, *arguments):
    on_chip = jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(on_chip).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    memory = compiled.memory_analysis()
    print(json.dumps({
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "kernels": compiled.as_text().count('"__gpu$xla.gpu.triton"'),
    }))
"""

LAYER = """
from esft_jax.moe.grouped_matmul import grouped_matmul

dtype, (rows, d, f, experts, tuned) = sys.argv[1], map(int, sys.argv[2:])

def gradients(x, tuned, frozen, sizes):
    def loss(x, tuned):
        return (grouped_matmul(x, (tuned, frozen), sizes).astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, (0, 1))(x, tuned)

report(
    gradients,
    abstract((rows, d), dtype),
    abstract((tuned, d, f), jnp.float32),
    abstract((experts, d, f), dtype),
    abstract((experts + tuned,), jnp.int32),
)
"""

ATTENTION = """
from esft_jax.ops.attention import causal_attention

dtype, (length, heads, key_heads, width, value_width, window) = sys.argv[1], map(int, sys.argv[2:])

def gradients(query, key, value, segments, sinks=None):
    def loss(query, key, value, sinks):
        out = causal_attention(
            query, key, value, segments, width**-0.5, window=window or None, sinks=sinks
        )
        return (out.astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, (0, 1, 2) if sinks is None else (0, 1, 2, 3))(query, key, value, sinks)

report(
    gradients,
    abstract((1, length, heads, width), dtype),
    *(abstract((1, length, key_heads, w), dtype) for w in (width, value_width)),
    abstract((1, length), jnp.int32),
    *([abstract((heads,), jnp.float32)] if window else []),
)
"""

BYTES = {"bfloat16": 2, "float32": 4}


def compile_for(gpu, program, dtype, *sizes):
    if not any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in (12, 13)):
        pytest.skip("JAX's CUDA compiler is not installed: pip install 'esft-jax[cuda]'")
    command = [sys.executable, "-c", COMPILE + program, gpu, dtype, *map(str, sizes)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(dtype, layer, gpu="h100"):
    """The kernels fit, and memory holds rows and a tuned bank but no frozen one."""
    found = compile_for(gpu, LAYER, dtype, *layer)
    rows, d, f, experts, tuned = layer
    width = BYTES[dtype]
    assert found["kernels"] == 3  # products, gradient of the rows, gradient of the tuned bank
    assert found["arguments"] > width * experts * d * f
    # The product and its cotangent, and the tuned bank in the rows' type; a margin for indices.
    assert found["temporary"] < 1.1 * width * (2 * rows * f + tuned * d * f) + 2**20


def check_attention(dtype, length, heads, key_heads, width, value_width, window, gpu="h100"):
    """The kernels fit, and memory is linear in the length of a row."""
    sizes = (length, heads, key_heads, width, value_width, window)
    found = compile_for(gpu, ATTENTION, dtype, *sizes)
    assert found["kernels"] == 3  # the forward pass, gradients of queries, of keys and values
    # The result, and two numbers per query.
    assert found["temporary"] < length * heads * (value_width * BYTES[dtype] + 8) + 2**20


@pytest.mark.parametrize("dtype", BYTES)
def test_attention_of_deepseek_v2_lite(dtype):
    check_attention(dtype, 4096, 16, 16, 192, 128, 0)


# Heads of queries and of keys, the width of each, and the window.
HEADS = {
    "qwen3-30b": (32, 4, 128, 0),
    "gpt-oss-20b": (64, 8, 64, 128),
    "gemma-4 local": (16, 8, 256, 1024),
    "gemma-4 global": (16, 2, 512, 0),
    "an odd share": (6, 2, 72, 100),
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_attention_of_few_heads_of_keys(heads):
    """Neither they nor their gradients are repeated for each head of queries."""
    query_heads, key_heads, width, window = heads
    check_attention("bfloat16", 4096, query_heads, key_heads, width, width, window)


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_attention_of_few_heads_of_keys_in_float32(heads):
    query_heads, key_heads, width, window = heads
    check_attention("float32", 4096, query_heads, key_heads, width, width, window)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 8, 16, 64])
def test_low_rank_updates_of_deepseek_v2_lite(rank):
    found = compile_for("h100", LOW_RANK, "bfloat16", 24_576, 2048, rank, 2816, 9)
    assert found["kernels"] == 6  # both products, their gradients with respect to either side


def test_biases():
    found = compile_for("h100", BIASES, "bfloat16", 16_384, 2880, 32, 3)
    assert found["kernels"] == 1  # the gradient of the tuned ones; look-ups need none
    assert found["temporary"] < 2 * 2 * 16_384 * 2880 + 2**20  # two arrays of rows


# One GPU of each architecture: others differ in their number of multiprocessors.
ARCHITECTURES = {gpu.architecture: name for name, gpu in GPUS.items()}.values()


@pytest.mark.parametrize("gpu", ARCHITECTURES)
def test_a_small_layer_on(gpu):
    check("bfloat16", SMALL, gpu)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ARCHITECTURES)
def test_a_small_layer_in_float32_on(gpu):
    check("float32", SMALL, gpu)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ARCHITECTURES)
def test_attention_of_wide_heads_on(gpu):
    """Tiles are what the shared memory of a GPU holds."""
    for dtype, *sizes in WIDE:
        check_attention(dtype, 4096, *sizes, gpu)


# Heads of queries and of keys, widths of keys and of values, and the window.
WIDE = [
    ("bfloat16", 16, 2, 512, 512, 0),
    ("float32", 16, 16, 192, 128, 0),
    ("float32", 16, 8, 256, 256, 1024),
]


def test_attention_that_no_tiles_make_fit():
    with pytest.raises(AssertionError, match="InputError: dtype: float32: attention with"):
        check_attention("float32", 4096, 16, 2, 512, 512, 0, gpu="l40s")


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_real_layers(dtype, layer):
    check(dtype, layer)


def check_quantised(layer, gpu="h100"):
    """The kernels fit, and memory holds nothing of the frozen bank's size."""
    found = compile_for(gpu, QUANTISED, "bfloat16", *layer)
    _, _, rows, d, f, experts, tuned = layer
    assert found["kernels"] == 3
    # The product and its cotangent, and the tuned bank in bfloat16; a margin for indices.
    temporary = 1.1 * 2 * (2 * rows * f + tuned * d * f) + 2**20
    assert found["temporary"] < temporary
    assert found["arguments"] < temporary + 4 * tuned * d * f + 1.3 * experts * d * f


@pytest.mark.parametrize("scheme", [("int4", 64), ("fp8", 128)], ids=lambda scheme: scheme[0])
def test_a_quantised_layer(scheme):
    check_quantised((*scheme, 512, 256, 384, 8, 2))


@pytest.mark.slow
@pytest.mark.parametrize("layer", QUANTISED_LAYERS.values(), ids=QUANTISED_LAYERS)
@pytest.mark.parametrize("gpu", ["h100", "rtx4090"])
def test_real_quantised_layers(gpu, layer):
    check_quantised(layer, gpu)
