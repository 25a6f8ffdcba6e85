"""`manifest.json` of an adapter: what it was trained on."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from esft_jax.checkpoint.identity import PARTS, check_same_base, recorded_chat
from esft_jax.data.chat_template import ChatFormat
from esft_jax.errors import InputError
from esft_jax.files import checked, read_json

MANIFEST = "manifest.json"

# Types that runs compute in.
RUN_DTYPES = ("float32", "bfloat16")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an adapter; None for those of others.

    Raises:
        InputError: it names no base, or a type that no run has.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):  # a link that leads nowhere is there, and broken
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("base_fingerprint"), str):
        raise InputError(f"{path}: key 'base_fingerprint' is missing; expected a string")
    for key in PARTS:
        if key in manifest:
            checked(str, manifest[key], f"{path}: {key}")
    dtype = manifest.get("dtype", RUN_DTYPES[0])
    if dtype not in RUN_DTYPES:
        raise InputError(f"{path}: dtype: is {dtype!r}; expected {' or '.join(RUN_DTYPES)}")
    return manifest


def run_chat_format(folder: str | Path | None) -> ChatFormat:
    """How the run of an adapter rendered chats; as the model says for no adapter, or others'."""
    if folder is None:
        return ChatFormat()
    return recorded_chat(read_manifest(Path(folder)), str(Path(folder) / MANIFEST))


def run_dtype(manifest: dict[str, Any] | None) -> np.dtype | None:
    """The type that the run computed in; None where its manifest does not say."""
    return jnp.dtype(manifest["dtype"]) if manifest and "dtype" in manifest else None


def check_base(folder: Path, manifest: dict[str, Any] | None, base: Mapping[str, Any]) -> None:
    """Raise an `InputError` if an adapter was trained on another base than this one.

    Args:
        base: what is known of it, see `PARTS`.
    """
    if manifest is not None:
        check_same_base(manifest, base, str(folder / MANIFEST), "trained on")
