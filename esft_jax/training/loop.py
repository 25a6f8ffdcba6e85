"""A whole training run, from a configuration to an adapter."""

import dataclasses
import hashlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from esft_jax.accelerators import peak_flops
from esft_jax.adapt.attach import attach
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.adapt.partition import partition
from esft_jax.adapt.placement import Placement, expected_loads, place_experts
from esft_jax.adapt.slots import TunedLayout
from esft_jax.checkpoint.adapter import save_adapter, trained_tensors
from esft_jax.checkpoint.export import save_model
from esft_jax.checkpoint.finite import check_result
from esft_jax.checkpoint.load import LoadedBase
from esft_jax.checkpoint.peft import save_lora
from esft_jax.checkpoint.source import Source
from esft_jax.config import load_config
from esft_jax.data.mix import MixedDataset
from esft_jax.data.pipeline import PackedDataset, batch_rows, eval_batches, train_iterator
from esft_jax.errors import Diverged
from esft_jax.files import write_text_atomic
from esft_jax.memory import check_fits
from esft_jax.model.transformer import Transformer
from esft_jax.processes import most_of_processes, on_first_process
from esft_jax.routing.choose import choose_experts, describe
from esft_jax.routing.scores import load_scores
from esft_jax.sharding import EXPERT, place_batch
from esft_jax.training.checkpoint import Checkpoints, Position, abstract_state
from esft_jax.training.metrics_log import MetricsLog, peak_memory
from esft_jax.training.operations import model_operations
from esft_jax.training.optimizer import changed_rate, make_optimizer, make_schedule
from esft_jax.training.profiler import Profiler
from esft_jax.training.program import known_refusals, trace_step
from esft_jax.training.setup import (
    Setup,
    check_scored_on,
    load_pretrained,
    low_rank_updates,
    measure_scores,
    own_run,
    random_model,
)
from esft_jax.training.signals import on_user_signal, stop_signal
from esft_jax.training.state import place_state
from esft_jax.training.step import make_eval_step
from esft_jax.training.timing import Percentiles, RunTiming, Spent, Stopwatch


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        folder: the run's folder.
        result: `adapter/` or `model/` in it; None if the run was stopped before its end.
        step: updates whose parameters the result holds.
        valid_loss: its mean validation loss in nats per token, if there is a validation set.
        trained, total: parameters trained, and in the model.
        experts: the routed experts that were trained, or updated; None where all are.
        step_bytes: arguments and temporaries of the update, per device; None where the backend does
            not say.
        seconds: spent in this call.
        timing: of its steps, and of the run as a whole.
        stopped_by: the signal that stopped it before its end, such as `signal.SIGINT`.
    """

    folder: Path
    result: Path | None
    step: int
    valid_loss: float | None
    trained: int
    total: int
    experts: ExpertConfig | None
    step_bytes: int | None
    seconds: float
    timing: RunTiming
    stopped_by: int | None = None


def run_training(setup: Setup, say: Callable[[str], None] = print) -> RunResult:
    """Train as configured; continue from the last checkpoint if the run folder has one.

    Args:
        setup: what `open_setup` made of a configuration.
        say: receives a line of text for every stage.

    Raises:
        InputError: damaged weights, a checkpoint of another run, or another process that trains in
            the folder; before any training.
        Diverged: loss or parameters are not finite, or every update was skipped.
    """
    begin = time.perf_counter()
    for line in _describe_data(setup):
        say(line)
    with own_run(setup):
        return _train(setup, say, begin)


def _train(setup: Setup, say: Callable[[str], None], begin: float) -> RunResult:
    base = load_pretrained(setup) if setup.config.init == "pretrained" else None
    trained: Trained = None
    experts = loads = None
    if base is not None and setup.config.selects_experts:
        trained = experts = _choose_experts(setup, base, say)
        loads = _expected_loads(setup)
    if setup.config.method == "lora":
        trained = low_rank_updates(setup.config, setup.model_config, experts)
    if base is None:
        run = _Run(setup, random_model(setup), None, trained, loads, say)
    else:
        run = _Run(setup, base.model, base.source, trained, loads, say)
    del base  # the run takes over its arrays
    if loads is not None and run.layout is not None:
        say(_describe_placement(run.layout, loads))
    say(f"trained parameters: {run.trained:,} of {run.total:,} ({run.trained / run.total:.2%})")
    if run.step_bytes is not None:
        mebibytes = run.step_bytes / 2**20
        say(
            f"train step: {mebibytes:,.0f} MiB of arguments and temporaries per device; "
            f"compiled in {run.compile_seconds:.1f} s"
        )
    # A signal in the end must not cut the last checkpoint or the result short.
    with stop_signal() as stopped, closing(run.checkpoints):
        outcome = run.train(stopped)
        path = None if outcome.tuned is None else run.write_result(outcome)
    if path is not None and (late := stopped()):
        signal.raise_signal(late)  # too late for the loop, but what comes next is to stop
    return RunResult(
        setup.run.path,
        path,
        outcome.step,
        outcome.valid_loss,
        run.trained,
        run.total,
        experts,
        run.step_bytes,
        time.perf_counter() - begin,
        outcome.timing,
        outcome.stopped_by,
    )


def _describe_data(setup: Setup) -> list[str]:
    if isinstance(setup.train_set, MixedDataset):
        train = [
            f"train {source.name} (weight {source.weight:g}): {source.dataset.describe()}"
            for source in setup.train_set.sources
        ]
    else:
        train = [f"train: {setup.task_set.describe()}"]
    valid = [
        f"{'valid' if len(train) == 1 else f'valid {name}'}: {dataset.describe()}"
        for name, dataset in setup.valid_sets.items()
    ]
    rows = setup.score_set
    score = [] if rows is None or rows is setup.task_set else [f"score: {rows.describe()}"]
    return train + valid + score


def _choose_experts(setup: Setup, base: LoadedBase, say: Callable[[str], None]) -> ExpertConfig:
    """The experts that were given, or newly scored and selected ones; kept in the run folder."""
    experts, select = setup.experts, setup.config.select
    if experts is not None:
        check_scored_on(setup, base)
        say(f"experts: {experts.num_experts_selected} given")
    else:
        scores = measure_scores(setup, base)
        on_first_process(lambda: scores.save(setup.run.scores), "scores")
        experts = choose_experts(select, [scores], setup.model_config, setup.config.dtype)
        say(
            f"experts: {experts.num_experts_selected} of {scores.token.size} selected by "
            f"{describe(select)}"
        )
    on_first_process(lambda: experts.save(setup.run.expert_cfg), "experts")
    return experts


def _expected_loads(setup: Setup) -> Float[np.ndarray, "L E"] | None:
    """What the scores say of the experts' shares of tokens, where it decides where they lie."""
    given = setup.config.expert_cfg is not None or setup.config.select.scores
    if given or setup.mesh.shape[EXPERT] == 1:
        return None
    return load_scores(setup.run.scores).token


