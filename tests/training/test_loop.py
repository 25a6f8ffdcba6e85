import dataclasses
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import apply_adapter, load_adapter
from esft_jax.checkpoint.load import load_base, load_model
from esft_jax.config import RunConfig, load_config
from esft_jax.data.pipeline import PackedDataset
from esft_jax.errors import Diverged, InputError
from esft_jax.files import write_text_atomic
from esft_jax.optimizer_config import OptimizerConfig
from esft_jax.planning.analysis import make_plan, open_case
from esft_jax.routing.groups import group_experts
from esft_jax.routing.scores import load_scores
from esft_jax.training import loop
from esft_jax.training import result as results
from esft_jax.training.result import Outcome, RunResult
from esft_jax.training.run_folder import RunFolder
from esft_jax.training.setup import open_setup, own_run
from esft_jax.training.timing import Stopwatch


def run(config: RunConfig) -> RunResult:
    return loop.run_training(open_setup(config), say=lambda text: None)


def adapter_tensors(config: RunConfig) -> dict[str, np.ndarray]:
    return load_file(f"{config.output}/adapter/model.safetensors")


@pytest.fixture(scope="module")
def finished(base, chats, tmp_path_factory):
    """One whole ESFT run: scoring, selecting, training on a 2 x 2 mesh."""
    config = RunConfig(
        model=str(base),
        output=str(tmp_path_factory.mktemp("runs") / "run"),
        dtype="float32",
        mesh={"data": 2, "expert": 2},
        data={"train": (str(chats),), "valid": (str(chats),), "sequence_length": 64},
        score={"samples": 8, "sequence_length": 64, "batch_size": 4},
        select={"top_p": 0.3},
        train={
            "steps": 4,
            "batch_size": 4,
            "eval_every": 2,
            "save_every": 2,
            "log_every": 1,
            "verify_frozen": True,
        },
        optimizer={"learning_rate": 1e-3},
    )
    return config, run(config)


