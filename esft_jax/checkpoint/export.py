"""Full models in Hugging Face layout, which `transformers` and the published code both load."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from esft_jax.checkpoint.adapter import Adapter, load_adapter
from esft_jax.checkpoint.card import CARD, Figures, declared_license, model_card
from esft_jax.checkpoint.folder import (
    TensorSpec,
    copy_companions,
    make_way,
    new_folder,
    write_tensors,
)
from esft_jax.checkpoint.identity import tokenizer_fingerprint
from esft_jax.checkpoint.load import open_source
from esft_jax.checkpoint.manifest import run_chat_format
from esft_jax.checkpoint.model_tensors import ModelTensors
from esft_jax.checkpoint.peft import LoRAAdapter
from esft_jax.checkpoint.source import Source
from esft_jax.checkpoint.stored import stored_parts, stored_specs, stored_tensor
from esft_jax.checkpoint.streaming import in_order
from esft_jax.checkpoint.tensor_files import DTYPE_NAMES, TensorFiles, common_dtype, is_finite
from esft_jax.data.chat_template import TEMPLATE_FILE, ChatFormat
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.families import load_model_config, tensor_table
from esft_jax.files import read_json
from esft_jax.model.params import Role
from esft_jax.model.quantised import is_quantised
from esft_jax.model.transformer import Transformer
from esft_jax.processes import on_all_processes
from esft_jax.progress import progress_over

_MAX_SHARD_BYTES = 5_000_000_000


def export_model(
    base: str | Path,
    adapter: str | Path | None,
    target: str | Path,
    dtype: DTypeLike | None = None,
    say: Callable[[str], None] = print,
    figures: Figures = (),
) -> None:
    """Write a base model, with an adapter merged into it, as a Hugging Face folder.

    A few tensors are in memory at a time. All weights are written in one type, which `config.json`
    names: readers load all in that type anyway. Unless `dtype` is given it is the smallest that
    loses nothing of the base or of the adapter's run; but weights of a base in fp8 or MXFP4 are
    written in bfloat16.
    Low-rank updates are added in float32.

    Args:
        base: Hugging Face folder, hub name, or converted checkpoint.
        adapter: adapter folder, or None for the base alone.
        target: folder to write, new or empty.
        dtype: type of all weights.
        say: receives a line that says the type, what was cast to it, and what the chat template is
            to be given, since no file of the folder can say that.
        figures: before and after training, for the model's card.

    Raises:
        InputError: bad input, an adapter of another base, or numbers that are not finite in the
            type that is written; there is no new folder then.
    """
    source, chats, loaded = open_source(base), run_chat_format(adapter), None
    make_way(Path(target))
    if adapter is not None:
        loaded = load_adapter(adapter)
        _check(loaded, source, chats)
    manifest = (loaded and loaded.manifest) or {}
    what = f"`{base}`" + (f" with the adapter `{adapter}` merged into it" if adapter else "")
    if "base_model" not in manifest:
        manifest = manifest | {
            "base_model": str(base),
            "base_license": declared_license(source.folder),
        }
    card = model_card(Path(target), manifest, f"{what}, written by `esft_jax`.", figures)
    _export(source, loaded, Path(target), dtype, chats, card, say)


def undo_adapter(
    model: str | Path,
    adapter: str | Path,
    base: str | Path,
    target: str | Path,
    say: Callable[[str], None] = print,
) -> None:
    """Write a model that an adapter was merged into with the base's tensors in its place.

    What was merged into other tensors stays, and so do tokenizer and chat template of the model. Of
    an adapter merged alone, this gives the base's weights.

    Args:
        model: Hugging Face folder, hub name, or converted checkpoint, as `export` wrote it.
        base: what the adapter was trained on.
        target, say: see `export_model`.

    Raises:
        InputError: as there; or the model does not hold the adapter's numbers, so that another
            adapter changed them after it, or the adapter was never merged.
    """
    source, origin, chats = open_source(model), open_source(base), run_chat_format(adapter)
    make_way(Path(target))
    loaded = load_adapter(adapter)
    _check(loaded, origin, chats)
    if source.config != origin.config:
        raise InputError(f"{model}: is another model than {base}; expected one of its exports")
    undone = _Undone(loaded, origin, str(model))
    about = {"base_model": str(base), "base_license": declared_license(origin.folder)}
    what = f"`{model}` without the adapter `{adapter}`, written by `esft_jax`."
    card = model_card(Path(target), about, what)
    _export(source, undone, Path(target), None, ChatFormat(), card, say)


class _Replacement(Protocol):
    """Tensors in the place of some of a model's."""

    @property
    def folder(self) -> Path:
        """Where they are from."""

    @property
    def names(self) -> list[str]:
        """Which of them."""

    def dtype(self, name: str, base: np.dtype) -> np.dtype:
        """The type of one, where that of the model is `base`."""

    def merged(self, name: str, base: Callable[[], np.ndarray]) -> np.ndarray:
        """One of them, from the model's."""


