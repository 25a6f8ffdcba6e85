"""Talk to a model in the terminal, alone or with an adapter, and beside its base on request.

Lines that begin with a slash are no turns: /reset forgets the conversation, /quit ends it, as the
end of the input does.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress

from esft_jax.cli import Parser, command, option
from esft_jax.data.chat import Message
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.decode.generation import check_length, generate_tokens
from esft_jax.errors import InputError
from esft_jax.evaluation.load import load_resident, load_tuned
from esft_jax.generate import add_model_arguments, open_tokenizer
from esft_jax.terminal import Terminal
from esft_jax.values import LocalPath

# What the tokenizer decodes the beginning of a letter of several tokens to.
_INCOMPLETE = "\ufffd"


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.chat`; None stands for the command line."""
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--adapter",
        type=option(LocalPath),
        metavar="DIR",
        help="adapter folder (default: the base alone)",
    )
    parser.add_argument(
        "--beside-base",
        action="store_true",
        help="with --adapter: the base answers, too, in a conversation of its own",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the system says first")
    args = parser.parse_args(argv)
    if args.beside_base and args.adapter is None:
        raise InputError("--beside-base: there is the base alone; expected --adapter")
    tokenizer, limit = open_tokenizer(args, args.adapter)
    first = [] if args.system is None else [Message(role="system", content=args.system)]
    if first:
        tokenizer.encode_prompt([*first, Message(role="user", content="?")])
    options = {"dtype": args.dtype, "mesh": None, "quantisation": args.quantise}
    speakers = {"base": -1, "adapter": 0} if args.beside_base else {}
    if speakers:
        model = load_resident(args.model, [args.adapter], **options).model
    else:
        model = load_tuned(args.model, args.adapter, **options).model
    with suppress(ImportError):
        import readline  # noqa: F401, with it `input` edits lines

    console = Terminal()
    histories: list[list[Message]] = [list(first) for _ in speakers or [None]]
    for number, line in enumerate(iter(_read_line, None)):
        if line == "/quit":
            return
        if line == "/reset":
            histories = [list(first) for _ in histories]
            continue
        if line.startswith("/"):
            console.say(f"{line}: unknown; expected /reset or /quit")
            continue
        said = Message(role="user", content=line)
        try:
            prompts = [tokenizer.encode_prompt([*history, said]) for history in histories]
            for prompt in prompts:
                check_length("conversation", len(prompt), args.max_new_tokens, limit)
        except InputError as error:
            console.say(f"{error}; /reset begins anew")
            continue
        show = None if speakers else _Show(tokenizer)
        answers = generate_tokens(
            model,
            prompts,
            stop_ids=tokenizer.stop_ids,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=(args.seed + number) % 2**32,
            stop=show,
            adapter_ids=[*speakers.values()] or None,
        )
        texts = list(map(tokenizer.decode, answers))
        for history, ids in zip(histories, answers, strict=True):
            history += [said, Message(role="assistant", content=tokenizer.answer(ids))]
        if show:
            show.end(answers[0])
        for speaker, text in zip(speakers, texts, strict=False):
            console.say(f"{speaker}: {text}")


def _read_line() -> str | None:
    """What the user types, without blank lines; None at the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        while not (line := input(prompt).strip()):
            pass
    except EOFError:
        return None
    return line


class _Show:
    """Prints an answer while it grows."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.shown = tokenizer, ""

    def __call__(self, ids: Sequence[int]) -> bool:
        """Print what is new; for `generate_tokens`, whether it may stop."""
        text = self.tokenizer.decode(ids).rstrip(_INCOMPLETE)
        print(text[len(self.shown) :], end="", flush=True)
        self.shown = text
        return False

    def end(self, ids: Sequence[int]) -> None:
        """Print the rest."""
        print(self.tokenizer.decode(ids)[len(self.shown) :], flush=True)


if __name__ == "__main__":
    sys.exit(main(None))
