import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from esft_jax.data.chat import Chat, Message
from esft_jax.data.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from esft_jax.data.samples import Piece
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError

CHAT = [
    Message(role="user", content="hi"),
    Message(role="assistant", content="yes"),
    Message(role="user", content="why?"),
    Message(role="assistant", content="so"),
]
ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"eos_token": "<eos>"}, "chat template")


def pieces(source: str, messages: list[Message]) -> list[Piece]:
    """Those of the only sample of a chat."""
    (sample,) = template(source).samples(Chat(messages))
    return sample.pieces


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))


def configure(folder: Path, value: object) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))


@pytest.mark.parametrize(
    "value",
    [
        "mine",
        [{"name": "default", "template": "mine"}],
        [{"name": "rag", "template": "x"}, {"name": "default", "template": "mine", "more": 1}],
        {"default": "mine", "tool_use": "x"},
    ],
)
def test_the_default_template_is_found_however_it_is_spelled(folder: Path, value: Any) -> None:
    assert Tokenizer.load(folder).chat_template == DEFAULT_TEMPLATE
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": value}))
    assert Tokenizer.load(folder).chat_template == "mine"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "processor's"}))
    configure(folder, value)
    assert Tokenizer.load(folder).chat_template == "mine"
    configure(folder, "configuration's")
    (folder / "chat_template.jinja").write_text("mine")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    assert Tokenizer.load(folder).chat_template == "mine"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            [{"name": "tool_use", "template": "x"}],
            "found tool_use only; expected one named default",
        ),
        ({"b": "x", "a": "y"}, "found a, b only; expected one named default"),
        ([{"template": "x"}], "chat_template[0].name: is None; expected a valid string"),
        ([{"name": "default"}], "chat_template[0].template: is None; expected a valid string"),
        ([{"name": "default", "template": 5}], "chat_template[0].template: is 5; expected a valid"),
        ([{"name": ["a"], "template": "x"}], "chat_template[0].name: is ['a']; expected a valid"),
        (["x"], "chat_template[0]: is 'x'; expected name and template"),
        ({"default": None}, "chat_template.default: is None; expected a valid string"),
        ([{"name": "default", "template": "x"}] * 2, "chat_template: two templates have one name"),
        (5, "chat_template: is 5; expected a text or named texts"),
        (True, "chat_template: is True; expected a text or named texts"),
        (" ", "chat_template: is empty; expected a chat template"),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_templates_without_a_default_one_are_refused(
    folder: Path, file: str, value: object, message: str
) -> None:
    if file == "tokenizer_config.json":
        configure(folder, value)
    else:
        (folder / file).write_text(json.dumps({"chat_template": value}))
    with pytest.raises(InputError) as caught:
        Tokenizer.load(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_named_files_without_a_default_one_are_refused(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    (folder / "additional_chat_templates" / "._rag.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="found rag only; expected one named default"):
        Tokenizer.load(folder)
    (folder / "chat_template.json").write_text("[]")
    shutil.rmtree(folder / "additional_chat_templates")
    with pytest.raises(InputError, match=r"chat_template.json: expected an object"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages | length }}", "rewrites earlier messages"),
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("{% if %}", "chat template: "),
        ("{{ messages.__class__.__mro__ }}", "chat template: "),
        ("{{ messages[9].content.x }}", "chat template: list object has no element 9"),
        ("{{ 1 // 0 }}", "chat template: ZeroDivisionError: "),
        ("{{ messages() }}", "chat template: TypeError: "),
        ("{% include 'x' %}", "chat template: TypeError: "),
        ("{{ raise_exception(messages) }}", "chat template: [{'role'"),
        (ROLES + "{% generation %}", "chat template: "),
    ],
)
def test_what_a_template_raises_is_one_line(source: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        pieces(source, CHAT)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_comes_after_the_chats_before_it() -> None:
    source = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + ROLES
    bad = [Message(role="user", content="bad"), CHAT[1]]
    chats = [Chat(CHAT), Chat(CHAT[:2]), Chat(bad), Chat(CHAT)]
    found = template(source).samples_of_chats(chats)
    assert next(found) == template(ROLES).samples(Chat(CHAT))
    assert next(found) == template(ROLES).samples(Chat(CHAT[:2]))
    with pytest.raises(InputError, match="chat template: no"):
        next(found)
    # The process that renders is as good as before.
    assert len(list(template(ROLES).samples_of_chats([Chat(CHAT)] * 600))) == 600


def test_generation_blocks_say_what_is_learned() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<assistant><think></think>"
        "{% generation %}{{ m.content }}<eos>{% endgeneration %}\n"
        "{% else %}<user>{{ m.content }}{% endif %}{% endfor %}" + PROMPT
    )
    assert pieces(source, CHAT) == [
        Piece("<user>hi<assistant>", None),
        Piece("<think></think>", None),
        Piece("yes<eos>", 1),
        Piece("<user>why?<assistant>", None),
        Piece("<think></think>", None),
        Piece("so<eos>", 3),
    ]
    masked = [CHAT[0], Message(role="assistant", content="yes", mask=False), *CHAT[2:]]
    assert [piece.turn for piece in pieces(source, masked)] == [None] * 5 + [3]
    # In whatever the template makes of a block's text.
    nested = source.replace("{% generation %}", "{% set x %}{% generation %}{% generation %}")
    end = "{% endgeneration %}"
    nested = nested.replace(end, end + end + "{% endset %}{{ x | upper }}")
    assert pieces(nested, CHAT)[2] == Piece("YES<EOS>", 1)
    assert template(source).prompt(Chat(CHAT[:1])).pieces == [Piece("<user>hi<assistant>", None)]


