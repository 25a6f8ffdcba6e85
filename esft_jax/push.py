"""Publish an adapter, or an exported model, on the Hugging Face hub."""

import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from esft_jax.checkpoint.card import CARD
from esft_jax.checkpoint.folder import is_result
from esft_jax.cli import Parser, command, option
from esft_jax.errors import InputError, RunFailed
from esft_jax.files import visible
from esft_jax.terminal import Terminal
from esft_jax.values import LocalPath

# Of the library that `huggingface_hub` speaks HTTP with, which has changed: connections that fail.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.push`; None stands for the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "folder", type=option(LocalPath), help="an adapter, or a model in Hugging Face layout"
    )
    parser.add_argument("name", metavar="OWNER/NAME", help="repository; made if there is none")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--branch", help="an existing branch (default: main)")
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    files = files_to_push(folder)
    size = sum((folder / file).stat().st_size for file in files)
    terminal = Terminal()
    terminal.say(f"{folder}: {len(files)} files, {size / 1e6:,.1f} MB, to {args.name}")
    api = HfApi()
    try:
        made = api.create_repo(args.name, private=args.private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=files,
            revision=args.branch,
            commit_message=f"Upload {folder.name} with esft_jax",
        )
    except HFValidationError as error:
        raise InputError(f"{args.name}: {_first_line(error)}") from None
    except (_HTTPError, OfflineModeIsEnabled) as error:
        raise RunFailed(f"{args.name}: not published: {_first_line(error)}") from None
    terminal.say(f"published: {commit.commit_url}")


def files_to_push(folder: Path) -> list[str]:
    """Names of what belongs to a result; whatever else lies in its folder stays here.

    Raises:
        InputError: it is no finished adapter or model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected an adapter or a model")
    names = [
        str(path.relative_to(folder))
        for place in (folder, folder / "additional_chat_templates")
        for path in visible(place)
        if path.is_file() and (place != folder or is_result(path.name))
    ]
    kinds = {"expert_cfg.json", "adapter_config.json", "config.json"}
    if not kinds & set(names) or not any(name.endswith(".safetensors") for name in names):
        raise InputError(f"{folder}: expected an adapter, or a model in Hugging Face layout")
    if CARD not in names:
        raise InputError(
            f"{folder / CARD}: missing; expected a model card, as `train` and `export` write it"
        )
    return names


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(None))
