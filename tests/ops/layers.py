"""What kernels are compiled for."""

# Rows, width of the model, output width, experts, tuned experts.

SMALL = (512, 512, 256, 64, 4)
LAYERS = {
    "deepseek-v2-lite up": (24_576, 2048, 2816, 64, 9),
    "deepseek-v2-lite down": (24_576, 1408, 2048, 64, 9),
    "128 experts": (32_768, 2048, 1536, 128, 12),
    "mixtral up": (8192, 4096, 28_672, 8, 1),
    "mixtral down": (8192, 14_336, 4096, 8, 1),
}

# A program of the compile tests: low-rank updates and their gradients.
LOW_RANK = """
from esft_jax.moe.weights import update_rows

rows, d, rank, f, updated = map(int, sys.argv[2:])

def gradients(x, a, b, sizes):
    def loss(x, a, b):
        # The last of each pair of experts is updated.
        out = update_rows(x, (a, b), 1 + 2 * jnp.arange(updated), sizes)
        return (out.astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, (0, 1, 2))(x, a, b)

report(
    gradients,
    abstract((rows, d), jnp.bfloat16),
    abstract((updated, d, rank), jnp.float32),
    abstract((updated, rank, f), jnp.float32),
    abstract((2 * updated,), jnp.int32),
)
"""

# Biases of experts and their gradients, as those of the second product: factors are gates.
BIASES = """
from esft_jax.moe.grouped_matmul import as_rows, grouped_matmul

rows, f, experts, tuned = map(int, sys.argv[2:])

def gradients(gates, tuned, frozen, sizes):
    def loss(gates, tuned):
        out = grouped_matmul(gates[:, None], (as_rows(tuned), as_rows(frozen)), sizes)
        return (out.astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, (0, 1))(gates, tuned)

report(
    gradients,
    abstract((rows,), jnp.bfloat16),
    abstract((tuned, f), jnp.float32),
    abstract((experts, f), jnp.bfloat16),
    abstract((experts + tuned,), jnp.int32),
)
"""

# Tuned experts beside frozen ones that are quantised: the program for `COMPILE`.
QUANTISED = """
from esft_jax.moe.grouped_matmul import grouped_matmul
from esft_jax.ops.quantised import quantise

scheme, group_size = sys.argv[2], int(sys.argv[3])
rows, d, f, experts, tuned = map(int, sys.argv[4:])

def gradients(x, tuned, frozen, sizes):
    def loss(x, tuned):
        return (grouped_matmul(x, (tuned, frozen), sizes).astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, (0, 1))(x, tuned)

frozen = jax.eval_shape(
    lambda: quantise(jnp.zeros((experts, d, f), jnp.bfloat16), scheme, group_size)
)
report(
    gradients,
    abstract((rows, d), jnp.bfloat16),
    abstract((tuned, d, f), jnp.float32),
    jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype), frozen),
    abstract((experts + tuned,), jnp.int32),
)
"""

# Scheme, group size, and sizes as in `LAYERS`, of both products: Qwen3-30B-A3B (released in fp8,
# too), gpt-oss-20b and DeepSeek-V2-Lite.
QUANTISED_LAYERS = {
    "qwen3-30b gate_up": ("int4", 64, 32_768, 2048, 1536, 128, 4),
    "qwen3-30b down": ("int4", 64, 32_768, 768, 2048, 128, 4),
    "qwen3-30b fp8 gate_up": ("fp8", 128, 32_768, 2048, 1536, 128, 4),
    "qwen3-30b fp8 down": ("fp8", 128, 32_768, 768, 2048, 128, 4),
    "gpt-oss-20b gate_up": ("mxfp4", 32, 16_384, 2880, 5760, 32, 3),
    "gpt-oss-20b down": ("mxfp4", 32, 16_384, 2880, 2880, 32, 3),
    "deepseek-v2-lite gate_up": ("int8", 64, 24_576, 2048, 2816, 64, 6),
    "deepseek-v2-lite down": ("int8", 64, 24_576, 1408, 2048, 64, 6),
}
