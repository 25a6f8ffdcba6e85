"""List adapters, show what is in one, compare two, combine several, or take one out of a model."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field
from rich.table import Table

from esft_jax.checkpoint.adapter import EXPERT_CONFIG, Adapter, load_adapter
from esft_jax.checkpoint.combine import Method, combine_adapters, compare_adapters
from esft_jax.checkpoint.export import undo_adapter
from esft_jax.checkpoint.peft import ADAPTER_CONFIG, LoRAAdapter
from esft_jax.checkpoint.tensor_files import TensorFiles
from esft_jax.cli import Parser, command, option
from esft_jax.errors import InputError
from esft_jax.evaluation.report import figures_of
from esft_jax.processes import use_cpu_only
from esft_jax.terminal import Terminal
from esft_jax.values import LocalPath

_Weight = Annotated[float, Field(allow_inf_nan=False)]

_PROGRAM = "python -m esft_jax.adapters"


def _parser(action: str, run: Callable[[Sequence[str]], None]) -> Parser:
    return Parser(prog=f"{_PROGRAM} {action}", description=run.__doc__)


def _adapters_in(folder: Path) -> Iterator[Path]:
    """Folders that hold adapters, sorted.

    Raises:
        InputError: no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that holds adapters")
    for name, _, files in sorted(os.walk(folder)):
        path = Path(name)
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        weights = any(file.endswith(".safetensors") for file in files)
        if weights and {EXPERT_CONFIG, ADAPTER_CONFIG} & set(files) and not hidden:
            yield path


def _trained(adapter: Adapter | LoRAAdapter) -> str:
    """What an adapter is made of, in a few words."""
    if isinstance(adapter, LoRAAdapter):
        return f"low rank {adapter.rank}, {len(adapter.names)} matrices"
    experts = adapter.expert_cfg
    return ", ".join([f"{experts.num_experts_selected} experts", *experts.also])


def _files(adapter: Adapter | LoRAAdapter) -> TensorFiles:
    return adapter.files if isinstance(adapter, LoRAAdapter) else adapter.tensors.files


def _num_bytes(adapter: Adapter | LoRAAdapter) -> int:
    files = _files(adapter)
    return sum(files.dtype(name).itemsize * math.prod(info.shape) for name, info in files.items())