def test_run_folder_holds_everything(finished) -> None:
    config, result = finished
    folder = result.folder
    assert load_config(folder / "config.yaml") == config
    assert {p.name for p in (folder / "scores").iterdir()} == {
        "routing.npz",
        "scores.json",
        "summary.json",
    }
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last", "best"}
    assert any((folder / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert {"train/grad_norm", "speed/tokens_per_second", "train/learning_rate"} <= lines[1].keys()
    for line in (line for line in lines if "train/loss" in line):
        times = [line[f"speed/step_seconds_{name}"] for name in ("p50", "p90", "p99", "max")]
        assert 0 < times[0] == times[3]  # every step is logged
        tokens = 4 * 64 / times[0]
        assert line["speed/tokens_per_second"] == pytest.approx(tokens)
        assert line["speed/tokens_per_second_per_process"] == pytest.approx(tokens)
        assert 0 < line["speed/input_seconds"] < times[0]
        assert "speed/mfu" not in line  # a CPU has no published peak
    assert all(abs(line["time"] - time.time()) < 600 for line in lines)
    valid = {line["step"]: line["valid/loss"] for line in lines if "valid/loss" in line}
    assert list(valid) == [0, 2, 4]
    assert valid[4] < valid[2] < valid[0]
    assert result.valid_loss == pytest.approx(valid[4])


def test_adapter_holds_exactly_the_selected_experts_and_its_provenance(finished, base) -> None:
    config, result = finished
    experts = ExpertConfig.load(result.result / "expert_cfg.json")
    assert experts == result.experts
    tensors = adapter_tensors(config)
    assert len(tensors) == 3 * experts.num_experts_selected
    assert sum(tensor.size for tensor in tensors.values()) == result.trained
    manifest = json.loads((result.result / "manifest.json").read_text())
    assert manifest["base_fingerprint"] == load_base(base).fingerprint
    assert (manifest["select"]["top_p"], manifest["step"]) == (0.3, 4)
    assert manifest["dtype"] == config.dtype
    assert manifest["scores_sha256"]
    assert list(manifest["data_sha256"]) == list(config.data.train)


def test_adapter_changes_the_selected_experts_only(finished, base) -> None:
    _, result = finished
    loaded = load_base(base, np.float32)
    apply_adapter(loaded.model, load_adapter(result.result), loaded.fingerprint)
    before = load_model(base)
    experts = loaded.model.moe_blocks.moe.experts
    old = before.moe_blocks.moe.experts
    changed = (np.asarray(experts.gate_up[...]) != np.asarray(old.gate_up[...])).any(axis=(2, 3))
    layers = loaded.model.config.moe_layers
    found = {layer: tuple(np.flatnonzero(row)) for layer, row in zip(layers, changed, strict=True)}
    assert found == {layer: tuple(sorted(ids)) for layer, ids in result.experts.experts.items()}
    np.testing.assert_array_equal(loaded.model.embedding[...], before.embedding[...])


def test_a_checkpoint_is_at_the_batches_used_not_those_made_ahead(finished) -> None:
    _, result = finished
    path = result.folder / "checkpoints" / "last" / "4" / "position" / "metadata"
    assert json.loads(path.read_text())["data"] == {"next_index": 4}


def test_model_flops_are_those_that_a_plan_counts(finished, monkeypatch) -> None:
    config, result = finished
    given = dataclasses.replace(config, expert_cfg=str(result.folder / "expert_cfg.json"))
    planned = make_plan(open_case(given, "cpu:4")).model_operations
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").open()]
    line = next(line for line in lines if "train/loss" in line)
    per_device = planned * line["speed/tokens_per_second"] / 4
    assert line["speed/model_flops_per_second_per_device"] == pytest.approx(per_device)

    monkeypatch.setattr(loop, "peak_flops", lambda kind: 2 * planned)
    rate = loop._Run._speed(
        SimpleNamespace(
            config=config,
            train_set=SimpleNamespace(sequence_length=64),
            token_flops=planned,
            mesh=SimpleNamespace(size=4),
        ),
        [0.5, 1.5],
        0.25,
    )
    assert rate["speed/tokens_per_second"] == 2 * 4 * 64 / 2
    assert rate["speed/mfu"] == pytest.approx(rate["speed/tokens_per_second"] / 4 / 2)
    assert rate["speed/input_seconds"] == 0.125


def test_time_is_counted_from_the_first_start(finished) -> None:
    _, result = finished
    timing = result.timing
    assert timing.step.p50 <= timing.step.max <= timing.spent["steps"]
    assert min(timing.spent.values()) > 0
    # Scoring and compiling are in the time, but are no work of the kinds that count.
    assert sum(timing.spent.values()) < timing.elapsed < result.seconds
    assert 0 < timing.goodput < 1


def test_the_step_never_calls_the_host(finished, tmp_path, monkeypatch) -> None:
    to_host = re.compile(r"\b(infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*callback")

    def calls_back(x: jax.Array) -> jax.Array:
        jax.debug.print("{x}", x=x)
        return x

    assert to_host.search(jax.jit(calls_back).lower(1.0).compile().as_text())
    compiled = []

    def keep_step(run: loop._Run, stopped, trackers) -> Outcome:
        compiled.append(run.train_step)
        return Outcome(0, None, None, Stopwatch(0.0).timing())

    monkeypatch.setattr(loop._Run, "train", keep_step)
    run(dataclasses.replace(finished[0], output=str(tmp_path / "run")))
    text = compiled[0].as_text()
    assert "all-reduce" in text and not to_host.search(text)


def test_a_stopped_run_continues_bit_for_bit(finished, tmp_path, monkeypatch) -> None:
    config, _ = finished
    again = dataclasses.replace(config, output=str(tmp_path / "again"))
    make_iterator = loop.train_iterator

    class Interrupted:
        """The same data; SIGTERM arrives while the third batch is fetched."""

        def __init__(self, *args, **kwargs):
            self.inner, self.count = make_iterator(*args, **kwargs), 0
            self.get_state, self.set_state = self.inner.get_state, self.inner.set_state
            self.close = self.inner.close

        def __next__(self):
            self.count += 1
            if self.count == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self.inner)

    monkeypatch.setattr(loop, "train_iterator", Interrupted)
    stopped = run(again)
    assert (stopped.step, stopped.result) == (3, None)
    assert stopped.stopped_by == signal.SIGTERM
    assert not (tmp_path / "again" / "adapter").exists()
    monkeypatch.setattr(loop, "train_iterator", make_iterator)
    saved = stopped.timing.spent["steps"]
    result = run(again)
    assert result.step == 4
    # The time of three steps comes from the checkpoint, and the pause counts as time of the run.
    assert result.timing.spent["steps"] > max(saved, result.timing.step.max)
    assert result.timing.elapsed > stopped.timing.elapsed + result.timing.step.max
    one, other = adapter_tensors(config), adapter_tensors(again)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)
    steps = [json.loads(s)["step"] for s in (tmp_path / "again/metrics.jsonl").open()]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3, 4}


