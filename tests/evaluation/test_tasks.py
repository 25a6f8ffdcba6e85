import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

from esft_jax.data.pipeline import build_dataset
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.evaluation import tasks
from esft_jax.evaluation.metrics import Completion
from esft_jax.evaluation.tasks import evaluate_task, heldout_loss, read_task
from esft_jax.model.transformer import Transformer
from tests.decode.test_generation import CONFIG

ROOT = Path(__file__).parents[2]
PLAIN = {"prompt": "2 + 2 =", "raw_answers": ["4", "four"]}
RENDERED = {"prompt": "User: 2 + 2 =\n\nAssistant:", "raw_answers": ["4"]}
CHAT = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "1, 2"},
    {"role": "assistant", "content": "3"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(ROOT / "models" / "tiny-moe")


@pytest.fixture
def write(tmp_path):
    def write_lines(*records):
        path = tmp_path / "task.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write_lines


def test_prompts_are_rendered_unless_they_are_already(write, tokenizer):
    path = write(PLAIN, "", RENDERED)
    plain, rendered = read_task(path)
    assert (plain.where, rendered.where) == (f"{path}:1", f"{path}:3")
    assert plain.answers == ("4", "four")
    assert plain.encode(tokenizer) == rendered.encode(tokenizer)
    assert plain.encode(tokenizer)[0] == tokenizer.bos_id
    assert tokenizer.decode(plain.encode(tokenizer)) == RENDERED["prompt"]
    assert plain.prompt == PLAIN["prompt"]


def test_the_last_message_of_a_chat_is_the_answer(write, tokenizer):
    (row,) = read_task(write({"messages": CHAT}))
    assert (row.prompt, row.answers) == ("Count.\n\n1, 2", ("3",))
    # what training shows before the answer
    ((trained, learned),) = tokenizer.encode_chat(CHAT)
    assert row.encode(tokenizer) == trained[: learned.index(True)]


@pytest.mark.parametrize("task", ["intent", "translation"])
def test_shipped_tasks_load(task, tokenizer):
    folder = ROOT / "data" / task
    rows = read_task(folder / "eval.jsonl")
    metric = "intent" if task == "intent" else "chrf"
    assert len(tasks.check_task(rows, tokenizer, metric, 128, 2048)) == len(rows) > 50
    assert read_task(folder / "valid.jsonl")[0].answers[0]


def test_reference_tasks_load(esft_reference, tokenizer):
    rows = read_task(esft_reference / "datasets" / "eval" / "intent.jsonl")
    assert len(rows) == 500
    assert all(row.messages is None for row in rows)


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        ([PLAIN, "{"], 2, "not valid JSON"),
        ([PLAIN, "[]"], 2, "is []; expected a JSON object"),
        ([PLAIN, '{"prompt": "a", "prompt": "b"}'], 2, "key 'prompt' appears twice"),
        ([{"raw_answers": ["4"]}], 1, "prompt: missing"),
        ([{"prompt": "", "raw_answers": ["4"]}], 1, 'prompt: is ""; expected a text that is not'),
        ([PLAIN, {"prompt": "a"}], 2, "raw_answers: missing; expected a list of at least one"),
        ([{"prompt": "a", "raw_answers": []}], 1, "raw_answers: is []; expected a list of at"),
        ([{"prompt": "a", "raw_answers": [4]}], 1, "raw_answers[0]: is 4; expected a string"),
        ([{"prompt": "a\ud83d", "raw_answers": ["4"]}], 1, "prompt: half of a surrogate pair at"),
        ([{"prompt": "a", "raw_answers": ["4", "\udc00"]}], 1, "raw_answers[1]: half of a surr"),
        ([PLAIN | {"system": "Be brief."}], 1, 'system: is "Be brief."; no message says it'),
        ([PLAIN | {"tools": [{}]}], 1, "tools: is [{}]"),
        ([PLAIN | {"weight": 2}], 1, "weight: is 2; all records count alike"),
        ([{"messages": CHAT, "raw_answers": ["4"]}], 1, 'raw_answers: is ["4"] beside messages'),
        ([{"messages": [*CHAT, CHAT[1], CHAT[2] | {"mask": False}]}], 1, "messages[4].mask: is f"),
        ([{"messages": [*CHAT[:2], CHAT[2] | {"weight": 0}]}], 1, "messages: no target; expected"),
        ([{"messages": [*CHAT, CHAT[1]]}], 1, "messages: expected a prompt, and the assistant's"),
        ([{"messages": [CHAT[2]]}], 1, "messages: expected a prompt, and the assistant's"),
        ([{"messages": [{"content": "a"}]}], 1, "messages[0].role: missing"),
    ],
)
def test_a_wrong_row_is_named(write, lines, line, message):
    path = write(*lines)
    with pytest.raises(InputError) as error:
        read_task(path)
    assert str(error.value).startswith(f"{path}:{line}: {message}")


