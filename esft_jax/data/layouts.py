"""What other tools read in a record and this package does not: named, never dropped silently."""

import functools
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from esft_jax.data.chat import REASONING_KEYS
from esft_jax.errors import InputError

Kind = Literal["chat", "text", "prompt"]

_UNMASKED = 'here "mask": false on an assistant message takes its loss away'
_MASKS = (
    r"((loss|label|target|token|sample|example|train|training|assistant|completion|response|turn)"
    r"s?_)?(mask|weight)s?|do_train|train|training|trainable|train_(on|only|detail)\w*"
    r"|training_detail|turns_to_train|last_turn_only|loss_scale|input_ids"
)
# Keys of a record that change what is said or learned in the tools that read them (templates of
# transformers, OpenAI's fine-tuning, TRL, axolotl, LLaMA-Factory, ms-swift and their like), in
# which kinds of records, and advice about them. All other keys are free.
_RECORD_KEYS: tuple[tuple[re.Pattern[str], tuple[Kind, ...], str], ...] = (
    (
        re.compile(
            r"((available|builtin|python|xml)_)?(tool|function)s?(_(definition|schema|list|json)s?)?"
        ),
        ("chat", "prompt"),
        "chat templates are not given it; expected the tools of a chat as tools, beside messages",
    ),
    (
        re.compile(
            r"function_call|tool_choice|parallel_tool_calls"
            r"|documents|response_format|chat_template(_kwargs)?|template_kwargs|enable_thinking"
            r"|reasoning_effort|add_generation_prompt|continue_final_message"
        ),
        ("chat", "prompt"),
        "chat templates are not given it; expected records without it, and what is the same for "
        "all of them in data.template_arguments",
    ),
    (
        re.compile(r"(image|video|audio)(s|_urls?|_paths?)?|objects"),
        ("chat", "text", "prompt"),
        "only text is read; expected records without it",
    ),
    (
        re.compile(r"system(_(prompt|message|instructions?))?"),
        ("chat", "prompt"),
        "no message says it; expected it as the first message, of role system",
    ),
    (
        re.compile(r"prompt|completion"),
        ("chat",),
        "no message says it; expected the whole chat where it is read, or records without it",
    ),
    (
        re.compile(r"chosen|rejected|rejected_(response|messages)|kto_tag"),
        ("chat",),
        "preferences are not learned; expected records without it",
    ),
    (
        re.compile(_MASKS),
        ("chat", "text", "prompt"),
        f"all records count alike; expected records without it; {_UNMASKED}",
    ),
)
_MESSAGE_KEYS = (
    (re.compile(rf"{_MASKS}|loss|masked|learn"), f"expected mask; {_UNMASKED}"),
    (
        re.compile(r"\w*tool\w*|function\w*"),
        "expected calls as tool_calls of an assistant message, and a result as a message of role "
        "tool, with name and tool_call_id if need be",
    ),
    (
        re.compile(r"\w*(reasoning|thinking|thought)\w*"),
        f"expected one of {', '.join(REASONING_KEYS)} on an assistant message",
    ),
)
_OTHER_ROLES = {
    **dict.fromkeys(("function", "ipython", "observation", "tool_response"), "tool"),
    "tool_call": "assistant",
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
_AS_MESSAGES = 'expected {"messages": [{"role", "content"}, ...]}'

# Layouts by keys that all their records have, and where each is read or what makes it readable.
_LAYOUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("messages",), "a chat, which format: messages reads"),
    (("prompt", "raw_answers"), "a prompt with answers, which evaluation.data reads"),
    *(
        (
            (key,),
            f"a chat, which format: sharegpt reads with columns: {{messages: {key}}} where each "
            "message has from and value, and format: messages where each has role and content",
        )
        for key in ("conversations", "conversation")
    ),
    (
        ("message_id", "parent_id"),
        "a message of a tree, as OpenAssistant has it; write the messages of a path as one chat",
    ),
    (("chosen", "rejected"), f"a preference, which nothing here learns; {_AS_MESSAGES}"),
    (("instruction", "output"), "an instruction, which format: alpaca reads"),
    (("prompt", "completion"), "a prompt, which format: prompt_completion reads"),
    (("question", "answer"), "a question, which format: question_answer reads"),
    *(
        (
            (question, answer),
            "a question, which format: question_answer reads with columns: {question: "
            f"{question}, answer: {answer}}}",
        )
        for question in ("prompt", "instruction", "input", "question", "query", "problem")
        for answer in ("completion", "output", "answer", "answers", "response", "solution")
    ),
    (("input_ids",), "token ids; expected text, which the model's own tokenizer encodes"),
    (("text",), "a document, which format: text reads"),
)


def says_nothing(value: object) -> bool:
    """Whether a key with this value is as good as absent.

    Parquet has a null in each row that lacks a key, and an object of nulls; columns of texts have
    JSON in them.
    """
    if isinstance(value, dict):
        return all(says_nothing(item) for item in value.values())
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value == []


def check_record_keys(
    where: str,
    record: Mapping[str, Any],
    kind: Kind,
    said: Collection[str] = (),
    read: Collection[str] = (),
) -> None:
    """Refuse keys of a record that would change what is said or learned.

    Args:
        said: texts that the record says anyway; to repeat one of them changes nothing.
        read: keys that are read.

    Raises:
        InputError: naming the key.
    """
    for key, value in record.items():
        advice = _record_advice(kind, key)
        if advice is None or key in read or says_nothing(value):
            continue
        if isinstance(value, str) and value.strip() in (text.strip() for text in said):
            continue
        raise InputError(f"{where}: {short(key, bare=True)}: is {short(value)}; {advice}")


@functools.lru_cache(4096)
def _record_advice(kind: Kind, key: str) -> str | None:
    name = _snake(key)
    for pattern, kinds, advice in _RECORD_KEYS:
        if kind in kinds and pattern.fullmatch(name):
            return advice
    return None


def check_message_keys(where: str, message: Mapping[str, Any], read: Collection[str]) -> None:
    """Refuse keys of a message that are not read: a template could show any of them.

    Args:
        where: with the message's own key.
        read: the keys that are.

    Raises:
        InputError: naming the key.
    """
    for key, value in message.items():
        if key in read or says_nothing(value):
            continue
        name = _snake(key)
        advice = next(
            (advice for pattern, advice in _MESSAGE_KEYS if pattern.fullmatch(name)),
            f"expected {', '.join(read)} only",
        )
        raise InputError(f"{where}.{short(key, bare=True)}: is {short(value)}; {advice}")


def role_advice(role: object) -> str:
    """What to write instead of another tool's role; empty if there is nothing to say."""
    name = role.lower() if isinstance(role, str) else ""
    meant = _OTHER_ROLES.get(name, name)
    return f"; {meant} perhaps" if meant in ("system", "user", "assistant", "tool") else ""


def layout(record: Mapping[str, Any]) -> str:
    """What a record without the expected keys seems to be, and what would read it."""
    there = [key for key, value in record.items() if value is not None]
    if not there:
        return "all its keys are null" if record else "the record is empty"
    for keys, advice in _LAYOUTS:
        if set(there).issuperset(keys):
            return f"the record is {advice}"
    return f"its keys are {', '.join(short(key, bare=True) for key in there[:8])}"


def short(value: object, *, bare: bool = False) -> str:
    """A value as a message shows it: its JSON, or a `bare` text; printable, 40 characters or so."""
    text = str(value) if bare else json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= 40 else f"{text[:37]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _snake(key: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", key).lower()
