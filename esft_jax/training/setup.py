"""What a run needs before any compute: checks, data, model, experts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA
from esft_jax.adapt.partition import check_experts, trained_roles
from esft_jax.adapt.parts import check_rates
from esft_jax.checkpoint.identity import chat_record, check_same_base, tokenizer_fingerprint
from esft_jax.checkpoint.load import LoadedBase, load_base, local_folder, open_source
from esft_jax.config import RunConfig
from esft_jax.data.mix import MixedDataset, Source
from esft_jax.data.pipeline import (
    Dataset,
    PackedDataset,
    build_dataset,
    eval_batches,
    sample_rows,
)
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.files import seen
from esft_jax.memory import check_fits
from esft_jax.model.config import ModelConfig
from esft_jax.model.transformer import Transformer
from esft_jax.processes import on_all_processes, on_first_process
from esft_jax.routing.choose import check_select, choose_experts, load_tasks
from esft_jax.routing.score import score_experts
from esft_jax.routing.scores import SCORES_FILE, ExpertScores
from esft_jax.sharding import EXPERT, device_multiple, make_mesh, param_shardings
from esft_jax.training.program import batch_shapes
from esft_jax.training.run_folder import RunFolder


@dataclass(frozen=True)
class Setup:
    """A checked configuration with all that it names, except weights.

    Attributes:
        run: where results go.
        folder: where the model's `config.json` and tokenizer lie.
        mesh: of the whole run.
        task_set: the rows of `data.train`.
        train_set: the same, mixed with those of `data.mix` if there are any.
        valid_sets: by source name, `task` first; empty without `data.valid`.
        score_set: the rows of `data.train` as experts are scored on them; None where `experts`
            are given.
        experts: the ones to train, if nothing is to be measured: those of `expert_cfg`, of the run
            that is being resumed, or chosen by `select.scores`.
    """

    config: RunConfig
    run: RunFolder
    folder: Path
    model_config: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    task_set: PackedDataset
    train_set: Dataset
    valid_sets: dict[str, PackedDataset]
    score_set: PackedDataset | None
    experts: ExpertConfig | None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the base is besides its weights: hashes (`hf.identity.PARTS`), and chats' format."""
        return {
            "config_fingerprint": self.model_config.fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint(self.folder, self.tokenizer),
            **chat_record(self.tokenizer.chat_format),
        }


def open_setup(config: RunConfig) -> Setup:
    """Read everything but weights, and check that it fits together.

    Raises:
        InputError: naming the key, file or line that is wrong.
    """
    run, folder, model_config, mesh, experts = check_setup(config)
    tokenizer = Tokenizer.load(folder, config.data.chat_format())
    tokenizer.check_vocabulary(model_config.vocab_size)
    task_set, train_set, valid_sets = read_data(config, tokenizer)
    score_set = None
    if config.selects_experts and experts is None:
        score_set = score_rows(config, model_config, tokenizer, task_set)
    return Setup(
        config,
        run,
        folder,
        model_config,
        tokenizer,
        mesh,
        task_set,
        train_set,
        valid_sets,
        score_set,
        experts,
    )


def check_setup(
    config: RunConfig,
) -> tuple[RunFolder, Path, ModelConfig, Mesh, ExpertConfig | None]:
    """Read everything but weights and data, and check that it fits together; see `Setup`.

    Raises:
        InputError: naming the key or file that is wrong.
    """
    run = RunFolder(config.output)
    run.check(config)
    folder = local_folder(config.model)
    model_config = load_model_config(folder)
    mesh = make_mesh(config.mesh.data, config.mesh.expert, replica=config.mesh.replica)
    check_fit(config, model_config, mesh)
    check_memory(config, model_config, mesh)
    if config.init == "pretrained":
        open_source(folder)  # finds what is missing or cut short by names and sizes
    experts = given_experts(config, model_config)
    check_rates(config.optimizer.rates, roles_to_train(config, model_config, experts))
    return run, folder, model_config, mesh, experts


@contextmanager
def own_run(setup: Setup) -> Iterator[None]:
    """Make the run's folder, which no other run changes until the end of the block.

    Blocks for one setup may lie in each other.

    Raises:
        InputError: it cannot be written to, is not the same one for all processes, or another run
            is at work in it.
    """
    run = setup.run
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(run.owned())
            run.check(setup.config)  # another run may have come between
            run.create(setup.config)

        on_first_process(begin, "run folder")
        with on_all_processes("output"):
            if not seen(run.config):
                raise InputError(
                    f"output: process {jax.process_index()} does not see {run.config}; expected a "
                    "folder that all processes share"
                )
        yield


