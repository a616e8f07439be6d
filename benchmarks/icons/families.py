"""The icon families: pinned packages of the npm registry, fetched once into a folder and checked by their hash."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.icons.drawing import Drawing
from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import JSON_OBJECT, parse_json, read_bytes, read_json

PINNED = Path(__file__).with_name("families.json")


@dataclass(frozen=True, slots=True)
class Family:
    """One designer's icons: package version and hash, licence (SPDX), and the words that its names end with for a style."""

    name: str
    version: str
    integrity: str
    licence: str
    designer: str
    styles: str

    @property
    def package(self) -> str:
        """What npm calls it."""
        return f"@iconify-json/{self.name}@{self.version}"

    @property
    def file(self) -> str:
        """The name of its file, as `npm pack` gives it."""
        return f"iconify-json-{self.name}-{self.version}.tgz"


def families(listed: Path = PINNED) -> list[Family]:
    """The families of a list, in the order of their names.

    Raises:
        InputError: the list cannot be read.
    """
    return sorted(read_json(listed, list[Family]), key=lambda family: family.name)


def fetch(wanted: list[Family], cache: Path) -> None:
    """Bring the packages that are missing into the folder, by `npm pack`; what is there is not fetched again.

    Raises:
        InputError: there is no npm, or it cannot get a package.
    """
    missing = [family for family in wanted if not (cache / family.file).is_file()]
    if not missing:
        return
    cache.mkdir(parents=True, exist_ok=True)
    cure = f"without it, put these files into {cache} by hand: {', '.join(family.file for family in missing)}"
    if shutil.which("npm") is None:
        raise InputError(f"npm is not installed; {cure}")
    for number, family in enumerate(missing, start=1):
        print(f"fetching {family.package} ({number} of {len(missing)})", flush=True)
        # `npm pack` writes a file whole or not at all: it renames.
        command = ["npm", "pack", "--silent", "--pack-destination", str(cache), family.package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (cache / family.file).is_file():
            raise InputError(f"npm cannot get {family.package}: {done.stderr.strip()[-500:]}; {cure}")


def drawings(family: Family, cache: Path) -> list[Drawing]:
    """Every icon of a family that its designers still offer, under its own name; other names of it are passed over.

    Raises:
        InputError: the package is not there, has another hash than the pinned one, or is damaged.
    """
    path = cache / family.file
    data = read_bytes(path)
    if f"sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}" != family.integrity:
        raise InputError(f"{path} is not the pinned {family.package}: its sha512 differs; remove it, and it is fetched again")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None, path
        found: dict[str, Any] = parse_json(member.read(), JSON_OBJECT, path)
    sides = {key: found.get(key, 0 if key in ("left", "top") else 16) for key in ("left", "top", "width", "height")}
    return [
        Drawing(family.name, name, icon["body"], tuple(float(icon.get(key, side)) for key, side in sides.items()))  # type: ignore[arg-type]
        for name, icon in sorted(found["icons"].items())
        if not icon.get("hidden")
    ]
