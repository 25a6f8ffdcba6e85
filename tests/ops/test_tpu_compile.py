"""TPU programs, compiled for chips that are not at hand by the compiler that `libtpu` brings.

A process of its own compiles them: the library takes over signals, and ends the process at once
when something is wrong inside it.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.ops.layers import BIASES, LAYERS, LOW_RANK, QUANTISED, QUANTISED_LAYERS, SMALL

SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SLICES["tpu7x"] = "tpu7x:2x2x1"

COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from esft_jax.topology import tpu_devices

mesh = Mesh(np.array(tpu_devices(sys.argv[1])[:1]), ("x",))
spec = PartitionSpec()

def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

def report(gradients, *arguments):
    on_chip = jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(on_chip).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    print(json.dumps({
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "kernels": compiled.as_text().count("tpu_custom_call"),
    }))
"""

LAYER = """
from esft_jax.moe.grouped_matmul import grouped_matmul

rows, d, f, experts, tuned = map(int, sys.argv[2:])

def gradients(x, tuned, frozen, sizes):
    def loss(x, tuned):
        return (grouped_matmul(x, (tuned, frozen), sizes).astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, (0, 1))(x, tuned)

report(
    gradients,
    abstract((rows, d), jnp.bfloat16),
    abstract((tuned, d, f), jnp.float32),
    abstract((experts, d, f), jnp.bfloat16),
    abstract((experts + tuned,), jnp.int32),
)
"""

ATTENTION = """
from esft_jax.ops.attention import causal_attention

length, heads, key_heads, width, value_width, window = map(int, sys.argv[2:])

def gradients(query, key, value, segments, sinks=None):
    def loss(query, key, value, sinks):
        out = causal_attention(
            query, key, value, segments, width**-0.5, window=window or None, sinks=sinks
        )
        return (out.astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, (0, 1, 2) if sinks is None else (0, 1, 2, 3))(query, key, value, sinks)

report(
    gradients,
    abstract((1, length, heads, width), jnp.bfloat16),
    *(abstract((1, length, key_heads, w), jnp.bfloat16) for w in (width, value_width)),
    abstract((1, length), jnp.int32),
    *([abstract((heads,), jnp.float32)] if window else []),
)
"""


def compile_for(chip, program, *sizes):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install libtpu")
    command = [sys.executable, "-c", COMPILE + program, SLICES[chip], *map(str, sizes)]
    # The library's own compiler does not know all flags of jaxlib's.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(chip, layer):
    """Kernels were chosen, they fit, and memory holds rows and a tuned bank but no frozen one."""
    found = compile_for(chip, LAYER, *layer)
    rows, d, f, experts, tuned = layer
    assert found["kernels"] == 3  # products, gradient of the rows, gradient of the tuned bank
    assert found["arguments"] > 2 * experts * d * f
    # The product and its cotangent, and the tuned bank in bfloat16; a margin for indices.
    assert found["temporary"] < 1.1 * (2 * 2 * rows * f + 2 * tuned * d * f) + 2**20


def check_attention(chip, length, heads, key_heads, width, value_width, window=0):
    """The kernels were chosen, they fit, and memory is linear in the length of a row."""
    found = compile_for(chip, ATTENTION, length, heads, key_heads, width, value_width, window)
    assert found["kernels"] == 3  # the forward pass, gradient of queries, of keys and values
    width, value_width = (-(-w // 128) * 128 for w in (width, value_width))
    padded = heads * width + key_heads * (width + value_width)
    numbers = 4 * 128 * length * heads  # per query, as wide as a register
    assert found["temporary"] < 4 * 2 * length * padded + 2 * numbers + 2**20


def test_attention_on_v5e():
    check_attention("v5e", 1024, 4, 4, 192, 128)


def test_attention_of_few_heads_of_keys_on_v5e():
    check_attention("v5e", 1024, 8, 2, 128, 128)


def test_attention_of_a_window_and_sinks_on_v5e():
    check_attention("v5e", 1024, 8, 2, 64, 64, 128)


@pytest.mark.slow
@pytest.mark.parametrize("chip", SLICES)
def test_attention_of_deepseek_v2_lite(chip):
    check_attention(chip, 4096, 16, 16, 192, 128)


# libtpu 0.0.52 fails inside itself on tpu7x with 32 heads, whether keys have as many or fewer.
@pytest.mark.slow
@pytest.mark.parametrize("chip", [chip for chip in SLICES if chip != "tpu7x"])
def test_attention_of_qwen3_30b(chip):
    check_attention(chip, 4096, 32, 4, 128, 128)


# Heads of queries and of keys, the width of each, and the window.
HEADS = {
    "gpt-oss-20b": (64, 8, 64, 128),
    "gemma-4 local": (16, 8, 256, 1024),
    "gemma-4 global": (16, 2, 512, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_attention_of_windows_and_wide_heads(chip, heads):
    query_heads, key_heads, width, window = heads
    check_attention(chip, 4096, query_heads, key_heads, width, width, window)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 8, 16, 64])
@pytest.mark.parametrize("chip", SLICES)
def test_low_rank_updates_of_deepseek_v2_lite(chip, rank):
    found = compile_for(chip, LOW_RANK, 24_576, 2048, rank, 2816, 9)
    assert found["kernels"] == 6  # both products, their gradients with respect to either side


def test_biases_on_v5e():
    found = compile_for("v5e", BIASES, 16_384, 2880, 32, 3)
    assert found["kernels"] == 1  # the gradient of the tuned ones; look-ups need none
    assert found["temporary"] < 2 * 2 * 16_384 * 2944 + 2**20  # two arrays of rows


def test_a_small_layer_on_v5e():
    check("v5e", SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("chip", SLICES)
def test_real_layers(chip, layer):
    check(chip, layer)


def check_quantised(chip, layer):
    """The kernels fit, and memory holds nothing of the frozen bank's size."""
    found = compile_for(chip, QUANTISED, *layer)
    _, _, rows, d, f, experts, tuned = layer
    assert found["kernels"] == 3
    # The product and its cotangent, and the tuned bank in bfloat16; a margin for indices.
    temporary = 1.1 * 2 * (2 * rows * f + tuned * d * f) + 2**20
    assert found["temporary"] < temporary
    assert found["arguments"] < temporary + 4 * tuned * d * f + 1.3 * experts * d * f


@pytest.mark.parametrize("scheme", [("int4", 64), ("fp8", 128)], ids=lambda scheme: scheme[0])
def test_a_quantised_layer_on_v5e(scheme):
    check_quantised("v5e", (*scheme, 512, 256, 384, 8, 2))


@pytest.mark.slow
@pytest.mark.parametrize("layer", QUANTISED_LAYERS.values(), ids=QUANTISED_LAYERS)
@pytest.mark.parametrize("chip", SLICES)
def test_real_quantised_layers(chip, layer):
    check_quantised(chip, layer)
