"""Show training examples as they are rendered and tokenized, and what of them is learned.

What bears the loss is in colour; on a terminal without colours it is in brackets.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from rich.text import Text

from esft_jax.checkpoint.load import local_folder
from esft_jax.cli import Parser, add_config_arguments, command, named_config, option
from esft_jax.config import load_config
from esft_jax.data.chat_template import ChatFormat
from esft_jax.data.mix import MixedDataset
from esft_jax.data.pipeline import PackedDataset
from esft_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from esft_jax.processes import use_cpu_only
from esft_jax.terminal import Terminal
from esft_jax.training.rows import read_rows
from esft_jax.values import CountOrZero

# What a download from the hub fetches: no weights.
_FILES = (*TOKENIZER_FILES, "additional_chat_templates/*")
_LEARNED, _OTHER = "bold green", "dim"


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.data`; None stands for the command line."""
    parser = Parser(description=__doc__)
    add_config_arguments(parser, distributed=False)
    parser.add_argument(
        "--show",
        type=option(CountOrZero),
        default=3,
        metavar="N",
        help="examples of data.train to show, from the first (default: 3)",
    )
    args = parser.parse_args(argv)
    use_cpu_only()
    config = load_config(*named_config(args))
    folder = local_folder(config.model, _FILES)
    data = config.data
    chats = ChatFormat.read(data.chat_template, data.template_arguments, data.stop_token)
    tokenizer = Tokenizer.load(folder, chats)
    task_set, train_set, valid_sets = read_rows(data, tokenizer, config.seed)
    console = Terminal()
    for number in range(min(args.show, len(task_set.documents))):
        _show(console, task_set, tokenizer, number)
    sets = {"train": task_set}
    if isinstance(train_set, MixedDataset):
        sets |= {f"train, {source.name}": source.dataset for source in train_set.sources[1:]}
    sets |= {f"held out, {name}": dataset for name, dataset in valid_sets.items()}
    for name, dataset in sets.items():
        console.say(f"{name}: {dataset.describe()}")
        console.say(f"  {_lengths(dataset)}")


def _show(console: Terminal, dataset: PackedDataset, tokenizer: Tokenizer, number: int) -> None:
    """Print one example: where it is from, its text, its tokens."""
    begin = int(dataset.documents.starts[number])
    end = begin + int(dataset.documents.lengths[number])
    ids, learn = dataset.tokens[begin:end].tolist(), dataset.learn[begin:end].tolist()
    place = dataset.documents.place(begin)
    console.say(f"{place}: {len(ids):,} tokens, {sum(learn):,} with a loss")
    runs = list(_runs(ids, learn))
    texts = ((tokenizer.decode(run, skip_special_tokens=False), flag) for run, flag in runs)
    text = _marked(console, ((_printable(text), flag) for text, flag in texts))
    console.print(text, soft_wrap=True)
    tokens = (
        (" ".join(f"{i}:{_printable(_token(tokenizer, i), lines=False)}" for i in run), flag)
        for run, flag in runs
    )
    console.print(_marked(console, tokens, " "), soft_wrap=True)
    console.print()


def _runs(ids: Sequence[int], learn: Sequence[bool]) -> Iterator[tuple[list[int], bool]]:
    """Parts of an example that are learned, and those that are not."""
    pairs = zip(ids, learn, strict=True)
    for flag, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        yield [token for token, _ in run], flag


def _marked(console: Terminal, parts: Iterator[tuple[str, bool]], between: str = "") -> Text:
    """Texts, those that are learned in colour, or in brackets where there is none."""
    brackets = ("", "")
    if console.color_system is None:
        brackets = ("\u27e6", "\u27e7") if console.encoding.startswith("utf") else ("[[", "]]")
    found = (
        Text(f"{brackets[0]}{text}{brackets[1]}" if flag else text, _LEARNED if flag else _OTHER)
        for text, flag in parts
    )
    return Text(between).join(found)


def _token(tokenizer: Tokenizer, token: int) -> str:
    """A token with its spaces visible, which are between tokens too."""
    return tokenizer.decode([token], skip_special_tokens=False).replace(" ", "\u2423")


def _printable(text: str, *, lines: bool = True) -> str:
    """A text without what would change the state of a terminal."""
    kept = "\n\t" if lines else ""
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


def _lengths(dataset: PackedDataset) -> str:
    """How long the examples are."""
    shares = np.percentile(dataset.documents.lengths, [0, 50, 95, 100], method="nearest")
    low, median, high, longest = (f"{int(length):,}" for length in shares)
    return (
        f"tokens of an example: {low} at least, {median} in the middle, {high} or fewer in 95 of "
        f"100, {longest} at most"
    )
