"""`manifest.json` of an adapter: what it was trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esft_jax.errors import InputError
from esft_jax.files import checked, read_json
from esft_jax.hf.identity import PARTS, check_same_base

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an adapter; None for those of others.

    Raises:
        InputError: it names no base.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("base_fingerprint"), str):
        raise InputError(f"{path}: key 'base_fingerprint' is missing; expected a string")
    for key in PARTS:
        if key in manifest:
            checked(str, manifest[key], f"{path}: {key}")
    return manifest


def check_base(folder: Path, manifest: dict[str, Any] | None, base: Mapping[str, Any]) -> None:
    """Raise an `InputError` if an adapter was trained on another base than this one.

    Args:
        base: what is known of it, see `PARTS`.
    """
    if manifest is not None:
        check_same_base(manifest, base, str(folder / MANIFEST), "trained on")
