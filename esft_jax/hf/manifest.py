"""`manifest.json` of an adapter: what it was trained on."""

from pathlib import Path
from typing import Any

from esft_jax.errors import InputError
from esft_jax.files import parse_json, read_text

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an adapter; None for those of others.

    Raises:
        InputError: it names no base.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = parse_json(read_text(path), str(path))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("base_fingerprint"), str):
        raise InputError(f"{path}: key 'base_fingerprint' is missing; expected a string")
    return manifest


def check_base(folder: Path, manifest: dict[str, Any] | None, fingerprint: str | None) -> None:
    """Raise an `InputError` if an adapter was trained on another base than this one."""
    if manifest is None or fingerprint is None:
        return
    trained_on = manifest["base_fingerprint"]
    if trained_on != fingerprint:
        raise InputError(
            f"{folder / MANIFEST}: base_fingerprint: trained on another base "
            f"({trained_on[:12]}...); this one is {fingerprint[:12]}..."
        )
