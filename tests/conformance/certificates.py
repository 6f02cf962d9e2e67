"""The certificates that redis-py's tests look for, as its docker-compose file makes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

# File name: common name. What the tests call them, in tests/ssl_utils.py.
_SIGNED = {"redis": "localhost", "client": "client", "test_user": "test_user"}


def make_certificates(source: Path) -> Path | None:
    """Put them where the tests look; kept for the next run.

    Returns:
        Their folder; None without the openssl command, and then these tests fail in
        both modes.
    """
    folder = source / "dockers" / "standalone" / "tls"
    if folder.exists():
        return folder
    if shutil.which("openssl") is None:
        return None
    partial = source / "tls.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=partial, check=True, capture_output=True
        )

    key = ("-newkey", "rsa:2048", "-nodes", "-keyout")
    openssl(
        *("req", "-x509", *key, "ca.key", "-subj", "/CN=ca"),
        *("-days", "3650", "-out", "ca.crt"),
    )
    (partial / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name, common_name in _SIGNED.items():
        openssl(
            *("req", *key, f"{name}.key", "-subj", f"/CN={common_name}"),
            *("-out", f"{name}.csr"),
        )
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-days", "3650"),
            *("-CAkey", "ca.key", "-set_serial", str(len(name))),
            *("-extfile", "names", "-out", f"{name}.crt"),
        )
    for kind in ("standalone", "cluster"):
        shutil.copytree(partial, source / "dockers" / kind / "tls")
    shutil.rmtree(partial)
    return folder
