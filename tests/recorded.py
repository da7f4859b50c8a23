"""A probe that answers from a recorded host instead of the machine: the twin of agent.Probe for tests and the demo.

    hosts/NAME/meta.json        now, and what files cannot hold: links, statvfs, stat, errors
    hosts/NAME/files/…          the paths as on the host (`.empty` marks an empty directory)
    hosts/NAME/commands/…       outputs; index.json says which command line they belong to
    hosts/NAME/files.2/…        what was different a moment later (tick 1), and so on
    hosts/NAME/expect/…         what each collector makes of it

A command is named by its words as a shell would quote them. What was not recorded is missing.
"""

from __future__ import annotations

import json
import shlex
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from agent import SourceError, to_text  # noqa: E402

HOSTS = Path(__file__).resolve().parent / "hosts"
TICK_SECONDS = 30
EMPTY = ".empty"


def recordings(folder: Path = HOSTS) -> list[Path]:
    """The folders of all recorded hosts."""
    return sorted(path for path in folder.iterdir() if (path / "meta.json").is_file())


class RecordedProbe:
    """Same calls as agent.Probe. `tick` 0, 1, … are moments 30 s apart; a later one sees what changed on top."""

    def __init__(self, path: str | Path, tick: int = 0) -> None:
        self.path = Path(path)
        self.tick = tick
        self.meta: dict[str, Any] = json.loads((self.path / "meta.json").read_text())
        self.layers = [self._layer("files", number) for number in range(tick + 1)][::-1]
        self.commands = self._load_commands()
        self.problems: dict[str, dict[str, str]] = {}
        self.places: dict[str, dict[str, str]] | None = None
        self.trace: Any = None
        self.stopping = False
        self.calls: list[tuple[str, str]] = []  # what was asked, for tests

    def _layer(self, name: str, number: int) -> Path:
        return self.path / (name if number == 0 else f"{name}.{number + 1}")

    def _load_commands(self) -> dict[str, tuple[Path, dict[str, Any]]]:
        found = {}
        for number in range(self.tick + 1):
            folder = self._layer("commands", number)
            if (folder / "index.json").is_file():
                for words, answer in json.loads((folder / "index.json").read_text()).items():
                    found[words] = (folder, answer)
        return found

    # files

    def _find(self, path: str) -> Path:
        """The newest layer's file or directory at a path of the host; links on the way are followed."""
        self._fail_as_recorded(path)
        path = self._resolve(path)
        for layer in self.layers:
            if (layer / path.lstrip("/")).exists():
                return layer / path.lstrip("/")
        raise SourceError("missing", f"{path}: not there")

    def _resolve(self, path: str) -> str:
        links = self.meta.get("links", {})
        done = ""
        for part in path.rstrip("/").removesuffix("/.").split("/")[1:]:
            done = f"{done}/{part}"
            for _ in range(8):
                done = links.get(done, done)
        return done or "/"

    def _fail_as_recorded(self, path: str) -> None:
        if path in self.meta.get("errors", {}):
            code, detail = self.meta["errors"][path]
            raise SourceError(code, f"{path}: {detail}")

    def read(self, path: str, limit: int = 4 << 20) -> str:
        self.calls.append(("read", path))
        file = self._find(path)
        if file.is_dir():
            raise SourceError("failed", f"{path}: Is a directory")
        raw = file.read_bytes()
        if len(raw) > limit:
            raise SourceError("too_large", f"{path}: more than {limit} bytes")
        return to_text(raw)

    def read_line(self, path: str, limit: int = 4 << 20) -> str:
        return self.read(path, 1 << 30).split("\n", 1)[0][:limit]

    def list_dir(self, path: str) -> list[str]:
        self.calls.append(("list", path))
        inside = self._resolve(path)
        names = {name.rpartition("/")[2] for name in self.meta.get("links", {}) if name.rpartition("/")[0] == inside}
        if not names and not self._find(path).is_dir():
            raise SourceError("missing", f"{path}: not a directory")
        self._fail_as_recorded(path)
        for layer in self.layers:
            if (layer / inside.lstrip("/")).is_dir():
                names.update(entry.name for entry in (layer / inside.lstrip("/")).iterdir())
        return sorted(names - {EMPTY})

    def exists(self, path: str) -> bool:
        self.calls.append(("stat", path))
        if self.meta.get("errors", {}).get(path, [""])[0] == "missing":
            return False
        self._fail_as_recorded(path)
        try:
            found = self._find(path)
        except SourceError:
            return any(link.startswith(f"{path}/") for link in self.meta.get("links", {}))
        return found.is_dir() or not path.endswith("/.")

    def stat(self, path: str) -> Any:
        """Size and content are the file's; time and inode are recorded, or made up the same way each time."""
        self.calls.append(("stat", path))
        file = self._find(path)
        known = self.meta.get("stat", {}).get(path, {})
        size = file.stat().st_size if file.is_file() else 4096
        mtime, inode = known.get("mtime", self.meta["now"] - 3600), known.get("ino", zlib.crc32(path.encode()))
        return SimpleNamespace(st_size=size, st_mtime=mtime, st_ino=inode, st_dev=1)

    def statvfs(self, path: str) -> Any:
        self.calls.append(("stat", path))
        self._fail_as_recorded(path)
        values = self.meta.get("statvfs", {}).get(path)
        if values is None:
            raise SourceError("missing", f"{path}: not there")
        return SimpleNamespace(**values)

    def readlink(self, path: str) -> str:
        self.calls.append(("link", path))
        self._fail_as_recorded(path)
        end = self._resolve(path)
        if end == path and not self.exists(path):
            raise SourceError("missing", f"{path}: not there")
        return end

    # commands

    def run(self, *argv: str, limit: float = 10.0, ok: tuple[int, ...] | None = (0,)) -> str:
        words = shlex.join(argv)
        self.calls.append(("run", words))
        if words not in self.commands:
            raise SourceError("missing", f"{words}: not recorded")
        folder, answer = self.commands[words]
        if "raises" in answer:
            raise SourceError(answer["raises"], f"{words}: {answer.get('detail', '')}")
        exit_code = answer.get("exit", 0)
        if ok is not None and exit_code not in ok:
            raise SourceError("failed", f"{words}: exit code {exit_code}: {answer.get('stderr', '')}")
        return to_text((folder / answer["stdout"]).read_bytes()) if answer.get("stdout") else ""

    def find(self, name: str) -> str:
        if any(words.split()[0] == name for words in self.commands):
            return f"/usr/sbin/{name}"
        raise SourceError("missing", f"{name}: not installed")

    # clocks, notes

    def now(self) -> float:
        return self.meta["now"] + TICK_SECONDS * self.tick

    def monotonic(self) -> float:
        return 1000.0 + TICK_SECONDS * self.tick

    def problem(self, section: str, code: str, detail: str = "") -> None:
        known = self.problems.get(section)
        if known is None:
            self.problems[section] = {"code": code, "detail": detail}
        elif detail:
            known["detail"] += f"; {detail}"

    def cancel(self) -> None:
        self.stopping = True
