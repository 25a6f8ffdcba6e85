"""Model cards: what people, and the Hugging Face hub, read of an adapter or an export first."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from esft_jax.adapt.expert_config import ExpertConfig

CARD = "README.md"

_ESFT = "[Expert-Specialized Fine-Tuning](https://arxiv.org/abs/2407.01906)"
# Keys of a manifest, as a card calls them.
_FACTS = {
    "base_model": "base",
    "base_fingerprint": "SHA-256 of the base's weights",
    "data_sha256": "data, with SHA-256",
    "select": "selection",
    "quantise": "trained beside frozen weights in",
    "dtype": "computed in",
    "step": "updates",
    "valid_loss": "validation loss, nats per token",
    "combined": "combined from",
}

# As `Measure` of an evaluation is written: name, measure, before, after.
Figures = Sequence[Mapping[str, Any]]


def declared_license(folder: Path) -> str | None:
    """The licence that the card in a model's folder declares; None if there is no card that can be
    read, or it declares none.
    """
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        metadata = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        found = YAML(typ="safe", pure=True).load(metadata[1]) if metadata else None
    except (OSError, UnicodeError, YAMLError):
        return None
    license = found.get("license") if isinstance(found, dict) else None
    return license if isinstance(license, str) else None


def adapter_card(
    folder: Path,
    manifest: Mapping[str, Any],
    experts: ExpertConfig | None,
    figures: Figures = (),
) -> str:
    """The card of an adapter.

    Args:
        folder: where it is.
        manifest: see `save_adapter`.
        experts: which tensors it replaces; None for low-rank updates.
        figures: before and after training, if they are known.
    """
    if experts is None:
        what = f"A low-rank adapter ({len(manifest.get('updates', ()))} matrices) for"
    else:
        layers = sum(map(bool, experts.experts.values()))
        count = f"{experts.num_experts_selected} routed experts in {layers} layers"
        parts = [count, *experts.also]
        what = f"An adapter that replaces {', '.join(parts)} of"
    base = str(manifest.get("base_model", "its base model"))
    given = f"{base if _on_hub(base) else 'BASE'} --adapter ADAPTER"
    use = (
        f"python -m esft_jax.generate --model {given} --prompt '...'",
        f"python -m esft_jax.export --base {given} --to merged  # for vLLM, transformers, ...",
    )
    chosen = [] if experts is None else _chosen(experts)
    return _card(
        _title(folder),
        f"{what} `{base}`, trained by {_ESFT} with `esft_jax`.",
        ModelCardData(library_name="esft_jax", base_model_relation="adapter"),
        manifest,
        figures,
        use,
        chosen,
    )


def model_card(folder: Path, manifest: Mapping[str, Any], what: str, figures: Figures = ()) -> str:
    """The card of a whole model.

    Args:
        folder: where it is.
        manifest: of the adapter in it; or at least its base (`base_model`, `base_license`).
        what: a sentence that says what it is.
        figures: before and after training, if they are known.
    """
    use = (
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("owner/model")',
    )
    data = ModelCardData(library_name="transformers", base_model_relation="finetune")
    return _card(_title(folder), what, data, manifest, figures, use, [], language="python")


def _title(folder: Path) -> str:
    """The name of a result: of its run, where it lies in the run's folder."""
    path = folder.absolute()
    return path.parent.name if path.name in ("adapter", "model") else path.name


def _card(
    name: str,
    what: str,
    data: ModelCardData,
    manifest: Mapping[str, Any],
    figures: Figures,
    use: Iterable[str],
    more: Iterable[str],
    language: str = "bash",
) -> str:
    base = str(manifest.get("base_model", ""))
    license = manifest.get("base_license")
    data.license, data.tags = license, ["esft", "moe"]
    if _on_hub(base):  # which links to it
        data.base_model = base
    lines = ["---", data.to_yaml().strip(), "---", "", f"# {name}", "", what, ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {key} | {_text(value)} |" for key, value in _facts(manifest)]
    terms = license or "not declared by the base; see there"
    lines += [f"| licence | {_text(terms)} |", ""]
    if figures:
        lines += ["| | measure | before | after |", "|---|---|--:|--:|"]
        lines += [
            f"| {_text(row['name'])} | {row['measure']} | {_number(row['before'])} | "
            f"{_number(row['after'])} |"
            for row in figures
        ]
        lines.append("")
    return "\n".join([*lines, f"```{language}", *use, "```", *more, ""])


def _facts(manifest: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, shown in _FACTS.items():
        value = manifest.get(key)
        if value is None:
            continue
        if key == "combined":
            value = ", ".join(f"{p['weight']:g} of {p['folder']}" for p in value["adapters"])
        elif isinstance(value, Mapping):
            value = ", ".join(f"{k}: {v}" for k, v in value.items() if v not in (None, [], ()))
        yield shown, value


def _chosen(experts: ExpertConfig) -> list[str]:
    lines = ["", "| layer | experts |", "|--:|---|"]
    return lines + [
        f"| {layer} | {' '.join(map(str, ids))} |" for layer, ids in experts.experts.items() if ids
    ]


def _text(value: Any) -> str:
    """As a cell of a table: one line, and no bar."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _on_hub(name: str) -> bool:
    """Whether a name is one on the hub, and no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
