"""The native extension; all else is in pyproject.toml."""

import glob
import os
import shutil
import sys
import sysconfig

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = os.path.dirname(os.path.abspath(__file__))
os.chdir(HERE)  # sources must be named relative to here

DEBUG = os.environ.get("FASTKV_DEBUG") == "1"
SANITIZE = os.environ.get("FASTKV_SANITIZE", "")

compile_args = ["-std=c++20", "-fvisibility=hidden", "-Wno-missing-field-initializers"]
link_args = []
if DEBUG:
    compile_args += ["-O1", "-g", "-UNDEBUG", "-D_GLIBCXX_ASSERTIONS"]
else:
    compile_args += ["-O3", "-g0"]
if SANITIZE:
    compile_args += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g"]
    link_args += [f"-fsanitize={SANITIZE}"]


class BuildExt(build_ext):
    """Says in one line what is missing before a compiler says it in a hundred."""

    def build_extensions(self):
        command = (os.environ.get("CXX") or self.compiler.compiler_cxx[0]).split()
        if shutil.which(command[0]) is None:
            sys.exit(
                f"fastkv needs a C++20 compiler, and {command[0]!r} is not there "
                "(Debian, Ubuntu: apt-get install g++)"
            )
        include = sysconfig.get_path("include")
        if not os.path.exists(os.path.join(include, "Python.h")):
            sys.exit(
                f"fastkv needs Python's headers, and {include}/Python.h is not there "
                "(Debian, Ubuntu: apt-get install python3-dev)"
            )
        super().build_extensions()


extension = Extension(
    "fastkv._core",
    sources=["fastkv_ext/_core.pyx", *sorted(glob.glob("fastkv_ext/cpp/*.cpp"))],
    depends=["fastkv_ext/core.pxd", *sorted(glob.glob("fastkv_ext/cpp/*.hpp"))],
    include_dirs=["fastkv_ext/cpp"],
    language="c++",
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)

setup(
    ext_modules=cythonize(
        [extension],
        include_path=["fastkv_ext"],
        build_dir="build/cython",
    ),
    cmdclass={"build_ext": BuildExt},
)
