"""Expert-Specialized Fine-Tuning (ESFT, arXiv 2407.01906) of Mixture-of-Experts models in JAX.

The names below are the library; every command is a thin wrapper of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esft_jax.config import RunConfig, load_config
    from esft_jax.data.pipeline import build_dataset, eval_batches, train_iterator
    from esft_jax.data.tokenizer import Tokenizer
    from esft_jax.errors import InputError
    from esft_jax.evaluation.generate import generate_text, generate_tokens
    from esft_jax.evaluation.tasks import run_evaluation
    from esft_jax.experts.expert_config import ExpertConfig
    from esft_jax.experts.partition import attach_tuned_experts, partition
    from esft_jax.experts.score import score_experts
    from esft_jax.experts.scores import ExpertScores, load_scores
    from esft_jax.experts.select import select_experts
    from esft_jax.hf.adapter import apply_adapter, load_adapter, save_adapter
    from esft_jax.hf.convert import convert_checkpoint
    from esft_jax.hf.export import export_model
    from esft_jax.hf.load import load_base, load_model
    from esft_jax.mesh import make_mesh
    from esft_jax.model import ModelConfig, Transformer
    from esft_jax.training.loop import run_training
    from esft_jax.training.setup import open_setup

# Where each public name lives; imported on first use, so that `esft --help` needs no JAX.
_HOMES = {
    "ExpertConfig": "experts.expert_config",
    "ExpertScores": "experts.scores",
    "InputError": "errors",
    "ModelConfig": "model",
    "RunConfig": "config",
    "Tokenizer": "data.tokenizer",
    "Transformer": "model",
    "apply_adapter": "hf.adapter",
    "attach_tuned_experts": "experts.partition",
    "build_dataset": "data.pipeline",
    "convert_checkpoint": "hf.convert",
    "eval_batches": "data.pipeline",
    "export_model": "hf.export",
    "generate_text": "evaluation.generate",
    "generate_tokens": "evaluation.generate",
    "load_adapter": "hf.adapter",
    "load_base": "hf.load",
    "load_config": "config",
    "load_model": "hf.load",
    "load_scores": "experts.scores",
    "make_mesh": "mesh",
    "open_setup": "training.setup",
    "partition": "experts.partition",
    "run_evaluation": "evaluation.tasks",
    "run_training": "training.loop",
    "save_adapter": "hf.adapter",
    "score_experts": "experts.score",
    "select_experts": "experts.select",
    "train_iterator": "data.pipeline",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
