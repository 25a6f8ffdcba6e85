"""Cuts rendered chats into samples: what the model reads, and what it is to learn.

A chat is one sample if each rendering of it continues the one before. Many templates rewrite what
was said before, though: they leave reasoning out of earlier turns, or write another token after the
last turn than after the others; or their generation prompt begins a thought that a finished turn
does not have. Such a chat is one sample for each turn that is learned: the prompt as it is rendered
for inference, and the answer as it is rendered as the last turn.
"""

import bisect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from esft_jax.data.chat import Chat, is_learned, reasoning, replaced
from esft_jax.errors import InputError

# Characters of a text that messages show.
_SHOWN = 40
# What begins or ends a part of a turn: a word in brackets of some kind.
_MARKER = re.compile(r"[<\[◁][^<>\[\]◁▷\s]+[>\]▷]")
# Words in markers that say which end they are.
_BOUNDS = {"start", "begin", "open", "of", "/", "end", "close"}


class Rendered(NamedTuple):
    """A text, and the ranges of it that generation blocks made; None without such blocks."""

    text: str
    spans: list[tuple[int, int]] | None


class Piece(NamedTuple):
    """A part of a rendered chat.

    Attributes:
        text: the part, not empty.
        turn: number of the message that it is to teach; None if it is not to be learned.
    """

    text: str
    turn: int | None


class Sample(NamedTuple):
    """A rendered chat, or the beginning of one.

    Each piece is to be encoded on its own: a merge across a cut would give the prompt other tokens
    in training than in generation.

    Attributes:
        pieces: the text.
        num_messages: how many of the chat's messages are in it.
        turns: numbers of the messages that it is to teach.
    """

    pieces: list[Piece]
    num_messages: int
    turns: list[int]


def renderings(chat: Chat, add_generation_prompt: bool = False) -> list[tuple[int, bool]]:
    """Which beginnings of a chat to render: messages, and whether a prompt for an answer follows.

    They are those before and after each answer, and the whole chat at the end.
    """
    found = [item for i in chat.answers for item in ((i, True), (i + 1, False))]
    whole = (len(chat.messages), add_generation_prompt)
    return found if found[-1:] == [whole] else [*found, whole]