def test_a_folder_that_not_every_process_sees(make_config, monkeypatch) -> None:
    setup = open_setup(make_config())
    monkeypatch.setattr("esft_jax.training.setup.seen", lambda path: False)
    with (
        pytest.raises(InputError, match=r"output: process 0 does not see .*run/config.yaml"),
        own_run(setup),
    ):
        pass


def test_a_signal_that_comes_too_late_is_not_lost(make_config, monkeypatch) -> None:
    """The run ends well; what comes after it is to stop."""
    config = make_config(train={"steps": 1, "batch_size": 4})
    write = results.save_adapter

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*args, **kwargs)

    monkeypatch.setattr(results, "save_adapter", interrupted)
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        result = run(config)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert result.result is not None and adapter_tensors(config)


def test_a_run_continues_with_other_micro_batches(finished, make_config, tmp_path) -> None:
    config, result = finished
    again = tmp_path / "again"
    shutil.copytree(result.folder, again)
    # On half of the devices, where as many rows may not fit.
    train = dataclasses.replace(config.train, steps=5, micro_batches=2)
    mesh = dataclasses.replace(config.mesh, data=1)
    more = dataclasses.replace(config, output=str(again), train=train, mesh=mesh)
    assert run(more).timing.step is not None  # the fifth step
    # Of the balance loss, each micro-batch has its own.
    full = dataclasses.replace(train, balance_loss=0.1, verify_frozen=False)
    balanced = make_config(method="full", train=full)
    balanced_run = RunFolder(balanced.output)
    balanced_run.create(balanced)
    other = dataclasses.replace(balanced.train, micro_batches=1)
    with pytest.raises(InputError, match=r"holds a run with train.micro_batches = 2, not 1"):
        balanced_run.check(dataclasses.replace(balanced, train=other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "holds a run with seed = 0, not 1"),
        ({"select": {"top_p": 0.5}}, "holds a run with select.top_p = 0.3, not 0.5"),
        ({"optimizer": {"moments": "bfloat16"}}, "optimizer.moments = 'float32', not 'bfloat16'"),
        ({"optimizer": {"masters": "bfloat16"}}, "optimizer.masters = 'float32', not 'bfloat16'"),
        ({"optimizer": OptimizerConfig(name="lion")}, "optimizer.name = 'adamw', not 'lion'"),
    ],
)
def test_a_run_is_not_continued_with_other_settings(finished, changes, message) -> None:
    config, _ = finished
    with pytest.raises(InputError, match=message):
        run(dataclasses.replace(config, **_rebuilt(config, changes)))


def _rebuilt(config: RunConfig, changes: dict) -> dict:
    return {
        key: dataclasses.replace(getattr(config, key), **value)
        if isinstance(value, dict)
        else value
        for key, value in changes.items()
    }


def test_a_checkpoint_of_other_facts_is_refused(finished) -> None:
    _, result = finished
    facts = {"base_fingerprint": "another"}
    checkpoint = loop.Checkpoints(result.folder / "checkpoints", facts, None)
    with pytest.raises(InputError, match="base_fingerprint = .*; this run has 'another'"):
        checkpoint.restore(None)