@dataclass(frozen=True)
class _Undone:
    """The base's tensors, for a model that holds those of an adapter.

    Attributes:
        adapter: what was merged.
        base: what it was merged into.
        model: what messages call the result of that.
    """

    adapter: Adapter | LoRAAdapter
    base: Source
    model: str

    @property
    def folder(self) -> Path:
        return self.base.folder

    @property
    def names(self) -> list[str]:
        return self.adapter.names

    def dtype(self, name: str, base: np.dtype) -> np.dtype:
        return self.base.dtype(name)

    def merged(self, name: str, base: Callable[[], np.ndarray]) -> np.ndarray:
        found, before = base(), self.base.tensor(name)
        expected = self.adapter.merged(name, lambda: before)
        if not np.array_equal(expected.astype(found.dtype), found):
            raise InputError(
                f"{self.model}: tensor {name!r} does not hold the numbers of "
                f"{self.adapter.folder}; expected the adapter that was merged into it last"
            )
        return before


def _check(adapter: Adapter | LoRAAdapter, base: Source, chats: ChatFormat) -> None:
    """Raise an `InputError` unless an adapter belongs to a base."""
    bound = adapter.manifest or {}
    tokenizer = None
    if "tokenizer_fingerprint" in bound:
        read = Tokenizer.load(base.folder, chats)
        tokenizer = tokenizer_fingerprint(base.folder, read)
    adapter.check(base.config, tokenizer_fingerprint=tokenizer)
    if bound:  # the fingerprint may take reading the whole base
        adapter.check(base.config, base.fingerprint)


def _export(
    source: Source,
    loaded: _Replacement | None,
    target: Path,
    dtype: DTypeLike | None,
    chats: ChatFormat,
    card: str,
    say: Callable[[str], None],
) -> None:
    """Write a model with some tensors replaced; see `export_model`."""
    table = tensor_table(source.config)
    places = table.places
    stored = {name: source.dtype(name) for name in source.placements}
    wanted = dict(stored)
    if source.config.quantised is not None:  # bfloat16 is what models computed in before it
        wanted |= {name: np.dtype(jnp.bfloat16) for name in stored if not places[name].wide}
    changed = set[str]()
    if loaded is not None:
        changed = set(loaded.names)
        wanted |= {name: loaded.dtype(name, wanted[name]) for name in changed}
        if isinstance(loaded, LoRAAdapter):
            stored |= dict.fromkeys(changed, np.dtype(np.float32))  # the sums
        else:
            stored |= {name: wanted[name] for name in changed}
    own = {n for n, p in places.items() if p.wide or p.role is Role.SELECTION_BIAS}
    weights = {name: kind for name, kind in wanted.items() if name not in own}
    common = common_dtype(weights.values()) if dtype is None else jnp.dtype(dtype)
    parts = stored_parts(table, fused=source.fused)
    specs = stored_specs(table, parts, common, wanted)
    carried = source.carried
    specs |= {name: TensorSpec(carried.dtype(name), info.shape) for name, info in carried.items()}

    def merged(name: str) -> np.ndarray:
        if loaded is not None and name in changed:
            tensor = loaded.merged(name, partial(source.tensor, name))
        else:
            tensor = source.tensor(name)
        tensor = tensor.astype(common, copy=False) if name in weights else tensor
        if not is_finite(tensor):
            raise InputError(
                f"{loaded.folder if loaded is not None and name in changed else source.folder}: "
                f"tensor {name!r} has values that are no finite numbers in {common.name}"
            )
        return tensor

    def arriving(name: str) -> np.ndarray:
        if name in carried:
            return carried.read(name)
        return stored_tensor(table, name, specs, parts, merged)

    tensors = progress_over(
        in_order(arriving, specs, lambda name: specs[name].num_bytes), "export", len(specs)
    )
    _write_model(target, source.folder, specs, tensors, common, chats, card, replace=False)
    cast = Counter(stored[name].name for name in weights if stored[name] != common)
    said = [f"all {len(weights):,} tensors in {common.name}"]
    said += [f"{number:,} cast from {kind}" for kind, number in sorted(cast.items())]
    if source.config.quantised is not None:
        said.append(f"dequantised from {source.config.quantised}, without quantization_config")
    said += [f"{len(carried):,} tensors carried along"] if carried else []
    if chats.arguments:
        given = json.dumps(dict(chats.arguments), ensure_ascii=False)
        said += [f"its chat template is to be given {given}"]
    say(", ".join(said))


