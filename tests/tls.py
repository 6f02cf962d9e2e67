"""Certificates, and servers that show them."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import socket
import ssl
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fastkv.cli.private_server import PrivateServer, ServerBinary

PASSWORD = "key's secret"
_NOW = datetime.datetime.now(datetime.timezone.utc)
_DAY = datetime.timedelta(days=1)


@dataclass
class Identity:
    """A certificate and its key, in memory and as files."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    cert_file: str
    key_file: str
    encrypted_key_file: str

    @property
    def pem(self) -> str:
        return Path(self.cert_file).read_text()

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)


class Authority:
    """Issues certificates into a folder.

    Args:
        folder: Where the files go.
        name: Of the authority, in its certificate.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self.name = name
        self.identity: Identity | None = None
        self.identity = self.issue(name, authority=True)

    def issue(
        self,
        name: str,
        hosts: tuple[str, ...] = (),
        *,
        expired: bool = False,
        self_signed: bool = False,
        authority: bool = False,
    ) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer, issuer_key = subject, key
        if self.identity is not None and not self_signed:
            issuer = self.identity.certificate.subject
            issuer_key = self.identity.key
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOW - 3 * _DAY)
            .not_valid_after(_NOW - _DAY if expired else _NOW + 3 * _DAY)
            .add_extension(
                x509.BasicConstraints(ca=authority, path_length=None), critical=True
            )
            # What follows is wanted by VERIFY_X509_STRICT, Python's default since 3.13.
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(
                    issuer_key.public_key()
                ),
                critical=False,
            )
        )
        if authority:
            builder = builder.add_extension(
                x509.KeyUsage(
                    digital_signature=False,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
        if hosts:
            names = [_general_name(host) for host in hosts]
            builder = builder.add_extension(
                x509.SubjectAlternativeName(names), critical=False
            )
        stem = self._folder / f"{self.name}-{name}"
        made = Identity(
            builder.sign(issuer_key, hashes.SHA256()),
            key,
            f"{stem}.crt",
            f"{stem}.key",
            f"{stem}.encrypted.key",
        )
        Path(made.cert_file).write_bytes(
            made.certificate.public_bytes(serialization.Encoding.PEM)
        )
        for path, how in (
            (made.key_file, serialization.NoEncryption()),
            (
                made.encrypted_key_file,
                serialization.BestAvailableEncryption(PASSWORD.encode()),
            ),
        ):
            Path(path).write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    how,
                )
            )
        return made

    def revocations(self) -> str:
        """An empty list of revoked certificates, as PEM."""
        assert self.identity is not None
        revoked = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.identity.certificate.subject)
            .last_update(_NOW - _DAY)
            .next_update(_NOW + _DAY)
            .sign(self.identity.key, hashes.SHA256())
        )
        return revoked.public_bytes(serialization.Encoding.PEM).decode()

    def hashed_folder(self, folder: Path) -> str:
        """Make what ``openssl rehash`` would: a folder for ``ssl_ca_path``."""
        assert self.identity is not None
        # OpenSSL's canonical form of a name that is one common name.
        value = b"\x0c%c%b" % (len(self.name), self.name.lower().encode())
        pair = b"\x06\x03\x55\x04\x03" + value
        canonical = b"\x31%c\x30%c%b" % (len(pair) + 2, len(pair), pair)
        number = int.from_bytes(hashlib.sha1(canonical).digest()[:4], "little")
        folder.mkdir()
        (folder / f"{number:08x}.0").write_text(self.identity.pem)
        return str(folder)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def speaks_tls(binary: ServerBinary) -> bool:
    """Whether a server was built with TLS: then it misses a certificate."""
    said = subprocess.run(
        [binary.path, "--port", "0", "--tls-port", "1"], capture_output=True, text=True
    )
    return "tls-cert-file" in said.stdout + said.stderr


def server_arguments(identity: Identity, clients: Identity) -> list[str]:
    """What a server shows, and whose certificates it takes, if it asks."""
    return [
        *("--tls-cert-file", identity.cert_file),
        *("--tls-key-file", identity.key_file),
        *("--tls-ca-cert-file", clients.cert_file, "--tls-auth-clients", "no"),
    ]


class TlsServer(PrivateServer):
    """A server that speaks TLS on `tls_port` of 127.0.0.1.

    Args:
        binary: What to start.
        identity: What it shows.
        clients: Whose certificates it takes, if it asks.
    """

    def __init__(
        self, binary: ServerBinary, identity: Identity, clients: Identity
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.tls_port: int = probe.getsockname()[1]
        super().__init__(
            binary,
            *("--tls-port", str(self.tls_port), "--port", "0"),
            *server_arguments(identity, clients),
        )

    def show(self, identity: Identity, **settings: str) -> None:
        """Show another certificate to connections made from now on, and change other
        settings of TLS.
        """
        pairs = {
            "tls-cert-file": identity.cert_file,
            "tls-key-file": identity.key_file,
            "tls-auth-clients": "no",
            "tls-protocols": "",
            **{name.replace("_", "-"): value for name, value in settings.items()},
        }
        with self.client() as admin:
            admin.execute_command(
                "CONFIG SET", *(word for pair in pairs.items() for word in pair)
            )


@dataclass(frozen=True)
class Hello:
    """What a client has offered, and what was agreed."""

    server_name: str | None
    version: str | None
    cipher: object
    offered: frozenset[str]


class HelloServer:
    """Writes down how clients greet, and hangs up."""

    def __init__(self, identity: Identity) -> None:
        self.hellos: list[Hello] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(identity.cert_file, identity.key_file)
        self._context.sni_callback = self._named
        self._name: str | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _named(self, _sock: object, name: str | None, _context: object) -> None:
        self._name = name

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._name = None
            with connection:
                try:
                    with self._context.wrap_socket(connection, server_side=True) as tls:
                        self.hellos.append(
                            Hello(
                                self._name,
                                tls.version(),
                                tls.cipher(),
                                frozenset(c[0] for c in tls.shared_ciphers() or ()),
                            )
                        )
                except OSError:
                    continue

    def __enter__(self) -> HelloServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
