"""The embedded model's tokenizer, as `tokenizers` and as `transformers` read it."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

FOLDER = Path(__file__).parents[2] / "models/tiny-moe"
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 4096
    assert [tokenizer.token_to_id(token) for token in (BOS, EOS, PAD)] == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n        return x + 12\n\n\n",
        "  Ð ž 明月 🙂\t\r\n x  ",
        "",
        "a" * 300,
        "\x00\x7f",
    ],
)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_are_single_and_indentation_is_short(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]
    assert len(tokenizer.encode("\n            return").ids) <= 3


def test_transformers_reads_it_and_renders_chats(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    text = "Intent of: dim the lights"
    assert loaded(text).input_ids == tokenizer.encode(text).ids
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    rendered = loaded.apply_chat_template(chat, tokenize=False)
    assert rendered == f"{BOS}S\n\nUser: U\n\nAssistant: A{EOS}"
    prompt = loaded.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == f"{BOS}S\n\nUser: U\n\nAssistant:"


def test_special_tokens_agree() -> None:
    config = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = json.loads((FOLDER / "special_tokens_map.json").read_text(encoding="utf-8"))
    assert special == {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    assert special.items() <= config.items()
