"""Short Python functions with the first sentence of their docstrings."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packages import Unpacked

LONGEST_FUNCTION = 320  # characters, without the docstring
SHORTEST_SENTENCE, LONGEST_SENTENCE = 15, 90  # characters


class Documented(NamedTuple):
    """A function as text, where it stands, and what its docstring says first."""

    module: str
    name: str
    code: str
    sentence: str


def documented_functions(package: Unpacked) -> Iterator[Documented]:
    """Yield the functions of a package, tests aside, in the order of its files."""
    for path in sorted(package.folder.rglob("*.py")):
        module = str(path.relative_to(package.folder))
        # What tests tests is often taken from the standard library, which the base has read.
        if not {"tests", "testing"} & set(path.parts):
            yield from _functions(path, module)


def _functions(path: Path, module: str) -> Iterator[Documented]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef) or not (text := ast.get_docstring(node)):
            continue
        sentence = " ".join(text.strip().split("\n\n")[0].split())
        node.body, node.decorator_list = node.body[1:], []
        complete = SHORTEST_SENTENCE <= len(sentence) <= LONGEST_SENTENCE
        if not node.body or not complete or not sentence.endswith("."):
            continue
        code = ast.unparse(node)
        if len(code) <= LONGEST_FUNCTION and (code + sentence).isascii():
            yield Documented(module, node.name, code, sentence)
