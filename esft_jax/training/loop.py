"""A whole training run, from a configuration to an adapter."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float

from esft_jax.accelerators import peak_flops
from esft_jax.adapt.attach import attach
from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.adapt.partition import partition
from esft_jax.checkpoint.finite import check_result
from esft_jax.checkpoint.load import expert_reader
from esft_jax.config import load_config
from esft_jax.data.pipeline import PackedDataset, eval_batches, train_iterator
from esft_jax.errors import Diverged, InputError
from esft_jax.memory import check_fits
from esft_jax.model.transformer import Transformer
from esft_jax.processes import most_of_processes, on_first_process
from esft_jax.progress import progress_over
from esft_jax.sharding import place_batch
from esft_jax.training.checkpoint import Checkpoints, Position, abstract_state
from esft_jax.training.choosing import describe_placement, experts_to_train, loads_of
from esft_jax.training.hooks import Caller, Hook, Report, StepInfo
from esft_jax.training.loggers import Logger, open_trackers
from esft_jax.training.methods import trained_by
from esft_jax.training.metrics import Interval, grouped, peak_memory, speed_of
from esft_jax.training.metrics_log import MetricsLog
from esft_jax.training.operations import model_operations
from esft_jax.training.optimizer import make_optimizer, make_schedule
from esft_jax.training.profiler import Profiler
from esft_jax.training.program import known_refusals, trace_step
from esft_jax.training.result import (
    Outcome,
    RunResult,
    hash_of,
    trained_parameters,
    write_result,
)
from esft_jax.training.resume import facts_of, new_rate, restore
from esft_jax.training.setup import Setup, own_run
from esft_jax.training.signals import on_user_signal, stop_signal
from esft_jax.training.skipped import Skipped
from esft_jax.training.state import place_state
from esft_jax.training.step import Loss, make_eval_step, token_loss
from esft_jax.training.stopping import EarlyStopping
from esft_jax.training.timing import RunTiming, Spent, Stopwatch


def run_training(
    setup: Setup,
    say: Callable[[str], None] = print,
    *,
    on_log: Report | None = None,
    on_eval: Report | None = None,
    hooks: Sequence[Hook] = (),
    optimizer: optax.GradientTransformation | None = None,
    loss: Loss = token_loss,
) -> RunResult:
    """Train as configured; continue from the last checkpoint if the run folder has one.

    On several processes all call it, and all call what they are given.

    Args:
        setup: what `open_setup` made of a configuration.
        say: receives a line of text for every stage.
        on_log: receives step and metrics of every logged step, such as `train/loss` and
            `speed/tokens_per_second`.
        on_eval: receives step and losses of every evaluation, `valid/loss` first; at step 0 those
            of the model before training.
        hooks: called after every n-th step.
        optimizer: instead of the one that the section `optimizer` describes; any optax
            transformation, of the trained parameters only (`tuned_only`).
        loss: what is minimised, and evaluated on the validation sets; see `Loss`.

    Raises:
        InputError: damaged weights, a checkpoint of another run, or another process that trains in
            the folder; before any training. A checkpoint of another optimizer is known by its
            state, one of another loss by its name.
        Diverged: loss or parameters are not finite, or every update was skipped.
    """
    begin = time.perf_counter()
    caller = Caller(say, on_log, on_eval, hooks, optimizer, loss)
    if caller.own_loss and setup.config.train.balance_loss:
        raise InputError(
            f"train.balance_loss: {setup.config.train.balance_loss} beside an own loss; expected "
            "0, and an own loss that adds it (`balance_loss`)"
        )
    for line in setup.describe():
        say(line)
    if optimizer is not None:
        say("optimizer: the caller's own; the section says `moments` and `masters` alone")
    if caller.own_loss and setup.config.data.mix:
        say(
            "loss: the caller's own; neither training losses by source nor the load of experts are "
            "logged"
        )
    elif caller.own_loss:
        say("loss: the caller's own; the load of experts is not logged")
    with own_run(setup), open_trackers(setup.run, setup.config, say) as trackers:
        return _train(setup, caller, trackers, begin)


def _train(setup: Setup, caller: Caller, trackers: Sequence[Logger], begin: float) -> RunResult:
    config, say = setup.config, caller.say
    model = setup.load_base()
    experts = loads = None
    if config.selects_experts:
        experts = experts_to_train(setup, model, say)
        loads = loads_of(setup)
    trained = trained_by(config.method, config.lora, setup.base.config, experts)
    run = _Run(setup, model, trained, loads, caller)
    del model  # the run takes over its arrays
    if loads is not None and run.layout is not None:
        say(describe_placement(run.layout, loads))
    say(f"trained parameters: {run.trained:,} of {run.total:,} ({run.trained / run.total:.2%})")
    if run.step_bytes is not None:
        mebibytes = run.step_bytes / 2**20
        say(
            f"train step: {mebibytes:,.0f} MiB of arguments and temporaries per device; "
            f"compiled in {run.compile_seconds:.1f} s"
        )
    # A signal in the end must not cut the last checkpoint or the result short.
    with stop_signal() as stopped, closing(run.checkpoints):
        outcome = run.train(stopped, trackers)
        path = None if outcome.tuned is None else run.write(outcome)
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


class _Run:
    """The compiled functions, the state and the files of a run in progress."""

    def __init__(
        self,
        setup: Setup,
        model: Transformer,
        trained: Trained,
        loads: Float[np.ndarray, "L E"] | None,
        caller: Caller,
    ):
        self.caller = caller
        self.setup, self.trains = setup, trained
        self.config, self.folder, self.mesh = setup.config, setup.run, setup.mesh
        self.train_set, self.valid_sets = setup.train_set, setup.valid_sets
        self.total = sum(param.get_value().size for _, param in nnx.to_flat_state(nnx.state(model)))
        read = None if setup.base.source is None else expert_reader(setup.base.source)
        attach(model, trained, self.config.seed, loads, read)
        self.graph, tuned, self.frozen = partition(model, trained, self.config.optimizer.masters)
        nnx.update(model, tuned)  # so that it keeps no other copy of them
        self.frozen_hash = hash_of(self.frozen) if self.config.train.verify_frozen else None
        self.trained = trained_parameters(model, tuned)
        self.token_flops = model_operations(model.config, trained, self.train_set.sequence_length)
        self.layout = model.tuned_experts.layout if model.tuned_experts else None
        rows = self.layout.by_row() if self.layout else None
        self._compile(tuned)
        facts = facts_of(setup, trained, self.state.opt_state, caller.loss)
        keep = self.config.train.keep_checkpoints
        self.checkpoints = Checkpoints(self.folder.checkpoints, facts, rows, keep)
        self.best_loss: float | None = None
        self.stopping = EarlyStopping(self.config.train.early_stopping)
        self.skipped = Skipped(
            self.folder.skipped, self.train_set, self.config.train, self.config.seed
        )

    def _compile(self, tuned: nnx.State) -> None:
        optimizer = self.caller.optimizer
        if optimizer is None:
            optimizer = make_optimizer(self.config.optimizer, self.config.train.steps, self.mesh)
        moments = self.config.optimizer.moments
        self.state, self.shardings = place_state(optimizer, tuned, self.frozen, self.mesh, moments)
        begin = time.perf_counter()
        traced = trace_step(
            self.config.train,
            self.config.data,
            self.graph,
            optimizer,
            self.state,
            self.frozen,
            self.mesh,
            self.caller.loss,
            self.config.seed,
        )
        self.caller.say("train step: compiling")
        with known_refusals():
            self.train_step = traced.lower().compile()
        self.compile_seconds = time.perf_counter() - begin
        # Not every backend reports the memory of a program.
        memory = self.train_step.memory_analysis()
        self.step_bytes = (
            memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else None
        )
        if self.step_bytes is not None:
            check_fits(self.step_bytes, "train: arguments and temporaries of the step take")
        self.eval_step = jax.jit(make_eval_step(self.graph, self.caller.loss))

    def train(self, stopped: Callable[[], int | None], trackers: Sequence[Logger]) -> Outcome:
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
        start = self.checkpoints.last_step
        watch = Stopwatch(self.folder.begun(), self._resume(iterator))
        on_first_process(lambda: self.folder.keep(self.config), "run folder")
        loss = None
        profiler = Profiler(self.folder.profile, config)
        board = "tensorboard" in config.log_to
        with (
            closing(iterator),
            MetricsLog(
                self.folder, start, config.steps, tensorboard=board, trackers=trackers
            ) as log,
            closing(profiler),
            on_user_signal(profiler.request),
        ):
            interval = Interval()

            def log_interval(step: int) -> None:
                laps = watch.lap()  # waits for the step
                self.skipped.check(step)
                scalars = self._scalars(step, interval.take()) | self._speed(*laps)
                log.write(step, scalars)
                if self.caller.on_log is not None:
                    with watch.of_others():
                        self.caller.on_log(step, scalars)
                self.checkpoints.check()

            def evaluate(step: int) -> float:
                with watch.other("evaluation"):
                    losses = self.evaluate()
                    loss = _finite("validation loss", step, losses["valid/loss"])
                log.write(step, losses)
                if self.caller.on_eval is not None:
                    with watch.of_others():
                        self.caller.on_eval(step, losses)
                self.stopping.see(loss)
                return loss

            if self.valid_sets and start is None:
                evaluate(0)
            step = start or 0
            last = step == config.steps or self._stops_early(step)
            while not last:
                step += 1
                last = step == config.steps
                with profiler.step(step):
                    with watch.waiting_for_input():
                        batch = next(iterator)
                    self.state, metrics = self.train_step(self.state, self.frozen, batch)
                interval.add(metrics)
                self.skipped.add(metrics["skipped"])
                profiler.finish_step(metrics["skipped"])
                watch.step(metrics["skipped"])
                log.advance()
                if last or step % config.log_every == 0:
                    log_interval(step)
                if self.valid_sets and (last or step % config.eval_every == 0):
                    loss = evaluate(step)
                    # Without an update so far, the parameters are those of the base.
                    updated = int(self.state.skipped) < step
                    if updated and (self.best_loss is None or loss < self.best_loss):
                        self.best_loss = loss
                        with watch.other("checkpoints"):
                            self.checkpoints.save_best(step, self.state)
                    if not last and self._stops_early(step):
                        last = True
                        if interval:
                            log_interval(step)
                # Several processes agree where they would wait for each other anyway. At the last
                # step there is nothing to stop, and the signal is left for what comes after.
                ask = not last and (jax.process_count() == 1 or step % config.log_every == 0)
                stop = int(most_of_processes(stopped() or 0)) if ask else 0
                if last or stop or step % config.save_every == 0:
                    # A resumed run counts skipped updates, but does not list them again.
                    self.skipped.check(step)
                    with watch.other("checkpoints"):
                        position = Position(
                            iterator.get_state(),
                            self.best_loss,
                            config.steps,
                            watch.spent,
                            self.stopping.position(),
                        )
                        self.checkpoints.save(step, self.state, position)
                if due := self.caller.due(step):
                    done = StepInfo(
                        step, config.steps, self.state, self.frozen, metrics, self.graph
                    )
                    with watch.of_others():
                        for hook in due:
                            hook.call(done)
                if stop:
                    return Outcome(step, None, loss, watch.timing(), stop)
        return self._outcome(loss, watch.timing())

    def _stops_early(self, step: int) -> bool:
        """Whether the run ends here, since the validation loss falls no longer; says so."""
        if not self.stopping.due:
            return False
        config = self.config.train
        self.caller.say(
            f"early stopping: no lower validation loss in {config.early_stopping.patience} "
            f"evaluations; the run ends at step {step} of {config.steps}"
        )
        return True

    def _outcome(self, loss: float | None, timing: RunTiming) -> Outcome:
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
        return Outcome(step, tuned, loss, timing)

    def _resume(self, iterator: Any) -> Spent | None:
        """Restore the last checkpoint, if there is one. Returns the time spent until then."""
        if self.checkpoints.last_step is None:
            return None
        self.state, position = restore(self.checkpoints, self.state, self.shardings, iterator)
        steps = self.config.train.steps
        self.caller.say(f"continues from step {int(self.state.step)} of {steps}")
        self.stopping.restore(position.stopping)
        if self.checkpoints.best_step is not None:
            self.best_loss = position.best_loss
        self.skipped.count = int(self.state.skipped)
        if self.caller.optimizer is None:
            # Until a run goes on, `config.yaml` is that of its last start.
            before = position.steps or load_config(self.folder.config).train.steps
            changed = new_rate(self.config.optimizer, before, steps, self.state)
            if changed is not None:
                self.caller.say(changed)
        return position.spent

    def _speed(self, steps: Sequence[float], waited: float) -> dict[str, float]:
        """Of the updates since the last line; see `speed_of`."""
        tokens = self.config.train.batch_size * self.train_set.sequence_length
        return speed_of(
            steps,
            most_of_processes(waited),
            tokens,
            self.token_flops * tokens / self.mesh.size,
            peak_flops(jax.devices()[0].device_kind),
        )

    def _scalars(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """What a line says besides the speed.

        Args:
            metrics: of the updates since the last line, without groups.
        """
        config, rates = self.config.optimizer, {}
        if self.caller.optimizer is None:
            # Updates that were skipped do not count for the schedule.
            updates = max(step - 1 - self.skipped.count, 0)
            rates = {
                "learning_rate" + (f"/{part}" if part else ""): float(
                    make_schedule(config, self.config.train.steps, part)(updates)
                )
                for part in (None, *config.rates)
            }
        scalars = {
            **metrics,
            **rates,
            **self.train_set.epochs(step * self.config.train.batch_size),
            "peak_memory_bytes": peak_memory(),
            "trained_share": self.trained / self.total,
        }
        return {grouped(name): value for name, value in scalars.items()}

    def evaluate(self) -> dict[str, float]:
        """Mean losses over the validation sets in nats per token, by metric name.

        `valid/loss` is that of the task. Of several sources: also `valid/loss/NAME` and
        `valid/target_tokens/NAME` (of an own loss, `valid/loss_weight/NAME`).
        """
        sums = {name: self._valid_sums(dataset) for name, dataset in self.valid_sets.items()}
        means = {
            name: total / weight if weight else math.nan for name, (total, weight) in sums.items()
        }
        metrics = {"valid/loss": means["task"]}
        if self.config.data.mix:
            weighed = "loss_weight" if self.caller.own_loss else "target_tokens"
            for name, (_, weight) in sums.items():
                metrics |= {f"valid/loss/{name}": means[name], f"valid/{weighed}/{name}": weight}
        return metrics

    def _valid_sums(self, dataset: PackedDataset) -> tuple[float, float]:
        """Sum and weight of the loss over a validation set."""
        size = self.config.train.batch_size // self.config.train.micro_batches
        batches = eval_batches(dataset, size, jax.process_index(), jax.process_count())
        sums: list[Any] = []
        for batch in progress_over(
            batches, "validate", math.ceil(len(dataset) / size), leave=False
        ):
            batch = place_batch(batch, self.mesh)
            sums.append(self.eval_step(self.state.tuned, self.frozen, batch))
            jax.block_until_ready(sums[-2:-1])  # the next batch is made while one is computed
        total, weight = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        return float(total), float(weight)

    def write(self, outcome: Outcome) -> Path:
        """Write the result; see `write_result`."""
        if self.frozen_hash is not None and hash_of(self.frozen) != self.frozen_hash:
            raise RuntimeError("a frozen weight changed during training; the result is not written")
        model = nnx.merge(self.graph, outcome.tuned, self.frozen)
        return write_result(self.setup, self.trains, model, outcome)


def _finite(name: str, step: int, value: float) -> float:
    """The value; a diverged run ends here, with its last good checkpoint."""
    if not math.isfinite(value):
        raise Diverged(
            f"step {step}: {name} is {value}; expected a finite number "
            "(a lower optimizer.learning_rate, or other data)"
        )
    return value
