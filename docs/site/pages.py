"""What the site has besides the files in `docs/`: a hook of MkDocs.

The README becomes the first page. The keys of a run come from the configuration's classes, the
public names from `esft_jax/__init__.pyi`. Links to what is no page lead to the repository.
"""

import ast
import json
import logging
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_type_hints

from griffe import Docstring, DocstringSectionKind
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import TypeAdapter

from esft_jax.config import RunConfig

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Files of the top folder that are pages.
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(\]\(|src=\")(?!https?:|mailto:|#)([^)\"\s#]+)")
log = logging.getLogger("mkdocs.hooks.pages")


def on_config(config: MkDocsConfig) -> None:
    """Take the address of the repository from the metadata of the package."""
    config.repo_url = PROJECT["urls"]["Source"]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are no file in `docs/`."""
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in TOP.items()}
    for name, text in {**pages, "keys.md": keys(), "api.md": names()}.items():
        files.append(File.generated(config, name, content=text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of `docs/` to the repository, and those of the README to the pages."""
    folder = ROOT if page.file.src_uri in TOP.values() else ROOT / "docs"

    def follow(link: re.Match[str]) -> str:
        before, target = link.groups()
        inside = os.path.relpath(folder / target, ROOT).replace(os.sep, "/")
        if inside in TOP:
            return before + TOP[inside]
        if inside.startswith("docs/"):
            return before + inside.removeprefix("docs/")  # MkDocs says if it is missing
        if not (ROOT / inside).exists():
            log.warning("%s: %s does not exist", page.file.src_uri, target)
        return f"{before}{config.repo_url}/blob/main/{inside}"

    return LINK.sub(follow, markdown)


def keys() -> str:
    """A table for each section of a configuration: key, values, default, meaning."""
    schema = TypeAdapter(RunConfig).json_schema()
    page = [
        "# Every key\n",
        "From the classes that check a configuration. [Configuration](configuration.md) explains "
        "what belongs together; a key `steps` of the section `train` is `train.steps` on the "
        "command line.\n",
    ]
    for path, section in sections(RunConfig):
        described = schema["$defs"][section.__name__] if path else schema
        title, *text = (section.__doc__ or "").split("Attributes:")[0].strip().split("\n\n")
        page += [f"## {path or 'The run'}\n", " ".join(title.split()) + "\n"]
        page += [" ".join(part.split()) + "\n" for part in text if path]
        page += ["| key | values | default | meaning |", "|---|---|---|---|"]
        meanings = attributes(section)
        for field in fields(section):
            kind = values(described["properties"][field.name], schema)
            row = [f"`{field.name}`", kind, default(field), meanings[field.name]]
            page.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        page.append("")
    return "\n".join(page)


def sections(kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The classes that a configuration is made of, with the keys that lead to them."""
    yield path, kind
    hints = get_type_hints(kind)
    for field in fields(kind):
        inner = hints[field.name]
        where = f"{path}.{field.name}".lstrip(".")
        if is_dataclass(inner):
            yield from sections(inner, where)
        elif named := [a for a in getattr(inner, "__args__", ()) if is_dataclass(a)]:
            yield from sections(named[0], f"{where}.NAME")


def attributes(kind: type) -> dict[str, str]:
    """What the docstring of a class says of its attributes."""
    found = Docstring(kind.__doc__ or "").parse("google", warnings=False)
    return {
        attribute.name: " ".join(attribute.description.split())
        for section in found
        if section.kind is DocstringSectionKind.attributes
        for attribute in section.value
    }


def default(key: Field[Any]) -> str:
    """What a key is where a configuration does not say it; of a section nothing."""
    if key.default is not MISSING:
        return "" if is_dataclass(key.default) else f"`{shown(key.default)}`"
    return "required" if key.default_factory is MISSING else f"`{shown(key.default_factory())}`"


def shown(value: Any) -> str:
    """A value as YAML would have it."""
    return json.dumps(value).replace('"', "")


def values(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """The values that a key takes, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        inner = whole["$defs"][name]
        return "a section" if "properties" in inner else values(inner, whole)
    if "anyOf" in schema:
        return " or ".join(values(kind, whole) for kind in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{shown(v)}`" for v in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"a list: {values(schema['items'], whole)}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"by name: {values(inner, whole)}" if isinstance(inner, dict) else "by name"
    kind = {"string": "text", "null": "null", "boolean": "`true`, `false`"}.get(
        schema.get("type", ""), schema.get("type", "any value")
    )
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [
        f"{sign} {schema[key]:g}"
        for key, sign in signs.items()
        if key in schema and abs(schema[key]) < 2**31
    ]
    return " ".join([kind, ", ".join(limits)]).strip()


def names() -> str:
    """The public names, by the room that they come from."""
    stub = ast.parse((ROOT / "esft_jax" / "__init__.pyi").read_text(encoding="utf-8"))
    page = ["# Library\n", "```python\nimport esft_jax\n```\n"]
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    for room, nodes in groupby(imports, lambda node: (node.module or "").partition(".")[0]):
        page.append(f"## {room}\n")
        for node in nodes:
            page += [f"::: esft_jax.{node.module}.{alias.name}\n" for alias in node.names]
    return "\n".join(page)
