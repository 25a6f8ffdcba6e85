import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esft_jax.data.pipeline import (
    Batch,
    PackedDataset,
    build_dataset,
    eval_batches,
    pack,
    sample_rows,
    train_iterator,
)
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.data.tokens import tokenize
from esft_jax.errors import InputError

S = 56
KEYS = {"tokens", "targets", "segment_ids", "positions", "loss_weights"}


def chat(question: str, answer: str) -> dict[str, Any]:
    roles = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


CHATS = [chat(f"what is {i}", "the fox " * (i % 3 + 1)) for i in range(60)]
TEXTS = ["the lazy dog " * n + str(n) for n in range(40)]


@pytest.fixture
def chats(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> PackedDataset:
    return build_dataset([jsonl(*CHATS)], tokenizer, format="messages", sequence_length=S)


@pytest.fixture
def texts(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> PackedDataset:
    path = jsonl(*({"text": text} for text in TEXTS))
    return build_dataset([path], tokenizer, format="text", sequence_length=S)


def segments(row: Batch) -> list[tuple[list[int], list[int], list[float]]]:
    """Tokens, targets and weights of each document of a row."""
    found = []
    for segment in range(1, row["segment_ids"].max() + 1):
        here = row["segment_ids"] == segment
        assert np.array_equal(row["positions"][here], np.arange(here.sum()))
        found.append(
            tuple(row[key][here].tolist() for key in ("tokens", "targets", "loss_weights"))
        )
    return found


@pytest.mark.parametrize("name", ["chats", "texts"])
def test_rows_have_the_promised_form(
    name: str, request: pytest.FixtureRequest, tokenizer: Tokenizer
) -> None:
    dataset = request.getfixturevalue(name)
    assert len(dataset) == dataset.stats.rows > 4
    used = targets = 0
    for index in range(len(dataset)):
        row = dataset[index]
        assert set(row) == KEYS
        for key, values in row.items():
            assert values.shape == (S,)
            assert values.dtype == (np.float32 if key == "loss_weights" else np.int32)
        padding = row["segment_ids"] == 0
        assert (row["tokens"][padding] == tokenizer.pad_id).all()
        assert not row["loss_weights"][padding].any()
        assert not row["positions"][padding].any()
        assert (np.diff(padding.astype(int)) >= 0).all(), "padding comes last"
        assert (row["targets"] != tokenizer.bos_id).all()
        for tokens, next_tokens, _ in segments(row):
            assert next_tokens[:-1] == tokens[1:]
            assert tokenizer.bos_id not in tokens[1:], "documents share a segment"
        used += S - padding.sum()
        targets += row["loss_weights"].sum()
    assert used == dataset.stats.tokens
    assert targets == dataset.stats.target_tokens
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_every_chat_is_there_with_its_targets(chats: PackedDataset, tokenizer: Tokenizer) -> None:
    found = []
    for index in range(len(chats)):
        for tokens, targets, weights in segments(chats[index]):
            learned = [t for t, w in zip(targets, weights, strict=True) if w]
            found.append(([*tokens, targets[-1]], learned))
    expected = []
    for record in CHATS:
        tokens, learn = tokenizer.encode_chat(record["messages"])[0]
        expected.append((tokens, [t for t, flag in zip(tokens, learn, strict=True) if flag]))
    assert sorted(found) == sorted(expected)
    assert chats.stats.examples == len(CHATS) > len(chats), "rows hold several chats"


def test_every_text_token_is_a_target_once(texts: PackedDataset, tokenizer: Tokenizer) -> None:
    found: list[int] = []
    for index in range(len(texts)):
        for _, targets, weights in segments(texts[index]):
            assert set(weights) == {1.0}
            found += targets
    expected = [t for text in TEXTS for t in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert sorted(found) == sorted(expected)
    assert texts.stats.text_bytes == sum(map(len, TEXTS))


def test_stats_hash_the_source_files(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> None:
    paths = [jsonl({"text": t}, name=f"{t}.jsonl") for t in "ab"]
    stats = build_dataset(paths, tokenizer, format="text", sequence_length=S).stats
    assert stats.sha256 == {p: hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths}


def test_too_long_is_an_error_that_names_the_line(
    tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    long = chat("hi", "dog " * 60)
    length = len(tokenizer.encode_chat(long["messages"])[0][0])
    path = jsonl(CHATS[0], long)
    with pytest.raises(InputError) as caught:
        build_dataset([path], tokenizer, format="messages", sequence_length=S)
    assert str(caught.value).startswith(
        f"{path}:2: messages: {length} tokens; expected at most {S + 1} "
    )
    exact = build_dataset([path], tokenizer, format="messages", sequence_length=length - 1)
    assert exact.stats.cut == 0


def test_too_long_is_cut_and_counted(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> None:
    long = chat("hi", "dog " * 60)
    hopeless = chat("dog " * 60, "hi")
    path = jsonl(CHATS[0], long, hopeless)
    dataset = build_dataset([path], tokenizer, sequence_length=S, too_long="cut")
    assert (dataset.stats.examples, dataset.stats.cut, dataset.stats.dropped) == (2, 1, 1)
    assert dataset.describe().startswith(f"2 of 3 examples in 2 rows of {S}, ")
    assert dataset.describe().endswith(" with a loss, 1 cut to length, 1 dropped; read as messages")
    tokens, targets, weights = segments(dataset[0])[0]
    expected, learn = tokenizer.encode_chat(long["messages"])[0]
    assert [*tokens, targets[-1]] == expected[: S + 1]
    assert weights == [float(flag) for flag in learn[1 : S + 1]]
    path = jsonl(hopeless)
    with pytest.raises(InputError, match="1 examples, and none has a target"):
        build_dataset([path], tokenizer, sequence_length=S, too_long="cut")


def test_too_long_is_dropped_and_counted(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> None:
    long = chat("hi", "dog " * 60)
    path = jsonl(long, CHATS[0], long)
    dataset = build_dataset(
        [path], tokenizer, format="messages", sequence_length=S, too_long="drop"
    )
    assert (dataset.stats.examples, dataset.stats.cut, dataset.stats.dropped) == (1, 0, 2)
    assert dataset.places([0]) == [f"{path}:2"]
    assert dataset.describe().startswith(f"1 of 3 examples in 1 rows of {S}, ")
    assert dataset.describe().endswith(" with a loss, 2 dropped; read as messages")
    with pytest.raises(InputError, match=r"2 examples, and none .* larger score\.length"):
        pack(tokenize([jsonl(long, long)], tokenizer), 0, S, "drop", length_key="score.length")


def test_a_document_without_a_target_is_counted(
    tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    plain = Tokenizer(tokenizer._backend, bos_token=None, eos_token="<eos>")
    path = jsonl({"text": ""}, {"text": "the fox"})
    stats = build_dataset([path], plain, format="text", sequence_length=S).stats
    assert (stats.examples, stats.dropped) == (1, 1)


def test_bos_and_eos_in_a_text_are_not_doubled(
    tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    plain, marked = (
        build_dataset([jsonl(*records)], tokenizer, format="text", sequence_length=S)
        for records in (
            [{"text": "the fox"}, {"text": "dogs"}],
            [{"text": "<bos>the fox<eos>"}, {"text": "<bos>dogs<eos>\n"}],
        )
    )
    np.testing.assert_array_equal(plain.tokens, marked.tokens)
    assert plain.stats.text_bytes == marked.stats.text_bytes == len("the foxdogs")


def test_an_answer_that_ends_in_no_stop_token_names_the_line(
    tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    endless = Tokenizer(
        tokenizer._backend,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    with pytest.raises(InputError, match=r"data\.jsonl:1: messages\[1\]: the answer ends in"):
        build_dataset([jsonl(CHATS[0])], endless, format="messages", sequence_length=S)


def test_a_template_that_shows_no_answer_is_an_error(
    tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    blind = Tokenizer(
        tokenizer._backend,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template="{{ bos_token }}{{ messages[0].content }}",
    )
    with pytest.raises(
        InputError, match=r"data\.jsonl:1: messages\[1\]\.content: .* is not, or not"
    ):
        build_dataset([jsonl(CHATS[0])], blind, format="messages", sequence_length=S)


def test_template_error_names_the_line(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> None:
    strict = Tokenizer(
        tokenizer._backend,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template="{{ raise_exception('no roles') }}",
    )
    path = jsonl(CHATS[0])
    with pytest.raises(InputError, match=r"data\.jsonl:1: chat template: no roles"):
        build_dataset([path], strict, format="messages", sequence_length=S)


def test_no_paths(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="no files given"):
        build_dataset([], tokenizer, format="text", sequence_length=S)


def assert_equal(left: Batch, right: Batch) -> None:
    for key in KEYS:
        assert np.array_equal(left[key], right[key]), key


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_do_not_depend_on_the_process_count(
    chats: PackedDataset, processes: int
) -> None:
    whole = train_iterator(chats, batch_size=8, seed=3)
    parts = [
        train_iterator(chats, batch_size=8, seed=3, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for _ in range(2 * len(chats) // 8 + 1):  # past an epoch boundary inside a batch
        rows = [next(part) for part in parts]
        assert rows[0]["tokens"].shape == (8 // processes, S)
        assert_equal(next(whole), {key: np.concatenate([r[key] for r in rows]) for key in KEYS})


def test_resume_continues_exactly(chats: PackedDataset) -> None:
    iterator = train_iterator(chats, batch_size=3, seed=0)
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(10)]
    resumed = train_iterator(chats, batch_size=3, seed=0)
    resumed.set_state(state)
    for batch in expected:
        assert_equal(next(resumed), batch)


def test_batches_are_made_ahead_by_a_thread_and_not_lost(chats: PackedDataset) -> None:
    made: list[threading.Thread] = []
    ahead = threading.Semaphore(0)

    def place(batch: Batch) -> tuple[Batch]:
        made.append(threading.current_thread())
        ahead.release()
        return (batch,)

    iterator = train_iterator(chats, batch_size=3, seed=0, place=place)
    plain = train_iterator(chats, batch_size=3, seed=0)
    assert_equal(next(iterator)[0], next(plain))
    for _ in range(4):  # the batch in use, two ahead, and one that waits for room
        assert ahead.acquire(timeout=60)
    assert not ahead.acquire(timeout=0.1), "made without end"
    assert threading.current_thread() not in made
    resumed = train_iterator(chats, batch_size=3, seed=0)
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    for _ in range(5):
        expected = next(plain)
        assert_equal(next(iterator)[0], expected)
        assert_equal(next(resumed), expected)
    iterator.close()
    assert not made[0].is_alive()


def test_an_error_of_the_thread_is_raised(chats: PackedDataset) -> None:
    def place(batch: Batch) -> None:
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        next(train_iterator(chats, batch_size=3, seed=0, place=place))


def test_epochs_hold_every_row_once_in_new_orders(chats: PackedDataset) -> None:
    def epochs(seed: int) -> list[list[bytes]]:
        iterator = train_iterator(chats, batch_size=1, seed=seed)
        return [[next(iterator)["tokens"].tobytes() for _ in range(len(chats))] for _ in range(2)]

    every_row = sorted(chats[i]["tokens"].tobytes() for i in range(len(chats)))
    first, second = epochs(0)
    assert sorted(first) == sorted(second) == every_row
    assert first != second
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first


def test_batch_larger_than_the_data(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> None:
    path = jsonl(CHATS[0])
    dataset = build_dataset([path], tokenizer, format="messages", sequence_length=S)
    assert len(dataset) == 1
    batch = next(train_iterator(dataset, batch_size=4, seed=0))
    assert (batch["tokens"] == dataset[0]["tokens"]).all()


@pytest.mark.parametrize("processes", [1, 2])
def test_eval_sees_every_row_once(chats: PackedDataset, processes: int) -> None:
    parts = [list(eval_batches(chats, 8, i, processes)) for i in range(processes)]
    seen = [np.concatenate([r["tokens"] for r in rows]) for rows in zip(*parts, strict=True)]
    everything = np.concatenate(seen)
    assert len(everything) == -(-len(chats) // 8) * 8 > len(chats)
    assert np.array_equal(everything[: len(chats)], chats.gather(range(len(chats)))["tokens"])
    last = {key: np.concatenate([part[-1][key] for part in parts]) for key in KEYS}
    padding = slice(len(chats) - len(everything), None)
    assert not last["segment_ids"][padding].any()
    assert not last["loss_weights"][padding].any()
    weight = sum(batch["loss_weights"].sum() for part in parts for batch in part)
    assert weight == chats.stats.target_tokens


def test_sample_rows(chats: PackedDataset) -> None:
    rows = sample_rows(chats, 5, seed=1)
    assert len(set(rows.tolist())) == 5
    assert np.array_equal(rows, sample_rows(chats, 9, seed=1)[:5])
    assert not np.array_equal(rows, sample_rows(chats, 5, seed=2))
    assert sorted(sample_rows(chats, 10_000, seed=1)) == list(range(len(chats)))
    (batch,) = eval_batches(chats, 8, rows=rows)
    assert_equal({k: v[:5] for k, v in batch.items()}, chats.gather(rows))
    assert not batch["segment_ids"][5:].any()


def test_batch_that_processes_cannot_share(chats: PackedDataset) -> None:
    with pytest.raises(InputError, match="batch_size: 6 rows cannot be shared by 4 processes"):
        train_iterator(chats, batch_size=6, seed=0, process_index=0, process_count=4)


def test_nothing_is_printed_when_a_program_ends_with_its_iterator() -> None:
    """An iterator of grain alone would print a traceback at exit, closed or not."""
    code = (
        "import numpy as np, grain\n"
        "from esft_jax.data import pipeline\n"
        "class Rows:\n"
        "    def endless_rows(self, seed): return grain.MapDataset.range(8).repeat()\n"
        "    def gather(self, rows): return rows\n"
        "iterators = [pipeline.train_iterator(Rows(), batch_size=2, seed=0) for _ in range(2)]\n"
        "print(*map(next, iterators), flush=True); iterators[0].close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0 1] [0 1]\n", "")
