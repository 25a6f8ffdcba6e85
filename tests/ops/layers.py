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