def test_a_diverged_run_ends_without_a_result(finished, tmp_path) -> None:
    config, _ = finished
    config = dataclasses.replace(
        config,
        output=str(tmp_path / "diverged"),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e38),
    )
    with pytest.raises(Diverged, match=r"step \d: .*loss is (nan|inf)"):
        run(config)
    assert not (tmp_path / "diverged" / "adapter").exists()


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_what_is_lost_is_said_of_every_source(make_config, chats, tmp_path, too_long) -> None:
    lines = chats.read_text().splitlines()[:1]
    long = lines[0].replace("What is", "What is " * 40)
    path = str(tmp_path / "long.jsonl")
    Path(path).write_text("\n".join([long] * 9 + lines) + "\n")
    data = make_config().data.__dict__ | {
        "train": [path],
        "valid": [path],
        "sequence_length": 32,
        "too_long": too_long,
        "mix": {"other": {"train": [path], "valid": [path]}},
    }
    score = {"samples": 8, "sequence_length": 28, "batch_size": 8}
    with pytest.raises(InputError, match=r"10 examples, and none .* score\.sequence_length"):
        open_setup(make_config(data=data, score=score | {"sequence_length": 4}))
    said = open_setup(make_config(data=data, score=score)).describe()
    train = ["train task (weight 1)", "train other (weight 1)"]
    names = [line.partition(":")[0] for line in said]
    passes = "4 updates of 4 rows"
    assert names == [*train, passes, "valid task", "valid other", "score"]
    for line in said:
        if not line.startswith(passes):
            assert ": 1 of 10 examples in 1 rows of " in line
            assert line.endswith(" with a loss, 9 dropped; read as messages")


def test_sources_are_mixed_by_weight_and_logged(make_config, chats, tmp_path) -> None:
    text = chats.read_text()
    (tmp_path / "other.jsonl").write_text(text.replace("What is", "Tell me"))
    other = {"train": [str(tmp_path / "other.jsonl")], "valid": [str(chats)], "weight": 3}
    data = make_config().data.__dict__ | {"sequence_length": 32, "mix": {"other": other}}
    train = {"steps": 4, "batch_size": 8, "eval_every": 4, "log_every": 1, "micro_batches": 2}
    result = run(make_config(data=data, train=train))
    _, *steps, valid = [json.loads(s) for s in (result.folder / "metrics.jsonl").open()]
    for line in steps:
        tokens = line["train/target_tokens/task"], line["train/target_tokens/other"]
        assert sum(tokens) == line["train/target_tokens"]
        losses = line["train/loss/task"], line["train/loss/other"]
        mean = (tokens[0] * losses[0] + tokens[1] * losses[1]) / sum(tokens)
        assert line["train/loss"] == pytest.approx(mean, rel=1e-5)
        # Of eight rows, two and six.
        assert line["train/epoch/other"] == pytest.approx(3 * line["train/epoch/task"])
        assert 2 < tokens[1] / tokens[0] < 4
    assert valid["valid/loss"] == valid["valid/loss/task"] == result.valid_loss
    # Here both sources are validated on the same examples.
    assert valid["valid/loss/other"] == valid["valid/loss/task"]
    assert valid["valid/target_tokens/other"] > 0
    manifest = json.loads((result.result / "manifest.json").read_text())
    assert list(manifest["data_sha256"]) == [str(chats), str(tmp_path / "other.jsonl")]
    # Experts are scored on the task alone.
    scores = json.loads((result.folder / "scores" / "scores.json").read_text())
    assert list(scores["provenance"]["data_sha256"]) == [str(chats)]


def test_groups_are_measured_selected_and_trained(make_config) -> None:
    config = make_config(select={"top_k": 4, "group_size": 2}, train={"steps": 1, "batch_size": 4})
    result = run(config)
    scores = load_scores(result.folder / "scores")
    for layer, together in zip(scores.layers, scores.together, strict=True):
        whole = {tuple(group) for group in group_experts(together, 2).tolist()}
        ids = set(result.experts.experts[layer])
        assert len(ids) == 4
        assert ids == {e for group in whole if ids & set(group) for e in group}


def test_selections_of_other_tasks_need_no_measuring(make_config, finished, tmp_path) -> None:
    scores, first = str(finished[1].folder / "scores"), finished[1].experts
    select = {"scores": [scores], "top_p": 0.3, "random_seed": 1}
    config = make_config(select=select, train={"steps": 1, "batch_size": 4})
    unrelated = Path(config.output) / "scores" / "scores.json"  # by an earlier `score`
    write_text_atomic(unrelated, "{}")
    result = run(config)
    assert unrelated.read_text() == "{}"
    assert json.loads((result.result / "manifest.json").read_text())["scores_sha256"] is None
    counts = {layer: len(ids) for layer, ids in first.experts.items()}
    assert {layer: len(ids) for layer, ids in result.experts.experts.items()} == counts
    assert result.experts != first
    assert adapter_tensors(config)
    wrong = dataclasses.replace(
        config,
        output=str(tmp_path / "wrong"),
        select=dataclasses.replace(config.select, top_p=None, top_k=9),
    )
    with pytest.raises(InputError, match=r"select.top_k: 9; the model has 8 experts per layer"):
        open_setup(wrong)


