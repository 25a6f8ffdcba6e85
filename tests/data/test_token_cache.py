"""Kept tokens: the same as new ones, made once, whole or not there."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from esft_jax.data import token_cache
from esft_jax.data.chat_template import ChatFormat
from esft_jax.data.token_cache import TokenCache
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.data.tokens import TokenizedData, tokenize

RECORDS = [{"question": f"the fox {i}", "answer": "yes"} for i in range(5)] + [
    {"question": "the dog", "answer": "jumps"}
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenCache:
    """Keeps tokens of small data, too."""
    monkeypatch.setattr(token_cache, "LARGE", 1)
    return TokenCache(tmp_path / "cache")


def kept(cache: TokenCache) -> list[Path]:
    return sorted(cache.folder.glob("*.arrow"))


def assert_same(found: TokenizedData, expected: TokenizedData) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.learn, expected.learn)
    assert found.learn.dtype == expected.learn.dtype == np.bool_
    for name, values in vars(expected.documents).items():
        np.testing.assert_array_equal(getattr(found.documents, name), values)
    assert (found.format, found.untaught) == (expected.format, expected.untaught)


def test_tokens_are_made_once(
    cache: TokenCache, tokenizer: Tokenizer, jsonl: Callable[..., str], tmp_path: Path
) -> None:
    path = jsonl(*RECORDS)
    expected = tokenize([path], tokenizer)
    first = tokenize([path], tokenizer, cache=cache)
    assert (first.kept, len(kept(cache))) == (False, 1)
    again = tokenize([path], tokenizer, cache=cache)
    assert again.kept
    for found in (first, again):
        assert_same(found, expected)
    # Of the same content under another name, places are those of this name.
    moved = str(Path(path).rename(tmp_path / "moved.jsonl"))
    there = tokenize([moved], tokenizer, cache=cache)
    assert there.kept and there.documents.place(0) == f"{moved}:1"


def test_what_tokens_depend_on(
    cache: TokenCache, tokenizer_folder: Path, jsonl: Callable[..., str]
) -> None:
    path = jsonl(*RECORDS)
    tokenizer = Tokenizer.load(tokenizer_folder)
    tokenize([path], tokenizer, cache=cache)
    own = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    other = Tokenizer.load(tokenizer_folder, ChatFormat(own))
    assert not tokenize([path], other, cache=cache).kept
    swapped = {"question": "answer", "answer": "question"}
    assert not tokenize([path], tokenizer, columns=swapped, cache=cache).kept
    assert not tokenize([jsonl(*RECORDS[1:])], tokenizer, cache=cache).kept
    assert len(kept(cache)) == 4
    # A template that shows the time renders other texts tomorrow.
    timed = Tokenizer.load(tokenizer_folder, ChatFormat(own + "{# strftime_now #}"))
    tokenize([path], timed, cache=cache)
    assert len(kept(cache)) == 4


def test_small_data_are_not_kept(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    tokenize([jsonl(*RECORDS)], tokenizer, cache=TokenCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "junk", "empty"])
def test_a_damaged_file_is_made_again(
    damage: str, cache: TokenCache, tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    path = jsonl(*RECORDS)
    expected = tokenize([path], tokenizer, cache=cache)
    (file,) = kept(cache)
    whole = file.read_bytes()
    where = whole.index(np.asarray(expected.tokens[:8]).tobytes())
    changed = whole[:where] + b"\7" + whole[where + 1 :]
    contents = {"cut": whole[:-20], "changed": changed, "junk": b"junk", "empty": b""}
    expected = tokenize([path], tokenizer)
    file.unlink()
    file.write_bytes(contents[damage])
    with pytest.warns(UserWarning, match="is damaged; its tokens are made again"):
        found = tokenize([path], tokenizer, cache=cache)
    assert not found.kept
    assert_same(found, expected)
    assert tokenize([path], tokenizer, cache=cache).kept


def test_what_a_killed_process_left_is_taken_away(
    cache: TokenCache, tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    path = jsonl(*RECORDS)
    tokenize([path], tokenizer, cache=cache)
    (file,) = kept(cache)
    file.unlink()
    left = file.with_name(f".{file.stem}.1.tmp")
    left.write_bytes(b"half")
    assert not tokenize([path], tokenizer, cache=cache).kept
    assert kept(cache) == [file] and not left.exists()


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, cache: TokenCache, tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    path = jsonl(*RECORDS)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"data\.cache: .*file/x: tokens are not kept: "):
        found = tokenize([path], tokenizer, cache=TokenCache(tmp_path / "file" / "x"))
    assert_same(found, tokenize([path], tokenizer))


PROGRAM = """
import sys, time
from esft_jax.data import token_cache
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.data.tokens import tokenize
token_cache.LARGE = 1
load = Tokenizer.encode_chats
def slow(self, chats):
    print("makes", flush=True)
    time.sleep(1)
    return load(self, chats)
Tokenizer.encode_chats = slow
print("ready", flush=True)
sys.stdin.readline()
cache = token_cache.TokenCache(sys.argv[3])
print(len(tokenize([sys.argv[1]], Tokenizer.load(sys.argv[2]), cache=cache).tokens), flush=True)
"""


def test_one_process_makes_them_and_others_wait(
    cache: TokenCache, tokenizer_folder: Path, jsonl: Callable[..., str]
) -> None:
    path = jsonl(*RECORDS)
    command = [sys.executable, "-c", PROGRAM, path, str(tokenizer_folder), str(cache.folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    first, second = (process.communicate()[0].split() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(["makes" in first, "makes" in second]) == [False, True]
    assert (
        first[-1]
        == second[-1]
        == str(len(tokenize([path], Tokenizer.load(tokenizer_folder)).tokens))
    )
