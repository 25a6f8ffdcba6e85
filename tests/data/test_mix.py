import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest

from esft_jax.data.mix import Interleaving, MixedDataset, MixedSource
from esft_jax.data.pipeline import PackedDataset, batch_rows, build_dataset, train_iterator
from esft_jax.data.tokenizer import Tokenizer

S = 32


@pytest.fixture
def parts(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> list[PackedDataset]:
    """Two sources of different lengths, told apart by their words."""
    texts = ["the lazy dog " * 6 + str(n) for n in range(12)], ["what is " * 8] * 5
    return [
        build_dataset(
            [jsonl(*({"text": text} for text in lines), name=f"{name}.jsonl")],
            tokenizer,
            format="text",
            sequence_length=S,
        )
        for name, lines in zip(("task", "other"), texts, strict=True)
    ]


@pytest.fixture
def mixed(parts: list[PackedDataset]) -> MixedDataset:
    task, other = parts
    return MixedDataset((MixedSource("task", 1.0, task), MixedSource("other", 0.5, other)))


@pytest.mark.parametrize(
    "weights", [(1, 1), (1, 3), (0.7, 0.3), (1, 0.1, 2.5), (1, 1, 1, 1e-3), (5,)]
)
def test_every_source_gets_its_share_of_any_beginning(weights: tuple[float, ...]) -> None:
    mix = Interleaving(weights)
    given = [0] * len(weights)
    for row in range(500):
        assert mix.counts(row) == tuple(given)
        source, index = mix[row]
        assert index == given[source]
        given[source] += 1
        for place, (count, weight) in enumerate(zip(given, weights, strict=True)):
            assert abs(count - (row + 1) * weight / sum(weights)) < place + 1


def test_weights_are_exact_decimals() -> None:
    assert Interleaving((0.1, 0.3)).counts(4 * 10**17) == (10**17, 3 * 10**17)
    assert [Interleaving((1, 1))[n] for n in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_rows_are_those_of_the_sources(mixed: MixedDataset, parts: list[PackedDataset]) -> None:
    task, other = parts
    assert len(mixed) == len(task) + len(other)
    assert mixed.sequence_length == S
    rows = [len(task) + 1, 0, len(mixed) - 1, len(task) - 1]
    batch = mixed.gather(rows, size=6)
    assert batch.pop("sources").tolist() == [1, 0, 1, 0, 0, 0]
    local = [(other, 1), (task, 0), (other, len(other) - 1), (task, len(task) - 1)]
    for key, values in batch.items():
        expected = [dataset[row][key] for dataset, row in local]
        assert np.array_equal(values[:4], expected), key
    assert not batch["segment_ids"][4:].any() and not batch["loss_weights"][4:].any()
    assert mixed.places(rows[:2]) == [*other.places([1]), *task.places([0])]
    assert mixed.stats.target_tokens == task.stats.target_tokens + other.stats.target_tokens
    assert mixed.stats.sha256 == task.stats.sha256 | other.stats.sha256


def test_a_source_that_is_used_up_is_shuffled_anew_and_counted(
    mixed: MixedDataset, parts: list[PackedDataset]
) -> None:
    task, other = map(len, parts)
    rows = list(itertools.islice(iter(mixed.endless_rows(0)), 6 * other))
    from_task = [row for row in rows if row < task]
    from_other = [row - task for row in rows if row >= task]
    assert (len(from_task), len(from_other)) == (4 * other, 2 * other)
    first, second = from_other[:other], from_other[other:]
    assert sorted(first) == sorted(second) == list(range(other))
    assert first != second
    assert len(set(from_task[:task])) == task
    epochs = mixed.epochs(len(rows))
    assert epochs == {"epoch": 4 * other / task, "epoch/task": 4 * other / task, "epoch/other": 2}
    assert rows != list(itertools.islice(iter(mixed.endless_rows(1)), 6 * other))


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_sees_the_same_batches_and_resumes(
    mixed: MixedDataset, processes: int
) -> None:
    whole = train_iterator(mixed, batch_size=8, seed=3)
    parts = [
        train_iterator(mixed, batch_size=8, seed=3, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for step in range(6):
        if step == 3:
            state = json.loads(json.dumps(parts[0].get_state()))
            parts[0] = train_iterator(
                mixed, batch_size=8, seed=3, process_index=0, process_count=processes
            )
            parts[0].set_state(state)
        expected, found = next(whole), [next(part) for part in parts]
        rows = batch_rows(mixed, 8, seed=3)[step]
        for key, values in mixed.gather(rows).items():
            assert np.array_equal(expected[key], values), key
            assert np.array_equal(expected[key], np.concatenate([f[key] for f in found])), key
        assert set(expected["sources"].tolist()) == {0, 1}
