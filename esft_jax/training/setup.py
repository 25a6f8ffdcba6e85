"""What a run needs before any compute: checks, data, model, experts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA
from esft_jax.adapt.partition import check_experts, trained_roles
from esft_jax.adapt.parts import check_rates
from esft_jax.checkpoint.identity import chat_record, tokenizer_fingerprint
from esft_jax.checkpoint.load import local_folder, open_source
from esft_jax.checkpoint.source import Source
from esft_jax.config import RunConfig
from esft_jax.data.mix import MixedDataset
from esft_jax.data.mix import Source as MixedSource
from esft_jax.data.pipeline import (
    Dataset,
    PackedDataset,
    build_dataset,
)
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.files import seen
from esft_jax.memory import check_fits
from esft_jax.model.config import ModelConfig
from esft_jax.processes import on_all_processes, on_first_process
from esft_jax.routing.choose import check_select, choose_experts, load_tasks
from esft_jax.sharding import EXPERT, make_mesh
from esft_jax.training.program import batch_shapes
from esft_jax.training.run_folder import RunFolder


@dataclass(frozen=True)
class Checked:
    """A checked configuration with the model that it names, except weights.

    Attributes:
        run: where results go.
        folder: where the model's `config.json` and tokenizer lie.
        source: the base's files, opened; None for `init: random`.
        mesh: of the whole run.
        experts: the ones to train, if nothing is to be measured: those of `expert_cfg`, of the run
            that is being resumed, or chosen by `select.scores`.
    """

    config: RunConfig
    run: RunFolder
    folder: Path
    source: Source | None
    model_config: ModelConfig
    mesh: Mesh
    experts: ExpertConfig | None


@dataclass(frozen=True)
class Setup(Checked):
    """The same with its data.

    Attributes:
        task_set: the rows of `data.train`.
        train_set: the same, mixed with those of `data.mix` if there are any.
        valid_sets: by source name, `task` first; empty without `data.valid`.
        score_set: the rows of `data.train` as experts are scored on them; None where `experts`
            are given.
    """

    tokenizer: Tokenizer
    task_set: PackedDataset
    train_set: Dataset
    valid_sets: dict[str, PackedDataset]
    score_set: PackedDataset | None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the base is besides its weights: hashes, and chats' format."""
        return {
            "config_fingerprint": self.model_config.fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint(self.folder, self.tokenizer),
            **chat_record(self.tokenizer.chat_format),
        }

    def describe(self) -> list[str]:
        """A line for each source of rows."""
        if isinstance(self.train_set, MixedDataset):
            train = [
                f"train {source.name} (weight {source.weight:g}): {source.dataset.describe()}"
                for source in self.train_set.sources
            ]
        else:
            train = [f"train: {self.task_set.describe()}"]
        valid = [
            f"{'valid' if len(train) == 1 else f'valid {name}'}: {dataset.describe()}"
            for name, dataset in self.valid_sets.items()
        ]
        rows = self.score_set
        score = [] if rows is None or rows is self.task_set else [f"score: {rows.describe()}"]
        return train + valid + score


def open_setup(config: RunConfig) -> Setup:
    """Read everything but weights, and check that it fits together.

    Raises:
        InputError: naming the key, file or line that is wrong.
    """
    checked = check_setup(config)
    tokenizer = Tokenizer.load(checked.folder, config.data.chat_format())
    tokenizer.check_vocabulary(checked.model_config.vocab_size)
    task_set, train_set, valid_sets = read_data(config, tokenizer)
    score_set = None
    if config.selects_experts and checked.experts is None:
        score_set = score_rows(config, checked.model_config, tokenizer, task_set)
    return Setup(
        **vars(checked),
        tokenizer=tokenizer,
        task_set=task_set,
        train_set=train_set,
        valid_sets=valid_sets,
        score_set=score_set,
    )


def check_setup(config: RunConfig) -> Checked:
    """Read everything but weights and data, and check that it fits together.

    Raises:
        InputError: naming the key or file that is wrong.
    """
    run = RunFolder(config.output)
    run.check(config)
    folder = local_folder(config.model)
    # Opened, it finds by names and sizes what is missing or cut short.
    source = open_source(folder) if config.init == "pretrained" else None
    model_config = load_model_config(folder) if source is None else source.config
    mesh = make_mesh(config.mesh.data, config.mesh.expert, replica=config.mesh.replica)
    check_fit(config, model_config, mesh)
    check_memory(config, model_config, mesh)
    experts = given_experts(config, model_config, run.expert_cfg)
    check_rates(config.optimizer.rates, roles_to_train(config, model_config, experts))
    return Checked(config, run, folder, source, model_config, mesh, experts)


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
    data, pack = config.data, _packing(config, tokenizer)
    task_set = pack(data.train)
    train_set: Dataset = task_set
    valid_sets = {"task": pack(data.valid)} if data.valid else {}
    if data.mix:
        sources = [MixedSource("task", 1.0, task_set)]
        for name, source in data.mix.items():
            sources.append(MixedSource(name, source.weight, pack(source.train)))
            if source.valid:
                valid_sets[name] = pack(source.valid)
        train_set = MixedDataset(tuple(sources))
    return task_set, train_set, valid_sets


def given_experts(config: RunConfig, model: ModelConfig, kept: Path) -> ExpertConfig | None:
    """The experts to train, if nothing is to be measured; see `Checked.experts`.

    Args:
        kept: where a run keeps the experts that it has chosen.

    Raises:
        InputError: the file, or the rule to choose by, does not fit the model.
    """
    select = config.select
    if not config.selects_experts:
        return None
    if config.expert_cfg is None:
        check_select(select, model, config.dtype)
    chosen = Path(config.expert_cfg) if config.expert_cfg is not None else kept
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
    micro_batch = config.train.batch_size // config.train.micro_batches
    _check_rows("data", config.data.sequence_length, model)
    if micro_batch % mesh.size:
        raise InputError(
            f"train.batch_size / train.micro_batches: {micro_batch} rows cannot be split over "
            f"{mesh.size} devices"
        )
    scores = config.selects_experts and config.expert_cfg is None and not config.select.scores
    if scores:  # nothing is scored else, and the defaults need not fit
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
    batch = batch_shapes(train.batch_size, length, mesh, mixed=False)
    width = model.hidden_size * jnp.dtype(config.dtype).itemsize
    check_fits(
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) // mesh.size
        + rows // train.micro_batches * length * width,
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
    pack = _packing(config, tokenizer)
    return pack(data.train, sequence_length=length, length_key="score.sequence_length")


def _packing(config: RunConfig, tokenizer: Tokenizer) -> Callable[..., PackedDataset]:
    """`build_dataset` of the paths that it is given, as the configuration says."""
    return partial(
        build_dataset,
        tokenizer=tokenizer,
        format=config.data.format,
        sequence_length=config.data.sequence_length,
        too_long=config.data.too_long,
        seed=config.seed,
    )


def _check_rows(section: str, length: int, model: ModelConfig) -> None:
    if length > model.max_positions:
        raise InputError(
            f"{section}.sequence_length: {length} tokens; the model's limit is "
            f"{model.max_positions} (max_position_embeddings)"
        )
