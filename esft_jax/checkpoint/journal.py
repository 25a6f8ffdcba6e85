"""What is finished of a work that several processes share, and that a kill may interrupt."""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pydantic

from esft_jax.checkpoint.streaming import in_order, share
from esft_jax.errors import InputError
from esft_jax.files import check_no_links, checked, read_json_lines, visible, write_text_atomic
from esft_jax.progress import Progress

JOURNAL = "conversion.jsonl"
"""It names what the work is, and the pieces that are finished."""
_OF_PROCESS = "conversion-{}.jsonl"


@dataclass(frozen=True)
class _Begun:
    """First line of a journal: what makes the work the same one."""

    source: str


@dataclass(frozen=True)
class _Finished:
    """A line of a journal: a piece whose chunks are on the disk, and its hash."""

    tensor: str
    sha256: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


class Journal:
    """The journals in a folder that is written piece by piece.

    Args:
        folder: where they lie, and what is written.
        pieces: names of all pieces.
        source: what the pieces are of; messages name it.
    """

    def __init__(self, folder: Path, pieces: Collection[str], source: str):
        self._folder, self._pieces, self._source = folder, pieces, source

    def begin(self, identity: str) -> None:
        """Begin a journal in an empty folder, or gather those of the processes that were here
        before.

        Args:
            identity: of the work; only the same work is continued.

        Raises:
            InputError: the folder holds something else.
        """
        folder, journal = self._folder, self._folder / JOURNAL
        if folder.is_symlink():
            raise InputError(f"{folder}: is a link; expected a new or empty folder")
        check_no_links(folder)
        begin = _Begun(identity)
        entries: list[_Begun | _Finished] = [begin]
        if journal.is_file():
            begun, finished = self._read(self._files())
            if begun != [begin]:
                raise InputError(
                    f"{folder}: unfinished conversion of another source; delete it or choose a "
                    "new folder"
                )
            entries += finished
        elif folder.exists() and (not folder.is_dir() or visible(folder)):
            raise InputError(f"{folder}: exists; expected a new or empty folder")
        write_text_atomic(journal, "".join(map(_line, entries)))
        for path in self._of_processes():
            path.unlink()

    def work_off(
        self,
        work: Callable[[str], str],
        num_bytes: Callable[[str], int],
        process: int,
        processes: int,
        what: str,
    ) -> None:
        """Work on a process's share of the pieces that are not finished; note each that is.

        Args:
            work: on a piece; its chunks are on the disk when it returns its hash.
            num_bytes: of a piece.
            what: the progress bar says.
        """
        # Not what others have noted since: all processes must divide the same pieces among them.
        finished = self._digests([self._folder / JOURNAL])
        left = [name for name in self._pieces if name not in finished]
        names = share(left, num_bytes, process, processes)
        with (
            (self._folder / _OF_PROCESS.format(process)).open("w", encoding="utf-8") as journal,
            Progress(what, sum(map(num_bytes, names)), unit="B") as progress,
        ):
            for name, digest in in_order(work, names, num_bytes):
                journal.write(_line(_Finished(name, digest)))
                journal.flush()
                progress.advance(num_bytes(name))

    def digests(self) -> dict[str, str]:
        """Hashes of all pieces, once all are finished."""
        found = self._digests(self._files())
        assert found.keys() == set(self._pieces)
        return found

    def end(self) -> None:
        """Remove the journals: something else says that all is there."""
        for path in self._files():
            path.unlink()

    def _of_processes(self) -> list[Path]:
        return visible(self._folder, _OF_PROCESS.format("*"))

    def _files(self) -> list[Path]:
        """What earlier attempts have finished, and what each process of this one has."""
        return [self._folder / JOURNAL, *self._of_processes()]

    def _digests(self, paths: Iterable[Path]) -> dict[str, str]:
        return {entry.tensor: entry.sha256 for entry in self._read(paths)[1]}

    def _read(self, paths: Iterable[Path]) -> tuple[list[_Begun], list[_Finished]]:
        """Entries of journals. A kill may have left half a line at the end of each.

        Raises:
            InputError: another line is broken; names it.
        """
        begun: list[_Begun] = []
        finished: list[_Finished] = []
        for path in paths:
            for where, value in read_json_lines(path, growing=True):
                if isinstance(value, dict) and "source" in value:
                    begun.append(checked(_Begun, value, where))
                else:
                    finished.append(checked(_Finished, value, where))
                    if (name := finished[-1].tensor) not in self._pieces:
                        raise InputError(f"{where}: tensor: {name!r} is none of {self._source}")
        return begun, finished


def _line(entry: _Begun | _Finished) -> str:
    return json.dumps(dataclasses.asdict(entry)) + "\n"
