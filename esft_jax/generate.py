"""Let a model, alone or with an adapter, complete a prompt, or each prompt of a file."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from esft_jax.checkpoint.load import local_folder
from esft_jax.checkpoint.manifest import RUN_DTYPES, run_chat_format
from esft_jax.cli import Parser, command, option, quantisation
from esft_jax.data.chat_template import ChatFormat
from esft_jax.data.read import checked_text
from esft_jax.data.records import read_records
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.decode.generation import check_length, generate_tokens
from esft_jax.errors import InputError
from esft_jax.evaluation.load import load_tuned
from esft_jax.families import load_model_config
from esft_jax.files import check_writable, checked, parse_json, read_text, write_text_atomic
from esft_jax.progress import Progress
from esft_jax.values import Count, LocalPath, NonNegative, Seed, Share, TemplateArguments


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.generate`; None stands for the command line."""
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--adapter",
        type=option(LocalPath),
        metavar="DIR",
        help="adapter folder (default: the base alone)",
    )
    said = parser.add_mutually_exclusive_group(required=True)
    said.add_argument("--prompt", metavar="TEXT", help="what the user says")
    said.add_argument(
        "--prompts",
        type=option(LocalPath),
        metavar="FILE",
        help='several of it: a file of {"prompt": TEXT}, as JSON Lines or another form that '
        "training data can have; or a prompt in each line (.txt)",
    )
    parser.add_argument(
        "--output",
        type=option(LocalPath),
        metavar="FILE",
        help='with --prompts: write {"prompt", "completion"} lines here (default: print them)',
    )
    parser.add_argument(
        "--batch-size",
        type=option(Count),
        default=16,
        metavar="N",
        help="with --prompts: prompts completed together (default: 16)",
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue prompts as text, without a chat template"
    )
    args = parser.parse_args(argv)
    if args.output is not None and args.prompts is None:
        raise InputError("--output: completions of --prompts are written; expected --prompts")
    if args.output is not None:
        check_writable(Path(args.output).parent, "--output")
    tokenizer, limit = open_tokenizer(args, args.adapter)
    named = [("prompt", args.prompt)] if args.prompts is None else list(_read(args.prompts))
    encode = tokenizer.encode_text if args.raw else tokenizer.encode_user
    prompts = [_encoded(where, text, encode) for where, text in named]
    for (where, _), ids in zip(named, prompts, strict=True):
        check_length(where, len(ids), args.max_new_tokens, limit)
    base = load_tuned(args.model, args.adapter, args.dtype, mesh=None, quantisation=args.quantise)
    with Progress("generate", len(prompts), shown=args.prompts is not None) as progress:
        answers = generate_tokens(
            base.model,
            prompts,
            stop_ids=tokenizer.stop_ids,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            batch_size=args.batch_size,
            advance=progress.advance,
        )
    texts = list(map(tokenizer.decode, answers))
    if args.prompts is None:
        print(texts[0])
        return
    lines = "".join(
        json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) + "\n"
        for (_, prompt), text in zip(named, texts, strict=True)
    )
    if args.output is None:
        print(lines, end="")
    else:
        write_text_atomic(args.output, lines)
        print(f"{len(texts)} completions written to {args.output}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which model completes prompts, and how."""
    parser.add_argument(
        "--model",
        required=True,
        type=option(LocalPath),
        metavar="MODEL",
        help="Hugging Face folder, name on the hub, or converted checkpoint",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=option(Count),
        default=128,
        metavar="N",
        help="at most (default: 128)",
    )
    parser.add_argument(
        "--temperature",
        type=option(NonNegative),
        default=0.0,
        metavar="T",
        help="0 decodes greedily (default)",
    )
    parser.add_argument(
        "--top-p",
        type=option(Share),
        default=1.0,
        metavar="P",
        help="draw among the likeliest tokens that together reach P (default: 1)",
    )
    parser.add_argument(
        "--seed", type=option(Seed), default=0, metavar="S", help="of the draws (default: 0)"
    )
    parser.add_argument(
        "--chat-template",
        type=option(LocalPath),
        metavar="FILE",
        help="chat template (default: as the adapter's run, else the model's)",
    )
    parser.add_argument(
        "--template-arguments",
        metavar="JSON",
        help="what the chat template is given, such as '{\"enable_thinking\": false}' (default: as "
        "in the adapter's run, else nothing)",
    )
    parser.add_argument(
        "--dtype",
        choices=RUN_DTYPES,
        help="of weights and computation (default: as the adapter's run; of a base alone, what its "
        "config.json names, else bfloat16)",
    )
    parser.add_argument(
        "--quantise",
        type=quantisation,
        metavar="KEY=VALUE,...",
        help="hold the base's weights quantised, by the keys of the section quantise of a "
        "configuration, such as experts=int4,rest=int8,group_size=64",
    )


def open_tokenizer(args: argparse.Namespace, adapter: str | None) -> tuple[Tokenizer, int]:
    """The tokenizer that the arguments name, and how many tokens the model takes at once.

    Raises:
        InputError: naming the option, or the file, that is wrong.
    """
    folder, chats = local_folder(args.model), run_chat_format(adapter)
    if args.chat_template is not None:
        chats = replace(chats, template=ChatFormat.read(args.chat_template, {}, None).template)
    if args.template_arguments is not None:
        given = parse_json(args.template_arguments, "--template-arguments")
        arguments = checked(TemplateArguments, given, "--template-arguments")
        chats = replace(chats, arguments=arguments)
    shape, tokenizer = load_model_config(folder), Tokenizer.load(folder, chats)
    tokenizer.check_vocabulary(shape.vocab_size)
    return tokenizer, shape.max_positions


def _read(path: str) -> Iterator[tuple[str, str]]:
    """Place and text of each prompt of a file."""
    if Path(path).suffix == ".txt":
        lines = enumerate(read_text(path).splitlines(), 1)
        found = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
        if not found:
            raise InputError(f"{path}: holds no prompts; expected one in each line")
        yield from found
        return
    for where, record in read_records([path]):
        if "prompt" not in record:
            raise InputError(f'{where}: prompt: missing; expected {{"prompt": TEXT}}')
        yield where, checked_text(where, "prompt", record["prompt"])


def _encoded(where: str, text: str, encode: Callable[[str], list[int]]) -> list[int]:
    try:
        return encode(text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


if __name__ == "__main__":
    sys.exit(main(None))
