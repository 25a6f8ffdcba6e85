"""ESFT adapters in a running vLLM engine: put in, exchanged and taken out, without a restart.

`ExpertAdapters` is a worker extension of vLLM. Its Python needs this package and `lazy_loader`, and
no JAX:

    llm = LLM("M", worker_extension_cls="esft_jax.serving.vllm.ExpertAdapters")
    switch_adapter(llm, "runs/my-task/adapter")

Engines rearrange a layer's experts for their kernels, so all experts are loaded of the layers that
the adapter, or the one before it, trained: its own, and the others from the files of the base.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esft_jax.errors import InputError

_EXPERT = re.compile(r"(?P<layer>.+\.layers\.\d+\..*?experts)\.\d+\.")
# What says of tensors that are not loaded again that it failed to load them.
_LOGGERS = (
    "vllm.model_executor.model_loader.reload.inplace",
    "vllm.model_executor.model_loader.reload.layerwise",
)


class ExpertAdapters:
    """Worker extension: the methods are called in every worker, by `collective_rpc`."""

    def load_esft_adapter(self: Any, folder: str) -> None:
        """Put an adapter's experts in the place of the base's, or of another adapter's.

        No request may run meanwhile, and the prefix cache must be reset afterwards, for it holds
        keys and values of the experts before; see `switch_adapter`.

        Args:
            folder: adapter folder, where the workers run.

        Raises:
            InputError: the engine's model holds no experts by names of their own, or holds them
                quantised; or the folder is no adapter, or not one of this model's routed experts
                alone. Nothing is loaded.
        """
        base = _expert_places(_base_folder(self.vllm_config.model_config))
        self._load_esft_experts(base, _adapter_places(Path(folder), base))

    def unload_esft_adapter(self: Any) -> None:
        """Put the base's experts back, if there is an adapter; see `load_esft_adapter`."""
        self._load_esft_experts(_expert_places(_base_folder(self.vllm_config.model_config)), {})

    def _load_esft_experts(self: Any, base: Mapping[str, Path], tuned: Mapping[str, Path]) -> None:
        layers = {_layer(name) for name in tuned}
        changed = layers | getattr(self, "_esft_layers", set())
        if not changed:
            return
        self._esft_layers = changed  # until all of it is loaded, in case it fails
        if self.device.type == "cpu":  # vLLM packs weights for the CPU only with a new kernel
            for module in self.get_model().modules():
                method: Any = getattr(module, "quant_method", None)
                if hasattr(method, "moe_kernel"):
                    method.moe_kernel = None
        places = {name: tuned.get(name, base[name]) for name in base if _layer(name) in changed}
        with _without_warnings():
            self.reload_weights(weights_iterator=_tensors(places))
        self._esft_layers = layers


def switch_adapter(llm: Any, folder: str | os.PathLike[str] | None) -> None:
    """Have an engine answer with an adapter; None stands for its base alone.

    Args:
        llm: a `vllm.LLM` made with this module's `ExpertAdapters` as its `worker_extension_cls`.

    Raises:
        RuntimeError: requests are running.
        Exception: see `ExpertAdapters.load_esft_adapter`; as the engine hands it on.
    """
    if folder is None:
        llm.collective_rpc("unload_esft_adapter")
    else:
        llm.collective_rpc("load_esft_adapter", args=(str(Path(folder).resolve()),))
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache is in use; expected an engine without requests")


def _base_folder(model_config: Any) -> Path:
    """The engine's model on disk."""
    if os.path.isdir(model_config.model):
        return Path(model_config.model)
    from huggingface_hub import snapshot_download

    revision = model_config.revision
    return Path(snapshot_download(model_config.model, revision=revision, local_files_only=True))


def _expert_places(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a base's routed experts."""
    experts = {name: file for name, file in _places(folder).items() if _EXPERT.match(name)}
    if not experts:
        raise InputError(
            f"{folder}: holds no experts by names of their own; expected an export to serve"
        )
    for name in experts:
        if not name.endswith((".weight", ".bias")):
            raise InputError(
                f"{folder}: holds tensor {name!r} of quantised experts; expected an export to serve"
            )
    return experts


def _adapter_places(folder: Path, base: Mapping[str, Path]) -> dict[str, Path]:
    """The file of each tensor of an adapter, by its name in the base."""
    if not (folder / "expert_cfg.json").is_file():
        raise InputError(f"{folder}: has no expert_cfg.json; expected an adapter of ESFT")
    tuned = {
        # The adapters that ESFT's authors released lack the prefix.
        name if name in base else f"model.{name}": file
        for name, file in _places(folder).items()
    }
    for name, file in tuned.items():
        if name not in base:
            raise InputError(
                f"{folder}: tensor {name!r} is of no routed expert of the engine's model; expected "
                "an adapter of these alone, or an export to serve"
            )
        found, expected = (_shape(each, name) for each in (file, base[name]))
        if found != expected:
            raise InputError(
                f"{folder}: tensor {name!r} has shape {found}; the engine's model has {expected}"
            )
    return tuned


def _layer(name: str) -> str:
    found = _EXPERT.match(name)
    assert found is not None, "an expert's"
    return found["layer"]


def _places(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a folder."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in files.items()}
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            places |= dict.fromkeys(tensors.keys(), file)
    return places


def _shape(file: Path, name: str) -> list[int]:
    from safetensors import safe_open

    with safe_open(file, "np") as tensors:
        names = tensors.keys()
        shape: list[int] = tensors.get_slice(
            name if name in names else name.removeprefix("model.")
        ).get_shape()
        return shape


def _tensors(places: Mapping[str, Path]) -> Iterator[tuple[str, Any]]:
    """Tensors by name, one layer after the other; the files are opened once."""
    from safetensors import safe_open

    opened: dict[Path, Any] = {}
    for name in sorted(places, key=_layer):
        file = places[name]
        if file not in opened:
            tensors = safe_open(file, "pt")
            opened[file] = tensors, set(tensors.keys())
        tensors, names = opened[file]
        yield name, tensors.get_tensor(name if name in names else name.removeprefix("model."))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Layers that keep their weights are no mistake."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