def test_what_templates_see_besides_the_messages() -> None:
    """As in Transformers; and a chat is rendered several times, at one time for all."""
    unset = "{{ tools is none and documents is none and tools is defined }}"
    assert template(unset).render(Chat(CHAT)) == "True"
    turns = [piece.turn for piece in pieces("{{ strftime_now('%f') }}" + ROLES, CHAT)]
    assert turns == [None, 1, None, 3]


def test_a_turn_in_no_generation_block_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}<eos>"
        "{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer.load(folder)
    assert any(tokenizer.encode_chat(CHAT[:2])[0].learn)
    with pytest.raises(InputError, match=r"messages\[1\]: the chat template renders nothing of it"):
        tokenizer.encode_chat(CHAT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 5 * 10**9 }}", "needs too much memory; expected at most 1024 MiB"),
        ("{{ '%99999999999d' | format(1) }}", "needs too much memory; expected at most 1024 MiB"),
        ("{{ 'x' | center(10**10) }}", "needs too much memory; expected at most 1024 MiB"),
        ("{{ 'x' * 3 * 10**6 }}", "renders 3000000 characters; expected at most 100"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself, too deeply"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is nested, or calls itself, too deeply"),
        (
            "{% for a in [1] %}" * 50 + "{% endfor %}" * 50,
            "too many statically nested",
        ),
        ("{{ '\ud800' }}", "UnicodeEncodeError"),
        ("{{ 10**5000 }}", "ValueError: Exceeds the limit"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "takes too long; expected at most 2 s for a chat, and 0.05 s on average",
        ),
        ("{{ 9**(9**(9**9)) }}", "takes too long"),
    ],
)
def test_what_a_template_may_take_is_bounded(source: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        template(source).render(Chat(CHAT))
    assert str(caught.value).startswith("chat template: ")
    assert message in str(caught.value)


def test_many_slow_renderings_are_too_slow() -> None:
    source = "{% for a in range(90000) %}{% for b in range(9) %}{% endfor %}{% endfor %}"
    begin = time.process_time()
    assert template(source).render(Chat(CHAT)) == ""
    with pytest.raises(InputError, match=r"takes too long; .* 0.05 s on average"):
        list(template(source).samples_of_chats([Chat(CHAT)] * 1000))
    assert time.process_time() - begin < 5
