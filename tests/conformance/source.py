"""redis-py's source distribution, whose tests we run: fetched, verified, unpacked."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "8.1.0"
SHA256 = "6e1a19beef9225c83efd689c7e6b7da2d5215b1f42cd13b7fc3714d0a09c7b25"
CACHE = Path(__file__).resolve().parents[2] / "build" / "conformance"


class SourceError(Exception):
    """The tests are not there, or are not those of the installed redis-py."""


def tests_of_redis() -> Path:
    """The folder that has redis-py's ``tests`` and its pytest settings, and not its
    code: what is tested is the redis-py that is installed.

    Raises:
        SourceError: Another version is installed; or no download, or a wrong one.
    """
    installed = importlib.metadata.version("redis")
    if installed != VERSION:
        raise SourceError(f"these are tests of redis-py {VERSION}, not of {installed}")
    folder = CACHE / f"redis-{VERSION}"
    if not folder.exists():
        _unpack(_archive(), folder)
    return folder


def _archive() -> Path:
    archive = CACHE / f"redis-{VERSION}.tar.gz"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        said = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "-q", "--no-deps"),
                *("--no-binary", "redis", "--dest", str(CACHE), f"redis=={VERSION}"),
            ],
            capture_output=True,
            text=True,
        )
        if said.returncode != 0 or not archive.exists():
            raise SourceError(f"pip could not download it: {said.stderr[-2000:]}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        archive.unlink()
        raise SourceError(f"{archive.name}: expected SHA-256 {SHA256}, got {found}")
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    wanted = (f"{folder.name}/tests/", f"{folder.name}/pyproject.toml")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.startswith(wanted)]
        # Python 3.11.2 of Debian 12 has no filters yet; the archive's hash is known.
        tar.extraction_filter = getattr(
            tarfile, "data_filter", lambda member, _: member
        )
        tar.extractall(partial, members)
    (partial / folder.name).rename(folder)  # all of it, or nothing
    partial.rmdir()
