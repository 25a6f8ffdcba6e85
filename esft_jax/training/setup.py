"""What a run needs before any compute: checks, data, model, experts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import trained_roles
from esft_jax.adapt.parts import check_rates, roles_of
from esft_jax.checkpoint.identity import chat_record, tokenizer_fingerprint
from esft_jax.checkpoint.load import local_folder, open_source
from esft_jax.checkpoint.quantise import describe_quantisation
from esft_jax.config import RunConfig
from esft_jax.data.chat_template import ChatFormat
from esft_jax.data.mix import MixedDataset
from esft_jax.data.pipeline import Dataset, PackedDataset
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.files import seen
from esft_jax.model.transformer import Transformer
from esft_jax.processes import on_all_processes, on_first_process
from esft_jax.routing.choose import given_experts
from esft_jax.sharding import make_mesh
from esft_jax.training.base import Base
from esft_jax.training.fit import check_fit, check_memory
from esft_jax.training.methods import trained_by
from esft_jax.training.rows import (
    count_steps,
    describe_passes,
    general_rows,
    read_rows,
    score_rows,
)
from esft_jax.training.run_folder import RunFolder


@dataclass(frozen=True)
class Checked:
    """A checked configuration with what it names, except weights and data.

    Attributes:
        run: where results go.
        base: the model that the run begins with.
        mesh: of the whole run.
        experts: the ones to train, if nothing is to be measured: those of `expert_cfg`, of the run
            that is being resumed, or chosen by `select.scores`.
    """

    config: RunConfig
    run: RunFolder
    base: Base
    mesh: Mesh
    experts: ExpertConfig | None
    tokenizer: Tokenizer

    def load_base(self) -> Transformer:
        """The base on the mesh, quantised and kept as the run wants it.

        Raises:
            InputError: damaged weights, or some that are not finite.
        """
        config, experts = self.config, self.experts
        also = config.select.also if experts is None else experts.also
        return self.base.load(
            jnp.dtype(config.dtype),
            self.mesh,
            config.mesh.transport,
            config.seed,
            config.quantise.chosen,
            roles_of(also),  # all else that is trained are copies or factors
            config.frozen_memory,
        )


@dataclass(frozen=True)
class Setup(Checked):
    """The same with its data.

    Attributes:
        task_set: the rows of `data.train`.
        train_set: the same, mixed with those of `data.mix` if there are any.
        valid_sets: by source name, `task` first; empty without `data.valid`.
        score_set: the rows of `data.train` as experts are scored on them; None where `experts`
            are given.
        general_set: the rows of `score.general`; None where nothing is compared with them.
    """

    task_set: PackedDataset
    train_set: Dataset
    valid_sets: dict[str, PackedDataset]
    score_set: PackedDataset | None
    general_set: PackedDataset | None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes the base what it is: hashes, and the format of chats.

        All processes must ask together. Without a source there are no weights to hash.
        """
        base = self.base
        return {
            "base_fingerprint": None if base.source is None else base.source.fingerprint,
            "config_fingerprint": base.config.fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint(base.folder, self.tokenizer),
            **chat_record(self.tokenizer.chat_format),
        }

    def describe(self) -> list[str]:
        """A line for each source of rows, one for how often they are used, and one for each part
        that a converted base may keep quantised.
        """
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
        if self.general_set is not None:
            score.append(f"score, general sample: {self.general_set.describe()}")
        how, source = self.config.quantise.chosen, self.base.source
        quantised = describe_quantisation(source, how) if source and how else []
        passes = [describe_passes(self.config, self.train_set)]
        return train + passes + valid + score + quantised


def open_setup(config: RunConfig) -> Setup:
    """Read everything but weights, and check that it fits together.

    Raises:
        InputError: naming the key, file or line that is wrong.
    """
    checked = check_setup(config)
    data, seed = config.data, config.seed
    task_set, train_set, valid_sets = read_rows(data, checked.tokenizer, seed)
    config = count_steps(config, train_set)
    score_set = general_set = None
    if config.measures_scores and checked.experts is None:
        length = config.score.sequence_length
        score_set = score_rows(task_set, length, data, checked.tokenizer, seed)
        general_set = general_rows(config.score, data, checked.tokenizer, seed)
    found = {field.name: getattr(checked, field.name) for field in fields(checked)}
    return Setup(
        **{**found, "config": config},
        task_set=task_set,
        train_set=train_set,
        valid_sets=valid_sets,
        score_set=score_set,
        general_set=general_set,
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
    shape = load_model_config(folder) if source is None else source.config
    base = Base(config.model, folder, source, shape)
    mesh = make_mesh(config.mesh.data, config.mesh.expert, replica=config.mesh.replica)
    check_fit(base.config, mesh, config)
    token_bytes = base.config.hidden_size * jnp.dtype(config.dtype).itemsize
    check_memory(config.train, config.data.sequence_length, token_bytes, mesh.size)
    experts = None
    if config.selects_experts:
        experts = given_experts(
            config.select,
            config.expert_cfg,
            run.expert_cfg,
            base.config,
            config.dtype,
            low_rank=config.method == "lora",
        )
    # As long as they are not known, any will do.
    some = experts or ExpertConfig({base.config.moe_layers[0]: (0,)}, config.select.also)
    trained = trained_by(config.method, config.lora, base.config, some)
    check_rates(config.optimizer.rates, trained_roles(trained, base.config))
    data = config.data
    chats = ChatFormat.read(data.chat_template, data.template_arguments, data.stop_token)
    tokenizer = Tokenizer.load(base.folder, chats)
    tokenizer.check_vocabulary(base.config.vocab_size)
    return Checked(config, run, base, mesh, experts, tokenizer)


@contextmanager
def own_run(setup: Setup) -> Iterator[None]:
    """Make the run's folder, which no other run changes until the end of the block.

    Blocks for one setup may be nested.

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