def save_model(
    model: Transformer,
    folder: str | Path,
    template_folder: str | Path,
    dtype: DTypeLike | None = None,
    carried: TensorFiles | None = None,
    chat_format: ChatFormat | None = None,
    card: str | None = None,
    *,
    fused: bool | None = None,
) -> None:
    """Write all weights of a model as a Hugging Face folder; an older one there is replaced.

    Tuned experts and low-rank updates are in it, merged in float32, as in an exported adapter.
    On several processes all must call it; the first one writes.

    Args:
        template_folder: where `config.json` and the tokenizer are copied from.
        dtype: type of the weights; the model's own by default.
        carried: tensors of the base that the model does not use (`Source.carried`).
        chat_format: what of the template and the stop tokens is to be other than there.
        card: its model card; None writes none.
        fused: write the experts of a layer in fused tensors (`Source.fused`); None: as most files
            of the family have them.

    Raises:
        InputError: another template, type or place than a model can be saved with, or weights that
            are quantised.
    """
    if is_quantised(model):
        raise InputError(
            "save_model: the model holds quantised weights; expected one in full precision "
            "(`export` merges an adapter into the checkpoint that it was trained from)"
        )
    dtype = np.dtype(dtype or model.dtype)
    if dtype not in DTYPE_NAMES:
        raise InputError(f"dtype: {dtype}; expected {', '.join(map(str, DTYPE_NAMES))}")
    table, template = tensor_table(model.config), Path(template_folder)
    if load_model_config(template) != model.config:
        raise InputError(f"{template / 'config.json'}: describes another model than the one saved")
    parts = stored_parts(table, fused=table.experts.stored_fused if fused is None else fused)
    specs = stored_specs(table, parts, dtype)
    read = ModelTensors(model).tensor
    made = ((name, stored_tensor(table, name, specs, parts, read)) for name in parts)
    kept = TensorFiles(template, {}) if carried is None else carried
    specs = specs | {n: TensorSpec(kept.dtype(n), info.shape) for n, info in kept.items()}
    tensors = chain(made, ((name, kept.read(name)) for name in kept))
    # No process returns, and perhaps opens the folder, before it is there.
    with on_all_processes(str(folder)):
        try:
            if jax.process_index() == 0:
                chats = chat_format or ChatFormat()
                own = Path(folder)
                _write_model(own, template, specs, tensors, dtype, chats, card, replace=True)
        finally:
            # Reading a tensor takes part of every process, even if the first one cannot write it.
            for _ in tensors:
                pass


def exported_config(raw: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """A `config.json` that all readers understand alike.

    transformers 5 reads `rope_parameters` and `dtype`; the published code and transformers 4 read
    `rope_theta`, `rope_scaling` and `torch_dtype`, and silently drop YaRN without them.

    Args:
        raw: the parsed `config.json`, in either spelling.
        dtype: type the weights are loaded in unless the reader says otherwise.
    """
    left = "auto_map", "quantization_config"  # code stays behind; no weight is written quantised
    config = {key: value for key, value in raw.items() if key not in left}
    types = {"dtype": dtype.name, "torch_dtype": dtype.name}
    if isinstance(text := raw.get("text_config"), dict):
        return config | {"text_config": exported_config(text, dtype)} | types
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    # Those by kind of layer have no older spelling, and absent keys are the family's own.
    by_kind = any(isinstance(value, dict) for value in rope.values())
    if by_kind or not (rope or raw.get("rope_theta")):
        return config | types
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", raw.get("rope_theta"))
    base = {} if theta is None else {"rope_theta": theta}  # the family's own, if it says none
    spelled = {
        "rope_parameters": {"rope_type": kind, **base, **rope},
        "rope_scaling": None if kind == "default" else {"type": kind, "rope_type": kind, **rope},
    }
    return config | base | spelled | types


def _write_model(
    target: Path,
    template: Path,
    specs: dict[str, TensorSpec],
    tensors: Iterator[tuple[str, np.ndarray]],
    dtype: np.dtype,
    chats: ChatFormat,
    card: str | None,
    *,
    replace: bool,
) -> None:
    path = template / "config.json"
    config = exported_config(read_json(path), dtype)
    with new_folder(target, replace=replace) as folder:
        copy_companions(template, folder)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        _write_json(folder / "config.json", config)
        if chats.template is not None:
            (folder / TEMPLATE_FILE).write_text(chats.template, encoding="utf-8")
        if chats.stop_token is not None:
            generation = folder / "generation_config.json"
            stops = {"eos_token_id": list(Tokenizer.load(template, chats).stop_ids)}
            _write_json(generation, (read_json(generation) if generation.exists() else {}) | stops)
        write_tensors(folder, specs, tensors, _MAX_SHARD_BYTES)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