def test_rows_to_score_are_checked_before_anything_is_loaded(make_config, finished) -> None:
    score = {"samples": 8, "sequence_length": 8, "batch_size": 8}
    with pytest.raises(InputError, match=r"score.sequence_length: 8 tokens; the longest chat of"):
        open_setup(make_config(score=score))
    score["sequence_length"] = 4096
    with pytest.raises(InputError, match=r"score.sequence_length: 4096 tokens; the model's limit"):
        open_setup(make_config(score=score))
    # Nothing is scored where the experts are known.
    given = {"scores": [str(finished[1].folder / "expert_cfg.json")]}
    assert open_setup(make_config(score=score, select=given)).experts == finished[1].experts


def test_full_training_from_random_weights_writes_a_model(make_config) -> None:
    config = make_config(
        method="full",
        init="random",
        train={
            "steps": 3,
            "batch_size": 4,
            "micro_batches": 1,
            "balance_loss": 0.01,
            "log_every": 1,
        },
    )
    result = run(config)
    assert result.trained == result.total
    model = load_model(result.result)
    assert sum(x.size for x in jax.tree.leaves(loop.nnx.state(model))) == result.total
    lines = [json.loads(s) for s in (result.folder / "metrics.jsonl").open()]
    assert lines[-2]["train/loss"] < lines[1]["train/loss"]
    assert lines[1]["train/balance_loss"] > 2.9  # one per MoE layer at least


def test_shared_experts_and_other_modules_train_on_request(make_config, tmp_path) -> None:
    cfg = ExpertConfig({1: (0,), 3: (2, 5)}, also=("shared_experts", "non_expert_modules"))
    cfg.save(tmp_path / "cfg.json")
    # Stopped in between, it goes on with the rates and schedules of each part.
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 2, "rates": {"router": 1e-5}}
    config = make_config(expert_cfg=str(tmp_path / "cfg.json"), optimizer=optimizer)
    run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)))
    result = run(config)
    lines = [line for line in RunFolder(config.output).logged() if "train/learning_rate" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name, peak in {"train/learning_rate": 1e-3, "train/learning_rate/router": 1e-5}.items():
        np.testing.assert_allclose([line[name] / peak for line in lines], [0, 0.5, 1, 1], rtol=1e-6)
    names = adapter_tensors(config).keys()
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in names
    assert "model.layers.2.mlp.gate.weight" in names
    assert "model.embed_tokens.weight" in names
    experts = {name.split(".mlp.experts.")[0] for name in names if ".mlp.experts." in name}
    assert experts == {"model.layers.1", "model.layers.3"}
    untouched = 3 * 8 - 3  # base experts that no gradient reaches
    assert result.total - result.trained == untouched * 3 * 32 * 16


@pytest.mark.slow
def test_a_run_moves_to_smaller_meshes(finished, tmp_path) -> None:
    config, _ = finished

    def at(steps: int, output: str, **mesh: int) -> RunConfig:
        train = dataclasses.replace(config.train, steps=steps, batch_size=8)
        mesh = dataclasses.replace(config.mesh, **mesh)
        return dataclasses.replace(config, output=str(tmp_path / output), train=train, mesh=mesh)

    run(at(6, "stays", data=2, expert=4))
    for steps, data, expert in [(2, 2, 4), (4, 2, 2), (6, 1, 2)]:
        moved = at(steps, "moves", data=data, expert=expert)
        shutil.rmtree(tmp_path / "moves" / "adapter", ignore_errors=True)
        run(moved)
    expected = adapter_tensors(at(6, "stays"))
    for name, tensor in adapter_tensors(moved).items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-5)


LEAN = {"name": "adafactor", "moments": "bfloat16", "masters": "bfloat16", "learning_rate": 1e-3}


