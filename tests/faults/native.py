"""Small libraries of C++, compiled when a test needs them."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile

_FOLDER = tempfile.mkdtemp(prefix="fastkv-native-")
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


@functools.cache
def built(source: str) -> str:
    """Where the library is that ``source`` makes; it may use Python's API."""
    library = os.path.join(_FOLDER, f"{abs(hash(source))}.so")
    subprocess.run(
        [
            *(os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-shared"),
            *("-I", sysconfig.get_path("include"), "-x", "c++", "-", "-o", library),
        ],
        input=source,
        text=True,
        check=True,
        # What is preloaded into Python, such as a sanitizer, is not for the compiler.
        env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
    )
    return library


def loaded(source: str) -> ctypes.PyDLL:
    """The library; its functions are called with the GIL."""
    return ctypes.PyDLL(built(source))
