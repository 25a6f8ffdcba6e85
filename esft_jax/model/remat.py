"""What the backward pass computes again instead of keeping it, by name."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax

from esft_jax.moe.experts import GATE_UP
from esft_jax.ops.attention.operation import KEPT

Remat = Literal["none", "dots", "experts", "attention", "full", "offload"]

# Name of what enters a block.
BLOCK_INPUT = "block_input"

_policies = jax.checkpoint_policies

# From most to least memory. Whatever is chosen, attention scores and what lies between the two
# products of an expert are computed again.
REMAT: dict[Remat, Callable[[Callable], Callable]] = {
    # Keep every other activation.
    "none": lambda f: f,
    # Keep products with weights that are no expert's; experts run again.
    "dots": partial(jax.checkpoint, policy=_policies.dots_with_no_batch_dims_saveable),
    # Keep what enters a block, what attention gives, and the experts' first product.
    "experts": partial(jax.checkpoint, policy=_policies.save_only_these_names(KEPT, GATE_UP)),
    # Keep what enters a block and what attention gives.
    "attention": partial(jax.checkpoint, policy=_policies.save_only_these_names(KEPT)),
    # Keep what enters a block.
    "full": jax.checkpoint,
    # Keep what enters a block in the memory of the host.
    "offload": partial(
        jax.checkpoint,
        policy=_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}