@pytest.mark.slow
def test_lean_states_continue_bit_for_bit_and_on_another_mesh(make_config, tmp_path) -> None:
    """Means over the sides of experts move with these; chance does not depend on the mesh."""
    experts = tmp_path / "experts.json"
    ExpertConfig({1: (0, 7), 2: (3,), 3: (2, 5)}, ("attention",)).save(experts)

    def trained(output: str, steps: int, **changes) -> dict[str, np.ndarray]:
        folder = str(tmp_path / output)
        given = make_config(output=folder, expert_cfg=str(experts), optimizer=LEAN, **changes)
        train = dataclasses.replace(given.train, steps=steps)
        run(dataclasses.replace(given, train=train))
        return adapter_tensors(given)

    whole = trained("whole", 4)
    trained("again", 2)
    shutil.copytree(tmp_path / "again", tmp_path / "moved")
    again = trained("again", 4)
    moved = trained("moved", 4, mesh={"data": 1, "expert": 4})
    for name, tensor in whole.items():
        np.testing.assert_array_equal(again[name], tensor, name)
        exact = tensor.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(tensor, exact, name)
        # Sums in another order turn a few chances the other way, by one step of bfloat16.
        assert (moved[name] == tensor).mean() > 0.95
        np.testing.assert_allclose(moved[name], tensor, rtol=2.0**-7, atol=1e-4)


@pytest.fixture
def poisoned(monkeypatch) -> list[str]:
    """A loss that is not a number: where its example was read, once a batch had it."""
    gather = PackedDataset.gather
    where: list[str] = []

    def gather_nan(dataset: PackedDataset, rows, size=None):
        batch = gather(dataset, rows, size)
        for b, row in enumerate(rows):
            if row == 3:
                batch["loss_weights"][b] *= np.nan
                where[:] = dataset.places([row])
        return batch

    monkeypatch.setattr(PackedDataset, "gather", gather_nan)
    return where


def test_updates_that_are_not_finite_are_skipped_and_listed(make_config, poisoned) -> None:
    train = {"steps": 8, "batch_size": 4, "log_every": 4, "save_every": 4}
    schedule = {"learning_rate": 1e-3, "warmup_steps": 8}
    data = make_config().data.__dict__ | {"valid": ()}
    config = make_config(train=train, data=data, optimizer=schedule)
    result = run(config)
    lines = [json.loads(s) for s in (result.folder / "metrics.jsonl").read_text().splitlines()]
    listed = {int(p.stem): p.read_text().splitlines() for p in result.folder.glob("skipped/*")}
    assert lines[-1]["train/skipped"] == len(listed) > 0
    # The warm-up waits for them.
    assert lines[-1]["train/learning_rate"] == pytest.approx(1e-3 * (7 - len(listed)) / 8)
    for examples in listed.values():
        assert poisoned[0] in examples and len(examples) < 20  # of 40
    assert all(np.isfinite(x).all() for x in adapter_tensors(config).values())


def test_skipped_updates_of_a_mix_name_the_right_file(
    make_config, poisoned, chats, tmp_path
) -> None:
    (tmp_path / "other.jsonl").write_text(chats.read_text())
    mix = {"other": {"train": [str(tmp_path / "other.jsonl")]}}
    data = make_config().data.__dict__ | {"valid": (), "mix": mix}
    config = make_config(train={"steps": 8, "batch_size": 4, "log_every": 4}, data=data)
    sources = open_setup(config).train_set.sources
    bad = {source.dataset.places([3])[0] for source in sources}
    assert len(bad) == 2
    listed = [set(p.read_text().splitlines()) for p in run(config).folder.glob("skipped/*")]
    assert all(bad & examples for examples in listed)
    assert bad <= set().union(*listed)


def test_too_many_skipped_updates_end_the_run_with_the_batch_named(make_config, poisoned) -> None:
    train = {"steps": 8, "batch_size": 4, "log_every": 4, "max_skipped": 0}
    config = make_config(train=train, data=make_config().data.__dict__ | {"valid": ()})
    with pytest.raises(Diverged, match=r"step \d+: .*not finite, in 1 updates.*skipped/\d+.txt"):
        run(config)
    assert not os.path.exists(f"{config.output}/adapter")