def _say_manifest(manifest: Mapping[str, Any], terminal: Terminal) -> None:
    """All that it says, by key; of combined adapters, each of them."""
    for key, value in manifest.items():
        if key == "combined":
            for part in value["adapters"]:
                terminal.say(
                    f"combined ({value['method']}): {part['weight']:g} of {part['folder']}"
                )
        elif value is not None:
            terminal.say(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")


def _list(arguments: Sequence[str]) -> None:
    """List the adapters in some folders, with what they were trained on and how well they do."""
    parser = _parser("list", _list)
    parser.add_argument("folders", nargs="*", type=option(LocalPath), default=["runs"])
    args = parser.parse_args(arguments)
    terminal = Terminal()
    found = [path for folder in args.folders for path in _adapters_in(Path(folder))]
    if not found:
        terminal.say(f"no adapters in {', '.join(args.folders)}")
    for path in found:
        adapter = load_adapter(path)
        manifest = adapter.manifest or {}
        facts = [_trained(adapter), f"{_num_bytes(adapter) / 1e6:.1f} MB"]
        if "base_model" in manifest:
            facts.append(f"of {manifest['base_model']}")
        if manifest.get("valid_loss") is not None:
            facts.append(f"validation loss {manifest['valid_loss']:.4f}")
        facts += [
            f"{row['name']}: {row['measure']}: {row['after']:.4g}" for row in figures_of(path)
        ]
        terminal.say(f"{path}: {'; '.join(facts)}")


def _show(arguments: Sequence[str]) -> None:
    """Show an adapter: experts, size, base, how it was trained, and its scores."""
    parser = _parser("show", _show)
    parser.add_argument("adapter", type=option(LocalPath))
    path = Path(parser.parse_args(arguments).adapter)
    adapter, terminal = load_adapter(path), Terminal()
    terminal.say(f"{path}: {_trained(adapter)}")
    terminal.say(f"{len(_files(adapter)):,} tensors, {_num_bytes(adapter) / 1e6:,.1f} MB")
    if adapter.manifest is None:
        terminal.say("no manifest: neither its base nor its training is known")
    else:
        _say_manifest(adapter.manifest, terminal)
    if isinstance(adapter, Adapter):
        for layer, ids in adapter.expert_cfg.experts.items():
            terminal.say(f"layer {layer}: experts {' '.join(map(str, ids))}")
        if adapter.expert_cfg.also:
            terminal.say(f"also: {', '.join(adapter.expert_cfg.also)}")
    for row in figures_of(path):
        figures = f"{row['before']:.4g} before, {row['after']:.4g} after"
        terminal.say(f"{row['name']}: {row['measure']}: {figures}")


def _diff(arguments: Sequence[str]) -> None:
    """Compare the experts of two adapters of one base, and the tensors that both have."""
    parser = _parser("diff", _diff)
    parser.add_argument("first", type=option(LocalPath))
    parser.add_argument("second", type=option(LocalPath))
    args = parser.parse_args(arguments)
    found, terminal = compare_adapters(args.first, args.second), Terminal()
    groups = {"only first": found.only_first, "both": found.both, "only second": found.only_second}
    table = Table("layer", *groups)
    for layer in sorted(set().union(*groups.values())):
        table.add_row(str(layer), *(" ".join(map(str, g.get(layer, ()))) for g in groups.values()))
    terminal.print(table)
    counts = {name: sum(map(len, group.values())) for name, group in groups.items()}
    terminal.say(", ".join(f"{name}: {count} experts" for name, count in counts.items()))
    for name, also in zip(("first", "second"), found.also, strict=True):
        if also:
            terminal.say(f"{name} also trains {', '.join(also)}")
    if found.change is not None:
        terminal.say(f"tensors of both differ by {found.change:.2%} of the norm of the first's")


def _combine(arguments: Sequence[str]) -> None:
    """Write one adapter that does what several adapters of one base do."""
    parser = _parser("combine", _combine)
    parser.add_argument("adapters", nargs="+", type=option(LocalPath))
    parser.add_argument("--to", required=True, type=option(LocalPath), metavar="FOLDER")
    parser.add_argument(
        "--method",
        choices=get_args(Method),
        default="union",
        help="what becomes of tensors that several have: refused (union), their mean, or the "
        "base's with all changes added (arithmetic)",
    )
    parser.add_argument(
        "--weights", nargs="+", type=option(_Weight), help="of each adapter (default: 1)"
    )
    parser.add_argument(
        "--base",
        type=option(LocalPath),
        metavar="MODEL",
        help="what they were trained on, for arithmetic and for adapters without manifests",
    )
    args = parser.parse_args(arguments)
    use_cpu_only()
    made = combine_adapters(args.adapters, args.to, args.method, args.weights, args.base)
    print(f"{made.num_experts_selected} experts of {len(args.adapters)} adapters in {args.to}")


def _undo(arguments: Sequence[str]) -> None:
    """Write a model that an adapter was merged into with the base's tensors in its place."""
    parser = _parser("undo", _undo)
    parser.add_argument("adapter", type=option(LocalPath))
    for name, text in (
        ("--model", "what the adapter was merged into"),
        ("--base", "what it was trained on"),
        ("--to", "new folder to write"),
    ):
        parser.add_argument(
            name, required=True, type=option(LocalPath), metavar="FOLDER", help=text
        )
    args = parser.parse_args(arguments)
    use_cpu_only()
    undo_adapter(args.model, args.adapter, args.base, args.to)
    print(f"Took {args.adapter} out of {args.model}; written to {args.to}")


ACTIONS: dict[str, Callable[[Sequence[str]], None]] = {
    "list": _list,
    "show": _show,
    "diff": _diff,
    "combine": _combine,
    "undo": _undo,
}


@command
def main(argv: Sequence[str]) -> None:
    """Run `python -m esft_jax.adapters ACTION ...`; None stands for the command line."""
    described = (f"  {name:<10}{action.__doc__}" for name, action in ACTIONS.items())
    parser = Parser(
        description=__doc__,
        epilog="\n".join(["actions:", *described]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{_PROGRAM} [-h] ACTION ...",
    )
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION")
    # Everything after the action belongs to it.
    ACTIONS[parser.parse_args(argv[:1]).action](argv[1:])


if __name__ == "__main__":
    sys.exit(main(None))