def _describe_placement(layout: TunedLayout, loads: Float[np.ndarray, "L E"]) -> str:
    def busiest(placement: Placement) -> float:
        return expected_loads(placement, layout.selected, layout.shards, loads).max()

    before = place_experts(layout.selected, layout.num_experts, layout.shards)
    rows = np.bincount([row // layout.rows_per_shard for *_, row in layout.rows()])
    return (
        f"placement on {layout.shards} devices: {rows.min()} to {rows.max()} tuned experts each; "
        f"expected tokens of the busiest in any layer {busiest(before):.2f} times the mean, "
        f"now {busiest(layout.placement):.2f}"
    )


@dataclass(frozen=True)
class _Outcome:
    """Where the loop ended: the parameters to keep, or the signal that stopped it before."""

    step: int
    tuned: nnx.State | None
    valid_loss: float | None
    timing: RunTiming
    stopped_by: int | None = None


class _Run:
    """The compiled functions, the state and the files of a run in progress."""

    def __init__(
        self,
        setup: Setup,
        model: Transformer,
        source: Source | None,
        trained: Trained,
        loads: Float[np.ndarray, "L E"] | None,
        say: Callable[[str], None],
    ):
        self.say = say
        self.setup, self.source, self.trains = setup, source, trained
        self.config, self.folder, self.mesh = setup.config, setup.run, setup.mesh
        self.train_set, self.valid_sets = setup.train_set, setup.valid_sets
        self.total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
        attach(model, trained, self.config.seed, loads)
        self.graph, tuned, self.frozen = partition(model, trained)
        self.frozen_hash = self._hash_frozen() if self.config.train.verify_frozen else None
        self.trained = trained_parameters(model, tuned)
        self.token_flops = model_operations(model.config, trained, self.train_set.sequence_length)
        self.layout = model.tuned_experts.layout if model.tuned_experts else None
        rows = self.layout.by_row() if self.layout else None
        self._compile(tuned)
        self.checkpoints = Checkpoints(self.folder.checkpoints, self._facts(), rows)
        self.best_loss: float | None = None
        self.skipped = 0

    def _compile(self, tuned: nnx.State) -> None:
        optimizer = make_optimizer(self.config.optimizer, self.config.train.steps)
        self.state, self.shardings = place_state(optimizer, tuned, self.frozen, self.mesh)
        begin = time.perf_counter()
        traced = trace_step(self.config, self.graph, optimizer, self.state, self.frozen, self.mesh)
        with known_refusals():
            self.train_step = traced.lower().compile()
        self.compile_seconds = time.perf_counter() - begin
        # Not every backend reports it.
        memory = self.train_step.memory_analysis()
        self.step_bytes = (
            memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else None
        )
        if self.step_bytes is not None:
            check_fits(self.step_bytes, "train: arguments and temporaries of the step take")
        self.eval_step = jax.jit(make_eval_step(self.graph))

    def _facts(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption."""
        experts = self.trains.experts if isinstance(self.trains, LoRA) else self.trains
        return {
            "base_fingerprint": self.source.fingerprint if self.source else None,
            **self.setup.identity,
            "experts": experts and {str(k): list(v) for k, v in experts.experts.items()},
            "data_sha256": self.train_set.stats.sha256,
            # They choose the best step.
            "valid_sha256": {name: s.stats.sha256 for name, s in self.valid_sets.items()},
        }

    def train(self, stopped: Callable[[], int | None]) -> _Outcome:
        """Run to the last step, or until a signal has asked to stop."""
        config = self.config.train
        iterator = train_iterator(
            self.train_set,
            batch_size=config.batch_size,
            seed=self.config.seed,
            place=lambda batch: place_batch(batch, self.mesh),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        watch = Stopwatch(self.folder.begun(), self._resume(iterator))
        on_first_process(lambda: self.folder.keep(self.config), "run folder")
        first = int(self.state.step)
        loss = None
        profiler = Profiler(self.folder.profile, config)
        with (
            closing(iterator),
            MetricsLog(self.folder, first, config.steps) as log,
            closing(profiler),
            on_user_signal(profiler.request),
        ):
            skipped: list[jax.Array] = []  # counted so far, by step since the last logged one
            for step in range(first + 1, config.steps + 1):
                last = step == config.steps
                with profiler.step(step):
                    with watch.waiting_for_input():
                        batch = next(iterator)
                    self.state, metrics = self.train_step(self.state, self.frozen, batch)
                skipped.append(metrics["skipped"])
                profiler.finish_step(skipped[-1])
                watch.step(skipped[-1])
                log.advance()
                if last or step % config.log_every == 0:
                    laps = watch.lap()  # waits for the step
                    self._check_skipped(step, jax.device_get(skipped))
                    skipped.clear()
                    log.write(step, self._scalars(step, metrics) | self._speed(*laps))
                    self.checkpoints.check()
                if self.valid_sets and (last or step % config.eval_every == 0):
                    with watch.other("evaluation"):
                        losses = self.evaluate()
                        loss = _finite("validation loss", step, losses["valid_loss"])
                    log.write(step, losses)
                    # Without an update so far it would be the base.
                    updated = int(self.state.skipped) < step
                    if updated and (self.best_loss is None or loss < self.best_loss):
                        self.best_loss = loss
                        with watch.other("checkpoints"):
                            self.checkpoints.save_best(step, self.state)
                # Several processes agree where they would wait for each other anyway. At the last
                # step there is nothing to stop, and the signal is left for what comes after.
                ask = not last and (jax.process_count() == 1 or step % config.log_every == 0)
                stop = int(most_of_processes(stopped() or 0)) if ask else 0
                if last or stop or step % config.save_every == 0:
                    # A resumed run counts them, and would not list them again.
                    self._check_skipped(step, jax.device_get(skipped))
                    skipped.clear()
                    with watch.other("checkpoints"):
                        position = Position(
                            iterator.get_state(), self.best_loss, config.steps, watch.spent
                        )
                        self.checkpoints.save(step, self.state, position)
                    if stop:
                        return _Outcome(step, None, loss, watch.timing(), stop)
        return self._outcome(loss, watch.timing())

    def _outcome(self, loss: float | None, timing: RunTiming) -> _Outcome:
        """What the run keeps at its end.

        Raises:
            Diverged: nothing, for no update was made, or parameters are not finite.
        """
        step, tuned = int(self.state.step), self.state.tuned
        if int(self.state.skipped) == step:
            raise Diverged(
                f"step {step}: every update was skipped, since loss or gradients were not finite; "
                f"there is no result. The batches are listed in {self.folder.skipped} (a lower "
                "optimizer.learning_rate, or other data)"
            )
        if self.checkpoints.best_step is not None:
            step, loss = self.checkpoints.best_step, self.best_loss
            tuned = self.checkpoints.restore_best(abstract_state(self.state, self.shardings))
        lora = isinstance(self.trains, LoRA)  # factors are written as they are
        check_result(tuned, step, jnp.float32 if lora else jnp.dtype(self.config.dtype))
        return _Outcome(step, tuned, loss, timing)

    def _resume(self, iterator: Any) -> Spent | None:
        """Restore the last checkpoint, if there is one. Returns the time spent until then."""
        if self.checkpoints.last_step is None:
            return None
        self.state, position = self.checkpoints.restore(abstract_state(self.state, self.shardings))
        iterator.set_state(position.data)
        if self.checkpoints.best_step is not None:
            # Read for its checksums: damage is to be known now, not at the end.
            self.checkpoints.restore_best(abstract_state(self.state, self.shardings))
            self.best_loss = position.best_loss
        self.skipped = int(self.state.skipped)
        done, steps = int(self.state.step), self.config.train.steps
        if done < steps:
            updates = done - self.skipped
            # Until a run goes on, `config.yaml` is that of its last start.
            before = position.steps or load_config(self.folder.config).train.steps
            changed = changed_rate(self.config.optimizer, before, steps, updates)
            if changed is not None:
                self.say(changed)
        return position.spent

    def _check_skipped(self, last: int, counts: Sequence[int]) -> None:
        """Write down the batches of skipped updates, and end a run that has too many.

        Args:
            counts: updates skipped until each of the steps that end with `last`.
        """
        for step, count in enumerate(counts, last - len(counts) + 1):
            if count == self.skipped:
                continue
            self.skipped, config = int(count), self.config.train
            rows = batch_rows(self.train_set, config.batch_size, self.config.seed)[step - 1]
            examples = self.train_set.places(rows)
            listed = self.folder.skipped / f"{step}.txt"
            if jax.process_index() == 0:
                write_text_atomic(listed, "".join(f"{place}\n" for place in examples))
            if count > config.max_skipped:
                raise Diverged(
                    f"step {step}: loss or gradients are not finite, in {count} updates of this "
                    f"run; train.max_skipped allows {config.max_skipped}. The batch: {examples[0]} "
                    f"and {len(examples) - 1} more examples, listed in {listed} "
                    "(a lower optimizer.learning_rate, or other data)"
                )

    def _speed(self, steps: Sequence[float], waited: float) -> dict[str, float]:
        """Of the steps since the last logged one: tokens are positions, padding included."""
        seconds = sum(steps)
        tokens = len(steps) * self.config.train.batch_size * self.train_set.sequence_length
        flops = self.token_flops * tokens / seconds / self.mesh.size
        peak = peak_flops(jax.devices()[0].device_kind)
        times = dataclasses.asdict(Percentiles.of(steps))
        return {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_process": tokens / seconds / jax.process_count(),
            "model_flops_per_second_per_device": flops,
            **({} if peak is None else {"mfu": flops / peak}),
            **{f"step_seconds_{name}": value for name, value in times.items()},
            "input_seconds": most_of_processes(waited) / len(steps),
        }

    def _scalars(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        config = self.config.optimizer
        updates = max(step - 1 - self.skipped, 0)  # skipped ones do not count for the schedule
        rates = {
            "learning_rate" + (f"/{part}" if part else ""): float(
                make_schedule(config, self.config.train.steps, part)(updates)
            )
            for part in (None, *config.rates)
        }
        return {
            **{name: float(value) for name, value in jax.device_get(metrics).items()},
            **rates,
            **self.train_set.epochs(step * self.config.train.batch_size),
            "peak_memory_bytes": peak_memory(),
            "trained_share": self.trained / self.total,
        }

    def evaluate(self) -> dict[str, float]:
        """Mean losses over the validation sets in nats per token, by metric name.

        `valid_loss` is that of the task. Of several sources: also `valid_loss/NAME` and
        `valid_target_tokens/NAME`.
        """
        sums = {name: self._valid_sums(dataset) for name, dataset in self.valid_sets.items()}
        metrics = {"valid_loss": sums["task"][0] / sums["task"][1]}
        if self.config.data.mix:
            for name, (total, weight) in sums.items():
                metrics |= {
                    f"valid_loss/{name}": total / weight,
                    f"valid_target_tokens/{name}": weight,
                }
        return metrics

    def _valid_sums(self, dataset: PackedDataset) -> tuple[float, float]:
        """Summed loss over a validation set, and the number of its target tokens."""
        size = self.config.train.batch_size // self.config.train.micro_batches
        # Read at the end, so that the next batch is made while one is computed.
        sums = [
            self.eval_step(self.state.tuned, self.frozen, place_batch(batch, self.mesh))
            for batch in eval_batches(dataset, size, jax.process_index(), jax.process_count())
        ]
        total, weight = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        return float(total), float(weight)

    def write_result(self, outcome: _Outcome) -> Path:
        """Write `adapter/` (esft, lora) or `model/` (full)."""
        if self.frozen_hash is not None and self._hash_frozen() != self.frozen_hash:
            raise RuntimeError("a frozen weight changed during training; the result is not written")
        assert outcome.tuned is not None
        model = nnx.merge(self.graph, outcome.tuned, self.frozen)
        if self.trains is None:
            carried = None if self.source is None else self.source.carried
            save_model(
                model,
                self.folder.model,
                self.setup.folder,
                carried=carried,
                chat_format=self.setup.tokenizer.chat_format,
            )
            return self.folder.model
        assert self.source is not None
        config = self.config
        # Of given experts nothing is known of how they were chosen.
        given = config.expert_cfg is not None or not config.selects_experts
        measured = not given and not config.select.scores
        manifest = {
            "base_model": config.model,
            "base_fingerprint": self.source.fingerprint,
            **self.setup.identity,
            "dtype": config.dtype,
            "scores_sha256": _file_hash(self.folder.scores / "scores.json") if measured else None,
            "data_sha256": self.train_set.stats.sha256,
            "select": None if given else dataclasses.asdict(config.select),
            "step": outcome.step,
            "valid_loss": outcome.valid_loss,
        }
        if isinstance(self.trains, LoRA):
            save_lora(self.folder.adapter, model, self.trains, manifest)
            return self.folder.adapter
        tensors = trained_tensors(model, [path for path, _ in nnx.to_flat_state(outcome.tuned)])
        save_adapter(self.folder.adapter, tensors, self.trains, manifest)
        return self.folder.adapter

    def _hash_frozen(self) -> str:
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.frozen):
            for shard in leaf.addressable_shards:
                digest.update(np.asarray(shard.data).tobytes())
        return digest.hexdigest()


def trained_parameters(model: Transformer, tuned: nnx.State) -> int:
    """Number of trained parameters, without the padding rows of the tuned bank."""
    count = 0
    for path, param in nnx.to_flat_state(tuned):
        value = param[...]
        if path[0] == "tuned_experts" and model.tuned_experts is not None:
            count += len(model.tuned_experts.layout.rows()) * int(np.prod(value.shape[1:]))
        else:
            count += value.size
    return count


def _file_hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _finite(name: str, step: int, value: float) -> float:
    """The value; a diverged run ends here, with its last good checkpoint."""
    if not math.isfinite(value):
        raise Diverged(
            f"step {step}: {name} is {value}; expected a finite number "
            "(a lower optimizer.learning_rate, or other data)"
        )
    return value
