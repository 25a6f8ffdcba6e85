"""What a run needs before any compute: checks, data, model, experts."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from esft_jax.config import RunConfig
from esft_jax.data.pipeline import PackedDataset, build_dataset, eval_batches, sample_rows
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.experts.score import score_experts
from esft_jax.experts.scores import ExpertScores
from esft_jax.hf.load import LoadedBase, load_base, local_folder
from esft_jax.mesh import EXPERT, make_mesh, param_shardings
from esft_jax.model.config import ModelConfig
from esft_jax.model.transformer import Transformer


@dataclass(frozen=True)
class Setup:
    """A checked configuration with what it names.

    Attributes:
        folder: where the model's `config.json` and tokenizer lie.
        mesh: of the whole run.
    """

    config: RunConfig
    folder: Path
    model_config: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh


def open_setup(config: RunConfig) -> Setup:
    """Read what is small and check that everything fits together.

    Raises:
        InputError: naming the key that does not fit.
    """
    folder = local_folder(config.model)
    model_config = ModelConfig.load(folder)
    mesh = make_mesh(config.mesh.data, config.mesh.expert)
    _check_fit(config, model_config, mesh)
    return Setup(config, folder, model_config, Tokenizer.load(folder), mesh)


def _check_fit(config: RunConfig, model: ModelConfig, mesh: Mesh) -> None:
    if model.router.num_experts % mesh.shape[EXPERT]:
        raise InputError(
            f"mesh.expert: {mesh.shape[EXPERT]} does not divide the model's "
            f"{model.router.num_experts} experts"
        )
    for key, length in (
        ("data.sequence_length", config.data.sequence_length),
        ("score.sequence_length", config.score.sequence_length),
    ):
        if length > model.max_positions:
            raise InputError(
                f"{key}: {length} tokens; the model's limit is {model.max_positions} "
                "(max_position_embeddings)"
            )
    for key, rows in (
        ("train.batch_size / train.micro_batches", config.train.batch_size // config.train.micro_batches),
        ("score.batch_size", config.score.batch_size),
    ):
        if rows % mesh.size:
            raise InputError(f"{key}: {rows} rows cannot be split over {mesh.size} devices")


def training_data(setup: Setup) -> tuple[PackedDataset, PackedDataset | None]:
    """The packed training and validation sets."""
    data = setup.config.data

    def build(paths: tuple[str, ...]) -> PackedDataset:
        return build_dataset(
            paths,
            setup.tokenizer,
            format=data.format,
            sequence_length=data.sequence_length,
            too_long=data.too_long,
            seed=setup.config.seed,
        )

    return build(data.train), build(data.valid) if data.valid else None


def measure_scores(setup: Setup, base: LoadedBase) -> ExpertScores:
    """Score the base model's experts on samples of the training data."""
    config = setup.config
    dataset = build_dataset(
        config.data.train,
        setup.tokenizer,
        format=config.data.format,
        sequence_length=config.score.sequence_length,
        too_long=config.data.too_long,
        seed=config.seed,
    )
    batches = eval_batches(
        dataset,
        config.score.batch_size,
        jax.process_index(),
        jax.process_count(),
        rows=sample_rows(dataset, config.score.samples, config.seed),
    )
    provenance = {
        "model": config.model,
        "base_fingerprint": base.fingerprint,
        "data_sha256": dataset.stats.sha256,
        "sequence_length": config.score.sequence_length,
        "seed": config.seed,
    }
    return score_experts(base.model, batches, provenance)


def load_pretrained(setup: Setup) -> LoadedBase:
    """The base model on the mesh."""
    return load_base(setup.config.model, jnp.dtype(setup.config.dtype), setup.mesh)


def random_model(setup: Setup) -> Transformer:
    """A freshly initialised model on the mesh; every device makes only its part."""

    def make() -> Transformer:
        return Transformer(
            setup.model_config,
            rngs=nnx.Rngs(setup.config.seed),
            dtype=jnp.dtype(setup.config.dtype),
            param_dtype=jnp.float32,
            mesh=setup.mesh,
        )

    graph, abstract = nnx.split(nnx.eval_shape(make))
    shardings = param_shardings(abstract, setup.mesh)
    return nnx.merge(graph, jax.jit(lambda: nnx.state(make()), out_shardings=shardings)())
