"""Mixture-of-Experts layers on plain arrays: dispatch, transport between devices, products."""

from esft_jax.moe.layer import Routing, moe
from esft_jax.moe.weights import ExpertWeights

__all__ = ["ExpertWeights", "Routing", "moe"]
