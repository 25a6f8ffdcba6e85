"""Templates of all kinds: what is learned of a chat, and after which prompt."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from esft_jax.data.chat_template import ChatFormat
from esft_jax.data.tokenizer import Encoded, Tokenizer
from esft_jax.errors import InputError

Load = Callable[..., Tokenizer]

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}
WHY = {"role": "user", "content": "why?"}
BECAUSE = {"role": "assistant", "content": "so"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "fox", "n": 2}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "look", "tool_call_id": "7", "content": 'a "dog"'}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

THOUGHT = {"reasoning_content": "hm"}
# What the templates below share: turns of other roles, tools, and calls of them.
OTHERS = (
    "{% if tools %}<tools>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}"
    "{% if m.role != 'assistant' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% else %}<|assistant|>"
)
CALLS = "{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}"
END = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"

# Thoughts are left out before the last turn, and an empty one is inserted in that.
FORGETS = (
    OTHERS
    + "{% if loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    + CALLS
    + "<|end|>\n"
    + END
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# The same after a prompt that begins a thought.
BEGINS = FORGETS.replace("<|assistant|>{% if enable", "<|assistant|><think>\n{% if enable")
# Parts of a turn have headers; the last turn ends otherwise; thoughts lie in another key, and are
# kept while tools are called.
CHANNELS = (
    OTHERS + "{% if m.thinking and (loop.last or m.tool_calls and messages[-1].role == 'tool') %}"
    "<|analysis|>{{ m.thinking }}<|end|><|assistant|>{% endif %}"
    "{% if m.tool_calls %} to={{ m.tool_calls[0].function | tojson }}<|call|>{% else %}<|final|>"
    "{{ m.content }}{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>"
    "{% endif %}{% endif %}" + END + "{% endif %}"
)
# A thought begins in the prompt, and no turn is rendered with any.
NO_THOUGHTS = OTHERS + "{{ m.content.split('</think>')[-1] }}<|end|>" + END + "<think>\n{% endif %}"
# Every turn has a thought in it, if only an empty one.
ALWAYS = (
    OTHERS
    + "\n<think>{{ m.reasoning_content }}</think>\n{{ m.content }}"
    + CALLS
    + "<|end|>"
    + END
    + "{% endif %}"
)
# What the system says is rendered with the last question.
MOVES = (
    "{% set said = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last %}{{ said }}\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}"
    "<|end|>{% endif %}{% endfor %}"
)
# Turns end where the next one begins.
NEXT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    + CALLS
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def load(tokenizer_folder: Path, tmp_path: Path) -> Load:
    """Makes the tokenizer of a template, with the tokens it writes."""

    def make(source: str, stops: list[str] | None = None, **chat: Any) -> Tokenizer:
        folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "model", dirs_exist_ok=True))
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        roles = [f"<|{role}|>" for role in ("system", "user", "assistant", "tool")]
        backend.add_special_tokens([*roles, "<|end|>", "<|return|>", "<|call|>", "<|final|>"])
        backend.add_tokens(["<think>", "</think>"])
        backend.save(str(folder / "tokenizer.json"))
        ids = [backend.token_to_id(t) for t in stops or ("<|end|>", "<|return|>", "<|call|>")]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        (folder / "chat_template.jinja").write_text(source)
        return Tokenizer.load(folder, ChatFormat(**chat))

    return make


def shown(tokenizer: Tokenizer, sample: Encoded) -> str:
    """A sample as text, what is learned of it in brackets."""
    text, before = "", False
    for token, learned in zip(sample.tokens, sample.learn, strict=True):
        text += "⟦" * (learned and not before) + "⟧" * (before and not learned)
        text += f"\0{token}\0"
        before = learned
    text += "⟧" * before
    parts = text.replace("⟦", "\1⟦\1").replace("⟧", "\1⟧\1").split("\1")
    decoded = ""
    for part in parts:
        ids = [int(number) for number in part.split("\0") if number.isdigit()]
        decoded += part if part in "⟦⟧" else tokenizer._backend.decode(ids, False)
    return decoded


def samples(tokenizer: Tokenizer, *messages: dict[str, Any], tools: Any = None) -> list[str]:
    """The samples of a chat; each begins with the tokens of the prompt for what it teaches."""
    found = tokenizer.encode_chat(messages, tools)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for number, i in enumerate(answers):
        sample = found[number] if len(found) > 1 else found[0]
        prompt = tokenizer.encode_prompt(messages[:i], tools)
        assert sample.tokens[: len(prompt)] == prompt
        text = tokenizer.render(messages[:i], tools, add_generation_prompt=True)
        assert tokenizer._backend.decode(prompt, False) == text
    return [shown(tokenizer, sample) for sample in found]


def test_thoughts_that_are_forgotten(load: Load) -> None:
    tokenizer = load(FORGETS)
    one = "<|user|>hi<|end|><|assistant|>"
    inserted = "<think>\n\n</think>\n\n"
    assert samples(tokenizer, USER, ANSWER) == [f"{one}{inserted}⟦yes<|end|>⟧\n"]
    assert samples(tokenizer, USER, ANSWER | THOUGHT) == [
        f"{one}⟦<think>\nhm\n</think>\n\nyes<|end|>⟧\n"
    ]
    two = f"{one}yes<|end|>\n<|user|>why?<|end|><|assistant|>"
    assert samples(tokenizer, USER, ANSWER | THOUGHT, WHY, BECAUSE) == [
        f"{one}⟦<think>\nhm\n</think>\n\nyes<|end|>⟧\n",
        f"{two}{inserted}⟦so<|end|>⟧\n",
    ]
    assert [
        shown(tokenizer, s)
        for s in tokenizer.encode_chat([USER, ANSWER | {"mask": False}, WHY, BECAUSE])
    ] == [f"{two}{inserted}⟦so<|end|>⟧\n"]
    # A call is what is said, not inserted.
    call = '⟦<call>{"name": "look", "arguments": {"at": "fox", "n": 2}}</call><|end|>⟧\n'
    assert samples(tokenizer, USER, CALLING) == [f"{one}{inserted}{call}"]


def test_a_prompt_without_a_thought(load: Load) -> None:
    tokenizer = load(FORGETS, arguments={"enable_thinking": False})
    prompt = "<|user|>hi<|end|><|assistant|><think>\n\n</think>\n\n"
    assert samples(tokenizer, USER, ANSWER) == [f"{prompt}⟦yes<|end|>⟧\n"]
    with pytest.raises(InputError, match=r"messages\[1\]: has reasoning, but the prompt .* ends a"):
        tokenizer.encode_chat([USER, ANSWER | THOUGHT])


def test_a_prompt_that_begins_a_thought(load: Load) -> None:
    tokenizer = load(BEGINS)
    one = "<|user|>hi<|end|><|assistant|><think>\n"
    assert samples(tokenizer, USER, ANSWER) == [f"{one}\n</think>\n\n⟦yes<|end|>⟧\n"]
    assert samples(tokenizer, USER, ANSWER | THOUGHT) == [f"{one}⟦hm\n</think>\n\nyes<|end|>⟧\n"]
    two = "<|user|>hi<|end|><|assistant|>yes<|end|>\n<|user|>why?<|end|><|assistant|><think>\n"
    assert samples(tokenizer, USER, ANSWER, WHY, BECAUSE | THOUGHT) == [
        f"{one}\n</think>\n\n⟦yes<|end|>⟧\n",
        f"{two}⟦hm\n</think>\n\nso<|end|>⟧\n",
    ]


def test_headers_are_learned(load: Load) -> None:
    tokenizer = load(CHANNELS)
    one = "<|user|>hi<|end|><|assistant|>"
    assert samples(tokenizer, USER, ANSWER) == [f"{one}⟦<|final|>yes<|return|>⟧"]
    thought = {"thinking": "hm"}
    assert samples(tokenizer, USER, ANSWER | thought, WHY, BECAUSE) == [
        f"{one}⟦<|analysis|>hm<|end|><|assistant|><|final|>yes<|return|>⟧",
        f"{one}<|final|>yes<|end|><|user|>why?<|end|><|assistant|>⟦<|final|>so<|return|>⟧",
    ]
    # The thought before a call is in the prompt for the answer, but not in the finished chat.
    call = f"<|analysis|>hm<|end|><|assistant|> to={json.dumps(CALL['function'])}<|call|>"
    tools = f"<tools>{json.dumps([TOOL])}<|end|>"
    result = '<|tool|>a "dog"<|end|><|assistant|>'
    assert samples(tokenizer, USER, CALLING | thought, RESULT, BECAUSE, tools=[TOOL]) == [
        f"{tools}{one}⟦{call}⟧",
        f"{tools}{one}{call}{result}⟦<|final|>so<|return|>⟧",
    ]
    with pytest.raises(InputError, match=r"messages\[1\]\.tool_calls\[1\]: is not, or not all of"):
        tokenizer.encode_chat([USER, CALLING | {"tool_calls": [CALL, CALL]}])
    # All names of thoughts are one to templates.
    for name in ("reasoning_content", "reasoning"):
        assert samples(tokenizer, USER, ANSWER | {name: "hm"}) == samples(
            tokenizer, USER, ANSWER | thought
        )


@pytest.mark.parametrize("stops", [None, ["<|return|>", "<|call|>"]])
def test_turns_end_where_generation_stops(load: Load, stops: list[str] | None) -> None:
    """Not every end of a part of a turn is one."""
    tokenizer = load(CHANNELS, stops)
    chat = [USER, CALLING | {"thinking": "hm"}, RESULT, BECAUSE, WHY, ANSWER | {"thinking": "hm"}]
    found = tokenizer.encode_chat(chat, [TOOL])
    ends = [tokenizer.decode(s.tokens[-1:], skip_special_tokens=False) for s in found]
    assert ends == ["<|call|>", "<|return|>", "<|return|>"]
    assert all(sample.learn[-1] and sample.tokens[-1] in tokenizer.stop_ids for sample in found)


@pytest.mark.parametrize(
    ("source", "completion"),
    [
        (CHANNELS, "<|analysis|>hm<|end|><|assistant|><|final|>yes<|return|>"),
        (CHANNELS, "<|final|>yes<|return|>"),
        (CHANNELS, "yes"),
        (FORGETS, "<think>\nhm\n</think>\n\nyes<|end|>"),
        (FORGETS, "<think>\n\n</think>\n\nyes<|end|>"),
        (BEGINS, "hm\n</think>\n\nyes<|end|>"),
        (ALWAYS, "<think>hm</think>\nyes<|end|>"),
        (NEXT, "yes"),
    ],
)
def test_the_answer_of_a_completion(load: Load, source: str, completion: str) -> None:
    tokenizer = load(source)
    assert tokenizer.answer(tokenizer.encode(completion)) == "yes"


def test_a_template_without_thoughts_whose_prompt_begins_one(load: Load) -> None:
    tokenizer = load(NO_THOUGHTS)
    one = "<|user|>hi<|end|><|assistant|><think>\n"
    # What answers begin with may look like the end of the prompt.
    assert samples(tokenizer, USER, ANSWER | {"content": "<b>yes</b>"}) == [
        f"{one}⟦<b>yes</b><|end|>⟧"
    ]
    two = "<|user|>hi<|end|><|assistant|>yes<|end|><|user|>why?<|end|><|assistant|><think>\n"
    assert samples(tokenizer, USER, ANSWER, WHY, BECAUSE) == [
        f"{one}⟦yes<|end|>⟧",
        f"{two}⟦so<|end|>⟧",
    ]
    with pytest.raises(InputError, match=r"messages\[1\]\.reasoning_content: 'hm' is not, or not"):
        tokenizer.encode_chat([USER, ANSWER | THOUGHT])


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<|think|>", "<|/think|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<｜thought▁begin｜>", "<｜thought▁end｜>"),
        ("◁think▷", "◁/think▷"),
    ],
)
def test_empty_thoughts_in_every_turn(load: Load, begin: str, end: str) -> None:
    tokenizer = load(ALWAYS.replace("<think>", begin).replace("</think>", end))
    one = "<|user|>hi<|end|><|assistant|>"
    two = f"{one}\n{begin}{end}\n⟦yes<|end|>⟧<|user|>why?<|end|><|assistant|>\n{begin}{end}\n"
    assert samples(tokenizer, USER, ANSWER, WHY, BECAUSE) == [f"{two}⟦so<|end|>⟧"]
    thought = samples(tokenizer, USER, ANSWER | THOUGHT)
    assert thought == [f"{one}⟦\n{begin}hm{end}\nyes<|end|>⟧"]
    # Said by the chat itself, it is not inserted.
    plain = load(OTHERS + "{{ m.content }}<|end|>" + END + "{% endif %}")
    said = ANSWER | {"content": f"{begin}{end}yes"}
    assert samples(plain, USER, said) == [f"{one}⟦{begin}{end}yes<|end|>⟧"]


def test_other_empty_pairs_are_not_thoughts(load: Load) -> None:
    """Markers between which something stands, or that are not a pair."""
    for text in ("<a>x</a>", "<a><b>", "</a><a>", "<|final|>"):
        tokenizer = load(OTHERS + text + "{{ m.content }}<|end|>" + END + "{% endif %}")
        assert samples(tokenizer, USER, ANSWER) == [
            f"<|user|>hi<|end|><|assistant|>⟦{text}yes<|end|>⟧"
        ]


def test_a_system_text_that_moves(load: Load) -> None:
    tokenizer = load(MOVES)
    assert samples(tokenizer, SYSTEM, USER, ANSWER, WHY, BECAUSE) == [
        "[INST]Be brief.\nhi[/INST]⟦ yes<|end|>⟧",
        "[INST]hi[/INST] yes<|end|>[INST]Be brief.\nwhy?[/INST]⟦ so<|end|>⟧",
    ]


def test_generation_blocks_of_a_template_that_forgets(load: Load) -> None:
    source = FORGETS.replace("{% else %}<|assistant|>", "{% else %}<|assistant|>{% generation %}")
    source = source.replace("<|end|>\n" + END, "<|end|>\n{% endgeneration %}" + END)
    tokenizer = load(source)
    one, two = samples(tokenizer, USER, ANSWER | THOUGHT, WHY, BECAUSE)
    assert one.endswith("<|assistant|>⟦<think>\nhm\n</think>\n\nyes<|end|>⟧\n")
    # Its author wants the empty thought to be learned.
    assert two.endswith(
        "yes<|end|>\n<|user|>why?<|end|><|assistant|>⟦<think>\n\n</think>\n\nso<|end|>⟧\n"
    )


def test_the_end_of_a_turn_that_the_template_does_not_write(load: Load) -> None:
    stops = ["<|user|>"]
    with pytest.raises(
        InputError, match=r"messages\[3\]: the answer ends in 'so'.*data.stop_token"
    ):
        load(NEXT, stops).encode_chat([USER, ANSWER, WHY, BECAUSE])
    tokenizer = load(NEXT, stops, stop_token="<|user|>")
    two = "<|user|>hi<|assistant|>⟦yes<|user|>⟧why?<|assistant|>⟦so<|user|>⟧"
    assert samples(tokenizer, USER, ANSWER, WHY, BECAUSE) == [two]
    # Any token does; what stands in its place in a longer chat is not learned.
    tokenizer = load(NEXT, ["<eos>"], stop_token="<|return|>")
    assert tokenizer.stop_ids == tuple(tokenizer.encode("<eos><|return|>"))
    assert samples(tokenizer, USER, ANSWER, WHY, BECAUSE) == [
        "<|user|>hi<|assistant|>⟦yes<|return|>⟧",
        "<|user|>hi<|assistant|>yes<|user|>why?<|assistant|>⟦so<|return|>⟧",
    ]
    with pytest.raises(InputError, match=r"data\.stop_token: '<no>' is not in the vocabulary"):
        load(NEXT, stop_token="<no>")


@pytest.mark.parametrize("source", [FORGETS, ALWAYS])
def test_tools_and_results_are_shown(load: Load, source: str) -> None:
    (text, *more) = samples(load(source), USER, CALLING, RESULT, BECAUSE, tools=[TOOL])
    assert text.startswith(f"<tools>{json.dumps([TOOL])}<|end|><|user|>hi")
    assert (more or [text])[-1].count('<|tool|>a "dog"<|end|>') == 1


@pytest.mark.parametrize(
    ("tools", "turns", "message"),
    [
        ([TOOL], [USER, ANSWER], r"tools\[0\]: is not, or not all of it, in what the chat templat"),
        (None, [USER, CALLING], r"messages\[1\]\.tool_calls\[0\]: is not, or not all of it, in"),
        (None, [USER, ANSWER | THOUGHT], r"messages\[1\]\.reasoning_content: 'hm' is not, or not"),
        (None, [USER, RESULT, ANSWER], r"messages\[1\]\.content: .* is not, or not all of it, in"),
    ],
)
def test_what_a_template_does_not_show_is_refused(
    load: Load, tools: Any, turns: list[dict[str, Any]], message: str
) -> None:
    source = "{% for m in messages if m.role != 'tool' %}{{ m.content }}<|end|>{% endfor %}"
    with pytest.raises(InputError, match=message):
        load(source).encode_chat(turns, tools)


def test_reasoning_is_looked_for_in_its_own_turn(load: Load) -> None:
    tokenizer = load(OTHERS + "{{ m.content }}<|end|>" + END + "{% endif %}")
    for chat in (
        [USER, ANSWER | {"thinking": "hi"}],
        [USER, BECAUSE, WHY, ANSWER | {"thinking": "so"}],
    ):
        number = len(chat) - 1
        with pytest.raises(InputError, match=rf"messages\[{number}\]\.thinking: .* to be learned"):
            tokenizer.encode_chat(chat)


def test_each_argument_of_a_call_is_to_be_shown(load: Load) -> None:
    source = (
        OTHERS + "{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments.at }}"
    )
    tokenizer = load(source + "<|end|>" + END + "{% endif %}")
    call = {"name": "look", "arguments": {"at": "2 2"}}
    assert samples(tokenizer, USER, CALLING | {"tool_calls": [{"function": call}]})
    with pytest.raises(InputError, match=r"messages\[1\]\.tool_calls\[0\]: is not, or not all"):
        tokenizer.encode_chat([USER, CALLING])
    # An id may stand for the name.
    ids = load(
        OTHERS + "{% for c in m.tool_calls %}{{ c.id }}{% endfor %}<|end|>" + END + "{% endif %}"
    )
    named = {"id": "look:0", "function": {"name": "look", "arguments": {}}}
    (text,) = samples(ids, USER, CALLING | {"tool_calls": [named]})
    assert text.endswith("⟦look:0<|end|>⟧")


def test_arguments_of_a_template(load: Load) -> None:
    source = (
        "{{ style | default('plain') }}" + OTHERS + "{{ m.content }}<|end|>" + END + "{% endif %}"
    )
    assert samples(load(source), USER, ANSWER)[0].startswith("plain<|user|>")
    assert samples(load(source, arguments={"style": "terse"}), USER, ANSWER)[0].startswith("terse<")
    for name in ("stile", "m", "messages2", "range"):
        with pytest.raises(InputError, match=f"reads no argument {name}; expected .*: style$"):
            load(source, arguments={name: 1}).encode_chat([USER, ANSWER])
    own = load(source, template="{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    assert samples(own, USER, ANSWER) == ["hi<|end|>⟦yes<|end|>⟧"]
    broken = load(source, template="{% if %}")
    with pytest.raises(InputError, match=r"^data\.chat_template: chat template: "):
        broken.encode_chat([USER, ANSWER])


@pytest.mark.parametrize("source", [FORGETS, BEGINS, CHANNELS, ALWAYS, NEXT])
@pytest.mark.parametrize("prompt", [False, True])
def test_texts_are_those_of_transformers(
    load: Load, tmp_path: Path, source: str, prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load(source)
    judge = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "model" / "tokenizer.json"),
        chat_template=source,
        bos_token="<bos>",
        eos_token="<eos>",
    )
    chat = [SYSTEM, USER, CALLING | THOUGHT, RESULT, ANSWER | {"thinking": "hm"}, WHY]
    expected = judge.apply_chat_template(
        chat, tools=[TOOL], tokenize=False, add_generation_prompt=prompt
    )
    assert tokenizer.render(chat, [TOOL], add_generation_prompt=prompt) == expected
