"""Let a model, alone or with an adapter, complete one prompt."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from esft_jax.checkpoint.load import local_folder
from esft_jax.checkpoint.manifest import RUN_DTYPES, run_chat_format
from esft_jax.cli import Parser, command, option
from esft_jax.data.chat_template import ChatFormat
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.decode.generation import check_length, generate_tokens
from esft_jax.evaluation.run import load_tuned
from esft_jax.families import load_model_config
from esft_jax.files import checked, parse_json
from esft_jax.values import Count, LocalPath, NonNegative, Seed, Share, TemplateArguments


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.generate`; None stands for the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--model",
        required=True,
        type=option(LocalPath),
        metavar="MODEL",
        help="Hugging Face folder, name on the hub, or converted checkpoint",
    )
    parser.add_argument(
        "--adapter",
        type=option(LocalPath),
        metavar="DIR",
        help="adapter folder (default: the base alone)",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the user says")
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
        "--raw", action="store_true", help="continue the prompt as text, without a chat template"
    )
    parser.add_argument(
        "--dtype",
        choices=RUN_DTYPES,
        help="of weights and computation (default: as the adapter's run; of a base alone, what its "
        "config.json names, else bfloat16)",
    )
    args = parser.parse_args(argv)
    folder = local_folder(args.model)
    chats = run_chat_format(args.adapter)
    if args.chat_template is not None:
        chats = replace(chats, template=ChatFormat.read(args.chat_template, {}, None).template)
    if args.template_arguments is not None:
        given = parse_json(args.template_arguments, "--template-arguments")
        arguments = checked(TemplateArguments, given, "--template-arguments")
        chats = replace(chats, arguments=arguments)
    shape, tokenizer = load_model_config(folder), Tokenizer.load(folder, chats)
    tokenizer.check_vocabulary(shape.vocab_size)
    encode = tokenizer.encode_text if args.raw else tokenizer.encode_user
    prompt = encode(args.prompt)
    check_length("prompt", len(prompt), args.max_new_tokens, shape.max_positions)
    base = load_tuned(args.model, args.adapter, args.dtype, mesh=None)
    (answer,) = generate_tokens(
        base.model,
        [prompt],
        stop_ids=tokenizer.stop_ids,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    sys.exit(main(None))