def read_data(
    config: RunConfig, tokenizer: Tokenizer
) -> tuple[PackedDataset, Dataset, dict[str, PackedDataset]]:
    """`task_set`, `train_set` and `valid_sets` of a `Setup`.

    Raises:
        InputError: naming file and line.
    """
    data, length = config.data, config.data.sequence_length
    task_set = _packed(config, data.train, tokenizer, length)
    train_set: Dataset = task_set
    valid_sets = {"task": _packed(config, data.valid, tokenizer, length)} if data.valid else {}
    if data.mix:
        sources = [Source("task", 1.0, task_set)]
        for name, source in data.mix.items():
            packed = _packed(config, source.train, tokenizer, length)
            sources.append(Source(name, source.weight, packed))
            if source.valid:
                valid_sets[name] = _packed(config, source.valid, tokenizer, length)
        train_set = MixedDataset(tuple(sources))
    return task_set, train_set, valid_sets


def given_experts(config: RunConfig, model: ModelConfig) -> ExpertConfig | None:
    """The experts to train, if nothing is to be measured; see `Setup.experts`.

    Raises:
        InputError: the file does not fit the model.
    """
    run, select = RunFolder(config.output), config.select
    if not config.selects_experts:
        return None
    chosen = Path(config.expert_cfg) if config.expert_cfg is not None else run.expert_cfg
    where = str(chosen)
    if chosen.exists():
        experts = ExpertConfig.load(chosen)
        try:
            check_experts(experts, model)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    elif select.scores:
        where = "select.scores"
        tasks = load_tasks(select.scores, model)
        experts = choose_experts(select, tasks, model, config.dtype)
    else:
        return None
    if config.method == "lora":
        if not experts.num_experts_selected:
            raise InputError(f"{where}: selects no expert for lora.targets: selected_experts")
        if experts.also:
            raise InputError(
                f"{where}: trains {', '.join(experts.also)} too; with method lora, lora.targets "
                "says what is trained besides routed experts"
            )
    return experts


def roles_to_train(
    config: RunConfig, model: ModelConfig, experts: ExpertConfig | None
) -> frozenset[str]:
    """The roles of what a run will train.

    Args:
        experts: the ones to train, where they are known.
    """
    if config.selects_experts and experts is None:  # any will do
        experts = ExpertConfig({model.moe_layers[0]: (0,)}, config.select.also)
    if config.method == "lora":
        return trained_roles(low_rank_updates(config, model, experts), model)
    return trained_roles(experts, model)


def low_rank_updates(config: RunConfig, model: ModelConfig, selected: ExpertConfig | None) -> LoRA:
    """What `method: lora` trains; see `LoRA.on`."""
    lora = config.lora
    return LoRA.on(model, lora.rank, lora.alpha, lora.targets, selected)


def check_fit(config: RunConfig, model: ModelConfig, mesh: Mesh) -> None:
    """Check that a model and its batches can be split over a mesh.

    Raises:
        InputError: naming the key that is wrong.
    """
    if model.router.num_experts % mesh.shape[EXPERT]:
        raise InputError(
            f"mesh.expert: {mesh.shape[EXPERT]} does not divide the model's "
            f"{model.router.num_experts} experts"
        )
    if config.method == "lora" and not config.selects_experts:
        low_rank_updates(config, model, None)
    micro_batch = config.train.batch_size // config.train.micro_batches
    _check_rows("data", config.data.sequence_length, model)
    if micro_batch % mesh.size:
        raise InputError(
            f"train.batch_size / train.micro_batches: {micro_batch} rows cannot be split over "
            f"{mesh.size} devices"
        )
    if config.selects_experts and config.expert_cfg is None:
        check_select(config.select, model, config.dtype)
        if not config.select.scores:  # nothing is scored else, and the defaults need not fit
            _check_rows("score", config.score.sequence_length, model)


def check_memory(config: RunConfig, model: ModelConfig, mesh: Mesh) -> None:
    """Check that a batch is not out of all proportion to the memory of a device.

    What surely is in it at one time is counted: a batch, and the input of a layer. The compiler
    knows the rest, when it has compiled the step.

    Raises:
        InputError: with the sizes.
    """
    train, length = config.train, config.data.sequence_length
    rows = train.batch_size // mesh.size
    arrays = sum(x.dtype.itemsize for x in batch_shapes(config, mesh).values() if x.ndim == 2)
    width = model.hidden_size * jnp.dtype(config.dtype).itemsize
    check_fits(
        rows * length * arrays + rows // train.micro_batches * length * width,
        f"train.batch_size: {train.batch_size} rows of {length} tokens take at least",
    )