class Cutter:
    """Cuts one chat."""

    def __init__(
        self,
        chat: Chat,
        rendered: Sequence[Rendered],
        render: Callable[[Chat], Rendered],
        where: str,
    ) -> None:
        """Takes a chat with its `renderings`.

        Args:
            render: gives others, without a generation prompt.
            where: what error messages begin with.
        """
        self._chat, self._rendered = chat, rendered
        self._render, self._where = render, where
        self._leads: dict[int, tuple[int, int]] = {}

    def samples(self) -> list[Sample]:
        """What the chat is to teach.

        To be learned of an answer is what the template renders of it after the prompt, but for a
        thought without words that the template inserts by itself; or what generation blocks of the
        template made.

        Raises:
            InputError: the template does not render an answer after the prompt for it.
        """
        messages = self._chat.messages
        learned = [i for i in self._chat.answers if is_learned(messages[i])]
        marked = self._rendered[-1].spans is not None
        # Generation blocks say what is learned, whatever the prompts are.
        chain = self._rendered[1::2] if marked else self._rendered
        if _continues([*chain, self._rendered[-1]]):
            return [Sample(list(self._whole(learned)), len(messages), learned)]
        return [
            Sample([*self._prompt(number), *self._answer(number)], i + 1, [i])
            for number, i in enumerate(self._chat.answers)
            if i in learned
        ]

    def prompt(self) -> Sample:
        """The chat as a prompt, cut as it is in samples of longer chats."""
        pieces = list(self._prompt(len(self._chat.answers)))
        return Sample(pieces, len(self._chat.messages), [])

    def _whole(self, learned: Sequence[int]) -> Iterator[Piece]:
        return (
            Piece(text, turn if turn in learned else None)
            for text, turn in self._regions(len(self._chat.answers))
        )

    def _prompt(self, number: int) -> Iterator[Piece]:
        """What comes before an answer, counted among answers; it may have yet to be written."""
        prompt = self._rendered[2 * number]
        if _continues(self._rendered[: 2 * number + 1]):
            return (Piece(text, None) for text, _ in self._regions(number))
        return iter([Piece(prompt.text, None)])

    def _regions(self, number: int) -> Iterator[tuple[str, int | None]]:
        """The text around the first answers, cut at all borders, with the answers' numbers."""
        rendered = self._rendered[2 * number] if 2 * number < len(self._rendered) else None
        whole = rendered or self._rendered[-1]
        ends, owners = list[int](), list[int | None]()
        pairs = zip(self._rendered[0::2], self._rendered[1::2], strict=False)
        for (prompt, answer), i in zip(list(pairs)[:number], self._chat.answers, strict=False):
            if whole.spans is None:
                ends += [len(prompt.text), self._lead(i, prompt.text, answer.text)[1]]
                owners += [None, None]
            elif answer.text.startswith(prompt.text) and len(prompt.text) >= max(ends, default=0):
                ends.append(len(prompt.text))
                owners.append(i)  # a block may well hold the end of the prompt
            ends.append(len(answer.text))
            owners.append(i)
        text, spans = whole.text, whole.spans
        bounds = [bound for span in spans or [] for bound in span]
        for begin, end in itertools.pairwise(sorted({0, *ends, *bounds, len(text)})):
            region = bisect.bisect_right(ends, begin)
            owner = owners[region] if region < len(owners) else None
            if spans is not None and bisect.bisect_right(bounds, begin) % 2 == 0:
                owner = None  # between two generation blocks
            yield text[begin:end], owner

    def _answer(self, number: int) -> Iterator[Piece]:
        """What is rendered of an answer after the prompt, when it is the last turn."""
        prompt, answer = self._rendered[2 * number : 2 * number + 2]
        i = self._chat.answers[number]
        begin, said = self._lead(i, prompt.text, answer.text)
        spans = [(said, len(answer.text))] if answer.spans is None else answer.spans
        bounds = {bound for span in spans for bound in span if bound > begin}
        for start, end in itertools.pairwise(sorted({begin, *bounds, len(answer.text)})):
            inside = any(first <= start < last for first, last in spans)
            yield Piece(answer.text[start:end], i if inside else None)

    def _lead(self, i: int, prompt: str, answer: str) -> tuple[int, int]:
        """Where the rendered answer goes on from its prompt, and where what is learned begins.

        Between them is what the template inserts without having been told: thoughts without words.
        """
        if i not in self._leads:
            self._leads[i] = self._find_lead(i, prompt, answer)
        return self._leads[i]

    def _find_lead(self, i: int, prompt: str, answer: str) -> tuple[int, int]:
        message, begin = self._chat.messages[i], len(prompt)
        continues = answer.startswith(prompt)
        content = message["content"].strip()
        if continues and (
            reasoning(message)
            or replaced(message) == message
            or (content and answer[begin:].lstrip().startswith(content))
        ):
            return begin, begin
        others = [*self._chat.messages[:i], replaced(message)]
        said = common_length(answer, self._render(Chat(others, self._chat.tools)).text)
        if not continues:
            begin = self._find_answer(i, prompt, answer, said)
        text = prompt + answer[begin:said]
        markers = list(_MARKER.finditer(text))
        inserted = 0
        for opening, closing in itertools.pairwise(markers):
            between = text[opening.end() : closing.start()]
            if not between.strip() and _closes(opening[0], closing[0]):
                after = text[closing.end() :]
                inserted = closing.end() + len(after) - len(after.lstrip()) - len(prompt)
        return begin, begin + max(inserted, 0)

    def _find_answer(self, i: int, prompt: str, answer: str, said: int) -> int:
        """Where a rendered answer begins whose rendering does not begin with its prompt.

        Args:
            said: where what the message says begins.
        """
        history = self._render(self._chat.first(i)).text if i else ""
        header = prompt[common_length(prompt, history) :]
        same = common_length(prompt, answer[:said])
        if same >= len(prompt) - len(header):
            return self._after_other_header(i, prompt, answer[:said], same)
        # What was said before is rendered otherwise: the end of the prompt is found again.
        before = answer[:said]
        lengths = range(len(prompt) + 1)
        found = bisect.bisect_left(
            lengths, True, key=lambda n: prompt[len(prompt) - n :] not in before
        )
        end = prompt[len(prompt) - found + 1 :]
        if len(end) < len(header) or not end.strip():
            raise InputError(
                f"{self._where}: rewrites earlier messages when later ones follow, and renders "
                f"messages[{i}] without the end of the prompt for it ({prompt[-_SHOWN:]!r}), after "
                "which it would begin; expected a template that renders both alike"
            )
        return before.rindex(end) + len(end)

    def _after_other_header(self, i: int, prompt: str, before: str, same: int) -> int:
        """Where an answer begins that is rendered without the end of the prompt for it.

        Args:
            before: what is rendered before what the message says.
            same: characters that the two have in common.
        """
        end = prompt[same:]
        if reasoning(self._chat.messages[i]) and any(map(_is_closing, _MARKER.findall(end))):
            raise InputError(
                f"messages[{i}]: has reasoning, but the prompt for it ends in {end!r}, with which "
                "the template ends a thought; expected data.template_arguments with which it does "
                "not, or messages without reasoning"
            )
        if end.strip() and (found := before.rfind(end.strip(), same)) >= 0:
            return found + len(end.strip())  # with other blanks
        # A thought begins in the prompt alone. No marker is cut in two.
        markers = _MARKER.finditer(before)
        return next((m.start() for m in markers if m.start() < same < m.end()), same)


def common_length(one: str, other: str) -> int:
    """Characters at the beginning of two texts that are the same."""
    lengths = range(min(len(one), len(other)) + 1)
    return bisect.bisect_left(lengths, True, key=lambda n: one[:n] != other[:n]) - 1


def lead(prompt: str, answer: str, words: str) -> str:
    """What a template writes between a prompt and the words of the answer to it, blanks at its ends
    aside: the header of a channel, for one. Of a thought without words, only what ends it.
    """
    found = answer[common_length(prompt, answer) :].partition(words)[0].strip()
    *_, opening, closing = [None, None, *_MARKER.finditer(found)]
    if opening is None or closing is None or closing.end() < len(found):
        return found
    between = found[opening.end() : closing.start()]
    return closing[0] if not between.strip() and _closes(opening[0], closing[0]) else found


def _continues(rendered: Sequence[Rendered]) -> bool:
    """Whether each text begins with the one before it."""
    return all(b.text.startswith(a.text) for a, b in itertools.pairwise(rendered))


def _words(marker: str) -> list[str]:
    return re.findall(r"[^\W_]+|/", marker.casefold())


def _is_closing(marker: str) -> bool:
    return not {"/", "end", "close"}.isdisjoint(_words(marker))


def _closes(opening: str, closing: str) -> bool:
    """Whether a marker is the end of what another one begins: `<a>` and `</a>`, for one."""
    if _is_closing(opening) or not _is_closing(closing):
        return False
    first, last = ([w for w in _words(m) if w not in _BOUNDS] for m in (opening, closing))
    return first == last != []
