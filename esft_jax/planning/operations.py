"""Floating-point operations of a step: as traced, and by arithmetic.

XLA's own cost analysis counts the body of a loop once, and kernels not at all.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh

from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.model.config import ModelConfig
from esft_jax.moe.grouped_matmul.tpu_tiles import PIECES, plan_visits
from esft_jax.sharding import EXPERT


@dataclass
class Operations:
    """Floating-point operations of one chip in a step, read from the traced program.

    Attributes:
        products: matrix products outside kernels, each as often as it runs.
        experts: the grouped kernels, by the rows and widths that their grids cover.
        experts_exact: the same without the padding of rows and widths to blocks.
        attention: the kernels of attention, by the blocks of scores that they compute.
    """

    products: float = 0.0
    experts: float = 0.0
    experts_exact: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        """All that is computed."""
        return self.products + self.experts + self.attention


@dataclass(frozen=True)
class KernelRows:
    """What the grouped kernels of one chip meet in one layer, for a balanced router.

    Attributes:
        sizes: rows of each expert of the chip.
        tuned: tuned, or updated, experts per chip and layer, on average.
        narrow: widths that only products with low-rank factors have.
    """

    sizes: np.ndarray
    tuned: float
    narrow: tuple[int, ...] = ()

    @classmethod
    def balanced(
        cls, model: ModelConfig, mesh: Mesh, trained: Trained, tokens: int
    ) -> "KernelRows":
        """Assignments drawn evenly.

        Args:
            tokens: of one chip, in one micro-batch.
        """
        shards, num_experts = mesh.shape[EXPERT], model.router.num_experts
        drawn = np.random.default_rng(0).multinomial(
            shards * tokens * model.router.top_k, np.full(num_experts, 1 / num_experts)
        )
        tuned, narrow = float(num_experts), tuple[int, ...]()
        experts = trained.experts if isinstance(trained, LoRA) else trained
        if isinstance(trained, LoRA):
            narrow = trained.rank, 2 * trained.rank
        if experts is not None:
            tuned = experts.num_experts_selected / len(model.moe_layers)
        return cls(drawn[: num_experts // shards], tuned / shards, narrow)

    def charged(self, tile: int) -> float:
        """Rows that are multiplied, pieces of tiles included, per row."""
        sizes = jnp.asarray(self.sizes, jnp.int32)
        begins, rows = jnp.cumsum(sizes) - sizes, int(self.sizes.sum())
        visits, count = plan_visits(begins, sizes, rows, tile // PIECES)
        return float(visits.pieces[: int(count)].sum()) * (tile // PIECES) / rows


def count_operations(jaxpr: Any, kernels: KernelRows, devices: int) -> Operations:
    """Walk a program traced for TPUs, without what its results do not depend on.

    Outside `shard_map` shapes are global and split over all devices. Pieces of assignments
    (`esft_jax.moe.experts`) are one, as with a balanced router; every token has a target.
    """
    found = Operations()

    def walk(jaxpr: Any, share: float, trips: int) -> None:
        used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        for equation in used.eqns:
            name = equation.primitive.name
            if name == "dot_general":
                found.products += trips * share * _product(equation)
            elif name == "pallas_call":
                _add_kernel(found, equation, kernels, trips)
            else:
                inner_share = 1.0 if name == "shard_map" else share
                inner_trips = trips * (equation.params["length"] if name == "scan" else 1)
                for inner in jaxprs_in_params(equation.params):
                    walk(inner, inner_share, inner_trips)

    walk(jaxpr, 1 / devices, 1)
    return found


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
    return 2.0 * np.prod(equation.outvars[0].aval.shape) * depth


def _add_kernel(found: Operations, equation: Any, kernels: KernelRows, trips: int) -> None:
    name = equation.params["name"]
    if name.startswith("splash"):
        found.attention += trips * _attention(equation)
        return
    operands = equation.params["grid_mapping"].block_mappings
    arrays = [operand.array_aval.shape for operand in operands]
    blocks = [operand.transformed_block_aval.shape for operand in operands]
    charged = kernels.charged(blocks[0][0])
    if name == "grouped_matmul":  # rows, banks, products
        narrow = {arrays[0][1], arrays[-1][1]} & set(kernels.narrow)
        rows = kernels.sizes.mean() * kernels.tuned if narrow else kernels.sizes.sum()
        exact = arrays[0][1] * arrays[-1][1]
        covered = arrays[0][1] * _padded(arrays[-1][1], blocks[-1][1])
    else:  # rows, their gradients, gradients of the matrices
        rows = kernels.sizes.mean() * kernels.tuned
        exact = arrays[0][1] * arrays[1][1]
        covered = _padded(arrays[0][1], blocks[0][1]) * _padded(arrays[1][1], blocks[1][1])
    found.experts += trips * 2.0 * charged * rows * covered
    found.experts_exact += trips * 2.0 * rows * exact


def _attention(equation: Any) -> float:
    """Of a splash attention kernel. For each block of queries, or of keys, it computes those on and
    below the diagonal, as far as the windows go: at most so many as its grid is wide.
    """
    # Products in which a score, or its gradient, meets the width of queries and that of values.
    by_kind = {"_fwd_": (1, 1), "_dq_": (2, 1), "_dkv_": (2, 2)}
    of_query, of_value = next(n for kind, n in by_kind.items() if kind in equation.params["name"])
    operands = (v.aval for v in equation.invars)  # what says which blocks to visit comes first
    query, _, value = [a.shape for a in operands if jnp.issubdtype(a.dtype, jnp.floating)][:3]
    grid = equation.params["grid_mapping"]
    block = grid.block_mappings[0].transformed_block_aval.shape[0]
    visits = np.minimum(np.arange(query[-2] // block) + 1, grid.grid[-1]).sum()
    scores = np.prod(query[:-2]) * block**2 * visits
    return 2.0 * scores * (of_query * query[-1] + of_value * value[-1])


def _padded(width: int, block: int) -> int:
    return -(-width // block) * block