def score_rows(
    config: RunConfig, model: ModelConfig, tokenizer: Tokenizer, task_set: PackedDataset
) -> PackedDataset:
    """The task's examples in rows of `score.sequence_length`.

    Raises:
        InputError: rows are longer than the model's limit, or too short for the examples.
    """
    length, data = config.score.sequence_length, config.data
    _check_rows("score", length, model)
    if length == task_set.sequence_length:
        return task_set
    longest = int(np.diff(task_set.documents.offsets).max()) - 1  # the last token is only a target
    if data.format == "chat" and data.too_long == "error" and longest > length:
        raise InputError(
            f"score.sequence_length: {length} tokens; the longest chat of data.train needs "
            f"{longest}; expected at least that, or data.too_long: cut or drop"
        )
    return _packed(config, data.train, tokenizer, length, "score.sequence_length")


def _check_rows(section: str, length: int, model: ModelConfig) -> None:
    if length > model.max_positions:
        raise InputError(
            f"{section}.sequence_length: {length} tokens; the model's limit is "
            f"{model.max_positions} (max_position_embeddings)"
        )


def _packed(
    config: RunConfig,
    paths: tuple[str, ...],
    tokenizer: Tokenizer,
    sequence_length: int,
    length_key: str = "data.sequence_length",
) -> PackedDataset:
    return build_dataset(
        paths,
        tokenizer,
        format=config.data.format,
        sequence_length=sequence_length,
        too_long=config.data.too_long,
        seed=config.seed,
        length_key=length_key,
    )


def measure_scores(setup: Setup, base: LoadedBase) -> ExpertScores:
    """Score the base model's experts on samples of the task's training data, its `score_set`."""
    config, dataset = setup.config, setup.score_set
    assert dataset is not None, "only what has no experts yet is scored"
    rows = sample_rows(dataset, config.score.samples, config.seed)
    batches = eval_batches(
        dataset,
        device_multiple(min(config.score.batch_size, len(rows)), setup.mesh),
        jax.process_index(),
        jax.process_count(),
        rows=rows,
    )
    provenance = {
        "model": config.model,
        "base_fingerprint": base.fingerprint,
        **setup.identity,
        "data_sha256": dataset.stats.sha256,
        "sequence_length": dataset.sequence_length,
        "seed": config.seed,
    }
    return score_experts(base.model, batches, provenance)


def check_scored_on(setup: Setup, base: LoadedBase) -> None:
    """Check that the experts to train were chosen by scores of this base.

    Raises:
        InputError: naming the scores, and what of the base differs.
    """
    config, run = setup.config, setup.run
    if config.expert_cfg is not None:
        return
    # Without given ones, those that the run measured before it was interrupted.
    named = config.select.scores or (
        [str(run.scores)] if (run.scores / SCORES_FILE).exists() else []
    )
    if config.select.groups_from is not None:
        named = [*named, config.select.groups_from]
    here = {"base_fingerprint": base.fingerprint, **setup.identity}
    for path, task in zip(named, load_tasks(named, setup.model_config), strict=True):
        if isinstance(task, ExpertScores):
            check_same_base(task.provenance, here, path, "measured on")


def load_pretrained(setup: Setup) -> LoadedBase:
    """The base model on the mesh.

    Raises:
        InputError: damaged weights, or some that are not finite.
    """
    base = load_base(setup.config.model, jnp.dtype(setup.config.dtype), setup.mesh)
    base.model.transport = setup.config.mesh.transport
    return base


def random_model(setup: Setup) -> Transformer:
    """A freshly initialised model on the mesh; every device makes only its part."""

    def make() -> Transformer:
        return Transformer(
            setup.model_config,
            rngs=nnx.Rngs(setup.config.seed),
            dtype=jnp.dtype(setup.config.dtype),
            param_dtype=jnp.float32,
            mesh=setup.mesh,
            transport=setup.config.mesh.transport,
        )

    graph, abstract = nnx.split(nnx.eval_shape(make))
    shardings = param_shardings(abstract, setup.mesh)
    return nnx.merge(graph, jax.jit(lambda: nnx.state(make()), out_shardings=shardings)())
