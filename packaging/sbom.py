#!/usr/bin/env python3
"""Say what is inside a frozen program: a CycloneDX list of its parts, and their licences. Called by freeze.sh.

PyInstaller's table of what it packed names the source of each file; Python's metadata and dpkg say whose that is.
A part whose licence nobody has looked at ends the build: so GPL code (readline is one import away) cannot slip in.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

# Debian package (without its version) -> SPDX identifier, each looked up in its /usr/share/doc/*/copyright.
DEBIAN_LICENCES = {
    "libpython3.11": "PSF-2.0", "libpython3.11-stdlib": "PSF-2.0", "libpython3.11-minimal": "PSF-2.0",
    "libssl3": "Apache-2.0", "zlib1g": "Zlib", "libexpat1": "MIT", "libuuid1": "BSD-3-Clause",
    "libsqlite3-0": "blessing", "libffi8": "MIT", "libmpdec3": "BSD-2-Clause",
}
PYTHON_LICENCES = {
    "bottle": "MIT", "waitress": "ZPL-2.1", "argon2-cffi": "MIT", "argon2-cffi-bindings": "MIT", "cffi": "MIT-0",
    "pyinstaller": "GPL-2.0-or-later WITH Bootloader-exception", "pyinstaller-hooks-contrib": "Apache-2.0",
    "setuptools": "MIT", "altgraph": "MIT", "packaging": "Apache-2.0 OR BSD-2-Clause",
}
LICENCE_NAMES = ("licen", "copying", "notice", "authors")


class Part(NamedTuple):
    """Something packed that has a version and a licence of its own."""

    name: str
    version: str
    purl: str
    licence: str
    texts: tuple[Path, ...]


def sources(work: Path) -> Iterator[Path]:
    """Where PyInstaller took the packed files from, out of its tables (Python literals in *.toc)."""
    for table in sorted(work.glob("*.toc")):
        yield from walk(ast.literal_eval(table.read_text(encoding="utf-8")))


def walk(value: Any) -> Iterator[Path]:
    if isinstance(value, tuple) and len(value) == 3 and all(isinstance(one, str) for one in value):
        if value[1].startswith("/"):
            yield Path(value[1])
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from walk(one)


def python_parts(found: set[Path]) -> Iterator[Part]:
    """Installed distributions that one of the packed files belongs to; and PyInstaller, whose loader is in front."""
    for one in sorted(importlib.metadata.distributions(), key=lambda one: one.name):
        files = [Path(str(one.locate_file(file))).resolve() for file in one.files or ()]
        if one.name != "pyinstaller" and not found.intersection(files):
            continue
        texts = tuple(f for f in files if any(w in f.name.lower() for w in LICENCE_NAMES) and "dist-info" in str(f))
        name = one.name.lower().replace("_", "-")
        yield Part(name, one.version, f"pkg:pypi/{name}@{one.version}", PYTHON_LICENCES.get(name, ""), texts)


def debian_parts(found: set[Path]) -> Iterator[Part]:
    """Debian packages that one of the packed files belongs to."""
    # dpkg knows some files as /lib/…, which is /usr/lib/… since the two were merged.
    paths = {str(path) for path in found} | {str(path).removeprefix("/usr") for path in found}
    asked = subprocess.run(["dpkg-query", "-S", *sorted(paths)], capture_output=True, text=True)
    names = sorted({line.partition(":")[0] for line in asked.stdout.splitlines() if not line.startswith("diversion")})
    for name in names:
        shown = subprocess.run(["dpkg-query", "-W", "-f", "${Version} ${Architecture}\n", name],
                               capture_output=True, text=True, check=True)
        version, architecture = shown.stdout.split()[:2]
        purl = f"pkg:deb/debian/{name}@{version.replace('+', '%2B').replace(':', '%3A')}?arch={architecture}"
        text = Path("/usr/share/doc", name, "copyright").resolve()
        yield Part(name, version, purl, DEBIAN_LICENCES.get(name, ""), (text,))


def write_licences(parts: list[Part], folder: Path) -> None:
    """The full texts, one file for each part."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        texts = [text.read_text(encoding="utf-8", errors="replace") for text in sorted(set(part.texts))]
        if not texts:
            raise SystemExit(f"sbom.py: no licence text found for {part.name}")
        (folder / f"{part.name}.txt").write_text(
            f"{part.name} {part.version}: {part.licence}\n\n" + "\n\n".join(texts), encoding="utf-8")


def bill(name: str, version: str, arch: str, parts: list[Part], epoch: int) -> dict[str, Any]:
    """CycloneDX 1.5. The serial number follows from the content, so that two builds give the same file."""
    components = [{"type": "library", "bom-ref": part.purl, "name": part.name, "version": part.version,
                   "purl": part.purl, "licenses": [licence_choice(part.licence)]} for part in parts]
    made_of = json.dumps(components, sort_keys=True)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{name} {version} {arch} {made_of}')}",
        "metadata": {
            "timestamp": datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {"type": "application", "bom-ref": name, "name": name, "version": version,
                          "description": f"Linux {arch}", "licenses": [{"license": {"id": "MIT"}}]},
        },
        "components": components,
        "dependencies": [{"ref": name, "dependsOn": [part.purl for part in parts]}],
    }


def licence_choice(licence: str) -> dict[str, Any]:
    return {"expression": licence} if " " in licence else {"license": {"id": licence}}


def main() -> None:
    name, version, arch, work, tree, out, epoch = sys.argv[1:]
    found = {path.resolve() for path in sources(Path(work))} | {path.absolute() for path in sources(Path(work))}
    parts = [*python_parts(found), *debian_parts(found)]
    unknown = [part.name for part in parts if not part.licence]
    if unknown:
        raise SystemExit(f"sbom.py: licence not looked at yet, or not to be shipped: {', '.join(unknown)}")
    licences = Path(out, f"LICENSES-{name.rpartition('-')[2]}")
    write_licences(parts, licences)
    text = "\n".join(one.read_text(encoding="utf-8") for one in sorted(licences.iterdir()))
    Path(tree, "LICENSES.txt").write_text(text, encoding="utf-8")
    document = json.dumps(bill(name, version, arch, parts, int(epoch)), indent=2, sort_keys=True)
    Path(out, f"{name}_linux_{arch}.cdx.json").write_text(document + "\n", encoding="utf-8")
    os.chmod(Path(tree, "LICENSES.txt"), 0o644)


if __name__ == "__main__":
    main()
