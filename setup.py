"""The native extension; all else is in pyproject.toml."""

import glob
import os
import shutil
import sys
import sysconfig
import tempfile

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

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
    compile_args += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
    compile_args += ["-fno-omit-frame-pointer", "-g"]
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
        tls = self._openssl_is_there()
        if not tls:
            print(
                "fastkv is built without TLS: no OpenSSL 3 to compile and link with "
                "(Debian, Ubuntu: apt-get install libssl-dev)",
                file=sys.stderr,
            )
        (extension,) = self.extensions
        extension.sources.remove(NO_TLS if tls else TLS)
        extension.libraries = ["ssl", "crypto"] if tls else []
        super().build_extensions()

    def _openssl_is_there(self):
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cpp")
            with open(source, "w") as file:
                file.write(
                    "#include <openssl/ssl.h>\n"
                    "static_assert(OPENSSL_VERSION_NUMBER >= 0x30000000L);\n"
                    "int main() { return SSL_CTX_new(TLS_client_method()) == nullptr; }"
                )
            try:
                objects = self.compiler.compile([source], output_dir=folder)
                self.compiler.link_executable(
                    objects, os.path.join(folder, "probe"), libraries=["ssl", "crypto"]
                )
            except (CompileError, LinkError):
                return False
        return True


# One of them is left out.
TLS, NO_TLS = "fastkv_ext/cpp/tls.cpp", "fastkv_ext/cpp/tls_missing.cpp"

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