def test_empty_and_missing_files_are_named(write, tmp_path):
    with pytest.raises(InputError, match="holds no examples"):
        read_task(write(""))
    with pytest.raises(InputError, match="nowhere.jsonl: cannot be read"):
        read_task(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="nowhere.json: cannot be read"):
        read_task(tmp_path / "nowhere.json")


def test_rows_are_read_as_training_data_is(write, tmp_path):
    path = write("\ufeff" + json.dumps(PLAIN), "", {"messages": CHAT})
    plain, chat = read_task(path)
    assert (plain.answers, chat.answers) == (("4", "four"), ("3",))
    assert chat.where == f"{path}:3"
    pq.write_table(pa.Table.from_pylist([PLAIN, RENDERED]), tmp_path / "task.parquet")
    rows = read_task(tmp_path / "task.parquet")
    assert [row.prompt for row in rows] == [plain.prompt, RENDERED["prompt"]]
    assert rows[0].answers == ("4", "four")
    with pytest.raises(InputError, match=r"prompt: missing.*format: text reads"):
        read_task(write({"text": "a"}))


def constant_model(vocab_size=4096):
    """All parameters are 0: every token is as likely as any other."""
    config = replace(CONFIG, vocab_size=vocab_size, max_positions=64)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda p: np.zeros(p.shape, np.float32), params))


def test_completions_are_judged(write, tokenizer, monkeypatch):
    answers = ["four", " 5"]
    asked = {}

    def complete(model, prompts, **options):
        asked.update(options, prompts=prompts)
        return [tokenizer.encode(answer) for answer in answers]

    monkeypatch.setattr(tasks, "generate_tokens", complete)
    rows = read_task(write(PLAIN, RENDERED))
    options = {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "batch_size": 2}
    result = evaluate_task(constant_model(), tokenizer, rows, "exact_match", **options)
    assert (result.metric, result.value) == ("exact_match", 50.0)
    assert result.completions == [
        Completion("2 + 2 =", "four", ("4", "four"), 1.0),
        Completion(RENDERED["prompt"], " 5", ("4",), 0.0),
    ]
    prompts = [row.encode(tokenizer) for row in rows]
    assert asked == {**options, "prompts": prompts, "stop_ids": tokenizer.stop_ids}


def test_an_answer_that_ends_in_eos_is_reached(write, tokenizer, monkeypatch):
    short = {"max_new_tokens": 9}
    eos = "<｜end▁of▁sentence｜>"
    monkeypatch.setattr(tasks, "generate_tokens", lambda *_, **options: [tokenizer.encode("3")])
    chat = [*CHAT[:2], {"role": "assistant", "content": "3" + eos}]
    for record in ({"messages": chat}, {"prompt": "1, 2", "raw_answers": ["2", f"3{eos}\n"]}):
        rows = read_task(write(record))
        assert evaluate_task(constant_model(), tokenizer, rows, "exact_match", **short).value == 100
    with pytest.raises(InputError, match=r"task.jsonl:1: an answer has no text"):
        evaluate_task(
            constant_model(), tokenizer, [replace(rows[0], answers=(eos,))], "chrf", **short
        )


def test_a_prompt_that_cannot_be_rendered_names_its_row(write, tokenizer):
    rendered = {"role": "user", "content": "<｜begin▁of▁sentence｜>User: 1, 2\n\nAssistant:"}
    rows = read_task(write({"messages": CHAT}, {"messages": [rendered, CHAT[2]]}))
    with pytest.raises(InputError, match=r"task.jsonl:2: messages\[0\].content: begins with"):
        tasks.check_task(rows, tokenizer, "exact_match", 9, 80)


def test_rows_that_do_not_fit_fail_before_any_compute(write, tokenizer, monkeypatch):
    monkeypatch.delattr(tasks, "generate_tokens")
    path = write(PLAIN, {"prompt": "word " * 80, "raw_answers": ["a"]})
    with pytest.raises(InputError, match=r"task.jsonl:2: prompt: \d+ tokens and 9 new ones"):
        evaluate_task(constant_model(), tokenizer, read_task(path), "exact_match", max_new_tokens=9)
    with pytest.raises(InputError, match=r"task.jsonl:1: an answer is not JSON"):
        evaluate_task(constant_model(), tokenizer, read_task(write(PLAIN)), "intent")


def test_heldout_loss_of_a_model_without_preferences(tmp_path, tokenizer):
    texts = ["The quick brown fox jumps over the lazy dog. " * n for n in (1, 2, 3)]
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dataset = build_dataset([str(path)], tokenizer, format="text", sequence_length=16)
    assert len(dataset) % 3  # the last batch is filled up with padding
    loss = heldout_loss(constant_model(), dataset, batch_size=3)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)  # EOS counts, BOS does not
    assert loss.tokens == tokens
    assert loss.nats_per_token == pytest.approx(math.log(4096), rel=1e-6)
    assert loss.bits_per_byte == pytest.approx(12 * tokens / sum(map(len, texts)), rel=1e-6)
