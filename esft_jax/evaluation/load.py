"""Models to evaluate: a base, alone or with adapters."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from esft_jax.adapt.parts import roles_of
from esft_jax.checkpoint.adapter import Adapter, apply_adapter, load_adapter
from esft_jax.checkpoint.identity import tokenizer_fingerprint
from esft_jax.checkpoint.load import LoadedBase, load_base, local_folder, open_source
from esft_jax.checkpoint.manifest import RUN_DTYPES, run_chat_format
from esft_jax.checkpoint.peft import LoRAAdapter
from esft_jax.checkpoint.resident import attach_adapters, check_resident
from esft_jax.checkpoint.source import Source
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.files import read_json
from esft_jax.host_memory import Memory
from esft_jax.ops.quantisation import Quantisation


def load_tuned(
    model: str | Path,
    adapter: str | Path | None,
    dtype: DTypeLike | None,
    mesh: Mesh | None,
    quantisation: Quantisation | None = None,
    trained: frozenset[str] = frozenset(),
    frozen_memory: Memory = "device",
) -> LoadedBase:
    """A model with an adapter merged into it, if there is one.

    Args:
        dtype: of weights and computation; default: that of the adapter's run, else what the model's
            `config.json` names if it is float32 or bfloat16, else bfloat16.
        quantisation, trained, frozen_memory: see `load_base`; what the adapter trained is not
            quantised either.

    Raises:
        InputError: see `load_base` and `apply_adapter`.
    """
    opened = None
    if adapter is not None:
        opened = _open(adapter, open_source(model))
        dtype = dtype or opened.run_dtype
    if isinstance(opened, Adapter):
        trained |= roles_of(opened.expert_cfg.also)
    dtype = dtype or _named_dtype(model)
    base = load_base(model, dtype, mesh, quantisation, trained, frozen_memory)
    if opened is not None:
        apply_adapter(base.model, opened, base.fingerprint if opened.manifest else None)
    return base


def load_resident(
    model: str | Path,
    adapters: Sequence[str | Path],
    dtype: DTypeLike | None,
    mesh: Mesh | None,
    quantisation: Quantisation | None = None,
    trained: frozenset[str] = frozenset(),
    frozen_memory: Memory = "device",
) -> LoadedBase:
    """A model with several adapters beside it; see `attach_adapters`.

    Args:
        dtype, quantisation, trained, frozen_memory: see `load_tuned`; by default, all
            adapters' runs have had one type.

    Raises:
        InputError: see `load_base` and `attach_adapters`; or types differ, and none is given.
    """
    source = open_source(model)
    opened = [_open(adapter, source) for adapter in adapters]
    for each in opened:
        check_resident(source.config, each)
    types = {each.run_dtype for each in opened}
    if dtype is None and len(types) > 1:
        raise InputError(
            "dtype: the adapters' runs have had different ones; expected one to be named"
        )
    dtype = dtype or next(iter(types)) or _named_dtype(model)
    base = load_base(model, dtype, mesh, quantisation, trained, frozen_memory)
    attach_adapters(base.model, opened, base.fingerprint)
    return base


def is_resident(adapter: str | Path | None) -> bool:
    """Whether an adapter can be one of several beside a base: it trains routed experts alone."""
    opened = None if adapter is None else load_adapter(adapter)
    return isinstance(opened, Adapter) and not opened.expert_cfg.also


def _open(adapter: str | Path, source: Source) -> Adapter | LoRAAdapter:
    """An adapter, checked against its base before weights are read."""
    opened, tokenizer = load_adapter(adapter), None
    if "tokenizer_fingerprint" in (opened.manifest or {}):
        read = Tokenizer.load(source.folder, run_chat_format(adapter))
        tokenizer = tokenizer_fingerprint(source.folder, read)
    opened.check(source.config, tokenizer_fingerprint=tokenizer)
    return opened


def _named_dtype(model: str | Path) -> np.dtype:
    """The type that a model's `config.json` names, if a run can compute in it, else bfloat16."""
    path = local_folder(model) / "config.json"
    raw = read_json(path)
    named = raw.get("dtype") or raw.get("torch_dtype")  # the new and the old key
    return jnp.dtype(named if named in RUN_DTYPES else jnp.bfloat16)
