"""What a reader could run: code blocks, command lines and links of a Markdown page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,})(?P<info>.*)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_INLINE = re.compile(r"`(statewise [^`]*)`")


class Block(NamedTuple):
    """A fenced block: the words after its fence, its text, and the line of the page its text starts on (from 1)."""

    info: tuple[str, ...]
    text: str
    line: int

    @property
    def runs(self) -> bool:
        """Whether the page promises that this is Python that works."""
        return self.info[:1] == ("python",) and "no-run" not in self.info


def blocks(page: str) -> Iterator[Block]:
    """Every fenced block of a page, in order; an open fence at the end is an error."""
    opened: re.Match[str] | None = None
    lines: list[str] = []
    start = 0
    for number, line in enumerate(page.splitlines(), start=1):
        fence = _FENCE.fullmatch(line)
        if opened is None:
            if fence:
                opened, lines, start = fence, [], number + 1
        elif fence and fence["ticks"] == opened["ticks"] and not fence["info"].strip():
            yield Block(tuple(opened["info"].split()), "\n".join(lines) + "\n", start)
            opened = None
        else:
            lines.append(line.removeprefix(opened["indent"]))
    if opened is not None:
        raise ValueError(f"the block that opens on line {start - 1} is not closed")


def prose(page: str) -> str:
    """The page without its blocks and its comments."""
    kept, inside = [], None
    for line in page.splitlines():
        fence = _FENCE.fullmatch(line)
        if fence and inside is None:
            inside = fence["ticks"]
        elif fence and fence["ticks"] == inside:
            inside = None
        elif inside is None:
            kept.append(line)
    return _COMMENT.sub("", "\n".join(kept))


def commands(page: str) -> Iterator[str]:
    """Every ``statewise ...`` a reader could type: lines of shell blocks, and code in running text.

    In running text a command without arguments is a mention of it, told here as a call of its help.
    """
    for block in blocks(page):
        if block.info[:1] and block.info[0] in ("shell", "sh", "bash", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if line.startswith("statewise "):
                    yield _one_command(line)
    for found in _INLINE.finditer(prose(page)):
        command = _one_command(found[1])
        yield command if len(command.split()) > 2 else f"{command} --help"


def _one_command(line: str) -> str:
    """Without a remark, and without what a pipe or a redirection leads to."""
    words = shlex.split(line, comments=True)
    ends = [position for position, word in enumerate(words) if word in ("|", ">", "&&", "<", ";")]
    return shlex.join(words[: ends[0]] if ends else words)


def links(page: str) -> Iterator[str]:
    """Targets of links to files beside the page, without their anchors."""
    for found in _LINK.finditer(prose(page)):
        target = found["target"].partition("#")[0]
        if target and "://" not in target:
            yield target


def run_page(path: Path) -> int:
    """Run the Python blocks of a page in order in one namespace; how many there were.

    Tracebacks point into the page.
    """
    namespace: dict[str, object] = {"__name__": path.stem}
    count = 0
    for block in blocks(path.read_text("utf-8")):
        if block.runs:
            exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), namespace)
            count += 1
    return count
