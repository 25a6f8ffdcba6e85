"""Write a quickstart: a small model, a task, and the configuration that trains it."""

import filecmp
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from esft_jax.cli import Parser, command, option
from esft_jax.errors import InputError
from esft_jax.files import check_writable, visible, write_bytes_atomic
from esft_jax.terminal import Terminal
from esft_jax.values import LocalPath

_CONFIG = "quickstart.yaml"
# In a checkout, and below `quickstart/` in an installed package (`pyproject.toml`).
_SOURCES = (
    f"configs/{_CONFIG}",
    "data/LICENSES",
    "data/intent/eval.jsonl",
    "data/intent/train.jsonl",
    "data/intent/valid.jsonl",
    "models/tiny-moe",
)


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.init`; None stands for the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        default=".",
        type=option(LocalPath),
        help="where to write it (default: here); no file there is replaced",
    )
    folder = Path(parser.parse_args(argv).folder)
    missing = {}
    for name, source in _files():
        target = folder / name
        check_writable(target.parent, "FOLDER")
        if not os.path.lexists(target):
            missing[target] = source
        elif not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            raise InputError(f"{target}: exists, with other content; expected another FOLDER")
    for target, source in missing.items():
        write_bytes_atomic(target, source.read_bytes())
    console = Terminal()
    console.say(f"{folder}: models/tiny-moe, data/intent, {_CONFIG}; {len(missing)} files written")
    enter = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    console.say(f"Next: {enter}esft train {_CONFIG}")


def _files() -> Iterator[tuple[str, Path]]:
    """What is written: names in the quickstart, and the files to copy."""
    package = Path(__file__).parent
    installed = package / "quickstart"
    root = installed if installed.is_dir() else package.parent
    for name in _SOURCES:
        source = root / name
        for path in visible(source) if source.is_dir() else [source]:
            yield str(path.relative_to(root)).removeprefix("configs/"), path


if __name__ == "__main__":
    sys.exit(main(None))
