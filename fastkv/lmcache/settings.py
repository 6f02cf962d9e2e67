"""The settings of a chunk store: LMCache's parameters and the URL's query, checked.

Knows redis-py's URLs, and neither LMCache nor connections.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.backoff import ConstantBackoff
from redis.connection import URL_QUERY_ARGUMENT_PARSERS
from redis.credentials import CredentialProvider
from redis.retry import Retry

from fastkv.log import logger

_SCHEMES = {"fastkv": "redis", "fastkvs": "rediss"}

# A cache that is away must say so soon: one more attempt, where redis-py makes ten.
# Any of these may be given, in the URL too.
_DEFAULTS: dict[str, Any] = {"socket_timeout": 5.0, "socket_connect_timeout": 2.0}


@dataclass(frozen=True)
class Settings:
    """See `fastkv.lmcache.NativeClient` for what each one does.

    Attributes:
        redis: Arguments for `fastkv.Redis.from_url`.
    """

    url: str = field(repr=False)  # it, and what follows, may hold a password
    key_prefix: str = ""
    ttl: int | None = None
    immutable: bool = True
    checksum: bool = False
    cluster: bool = False
    timeout: float = 10.0
    metrics: str | None = None
    username: str | None = None
    password_env: str | None = None
    password_file: str | None = None
    redis: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, url: str, given: Mapping[str, Any]) -> Settings:
        """Settings from a URL and the parameters beside it. The URL's query wins.

        Raises:
            TypeError, ValueError: Names the setting, what was expected and what came.
        """
        if not isinstance(url, str):
            raise TypeError(f"url: expected a str, got {type(url).__name__}")
        own = {f.name for f in fields(cls)} - {"url", "redis"}
        url, in_query = _take_query(url, own)
        if urlsplit(url).password or "password=" in url or given.get("password"):
            logger.warning(
                "a password stands in the configuration, and LMCache logs that: "
                "use password_env or password_file"
            )
        taken: dict[str, Any] = {}
        for name, value in {**given, **in_query}.items():
            if name in own and value is not None:
                taken[name] = _CONVERT[name](name, value)
        if "password_env" in taken or "password_file" in taken:
            url, user = _take_user(url)
            taken.setdefault("username", user)
        redis = {k: _parsed(k, v) for k, v in given.items() if k not in own}
        return cls(url, redis=redis, **taken)

    def client_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `fastkv.Redis.from_url`."""
        arguments = {
            **_DEFAULTS,
            "retry": Retry(ConstantBackoff(0.1), 1),
            **self.redis,
        }
        if self.password_env or self.password_file:
            arguments["credential_provider"] = Secret(
                self.username, self.password_env, self.password_file
            )
        elif self.username is not None:
            arguments["username"] = self.username
        return arguments


class Secret(CredentialProvider):
    """A password that is looked up again for each connection, so that it may rotate."""

    def __init__(
        self, username: str | None, variable: str | None, path: str | None
    ) -> None:
        if variable and path:
            raise ValueError("expected password_env or password_file, got both")
        self._username = username
        self._variable = variable
        self._path = path
        self.last: str | None = None  # to be kept out of messages
        self.get_credentials()  # says now what is missing

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        if self._variable:
            password = os.environ.get(self._variable)
            if password is None:
                raise ValueError(
                    f"password_env: the environment has no {self._variable}"
                )
        else:
            assert self._path is not None
            password = Path(self._path).read_text(encoding="utf-8").rstrip("\r\n")
        self.last = password
        if self._username is None:
            return (password,)
        return (self._username, password)


def _take_query(url: str, names: set[str]) -> tuple[str, dict[str, str]]:
    """Take the settings ``names`` out of the query, and our schemes off the URL."""
    scheme, separator, rest = url.partition("#")[0].partition("://")
    if not separator:
        raise ValueError("url: expected redis://, rediss://, unix:// or fastkv://")
    head, mark, query = rest.partition("?")
    kept: list[str] = []
    taken: dict[str, str] = {}
    for item in query.split("&"):
        name = unquote(item.partition("=")[0])
        if name in names:
            value = dict(parse_qsl(item, keep_blank_values=True))[name]
            taken.setdefault(name, value)  # the first, as in redis-py
        else:
            kept.append(item)
    rest = head + (mark + "&".join(kept) if any(kept) else "")
    return _SCHEMES.get(scheme, scheme) + separator + rest, taken


def _take_user(url: str) -> tuple[str, str | None]:
    # redis-py takes no user beside a credential provider.
    user = urlsplit(url).username
    if user is None or urlsplit(url).password is not None:
        return url, None
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.partition("@")[2], unquote(user)


def _parsed(name: str, value: object) -> object:
    """An argument of redis-py's, which may come as text, as in a URL."""
    parse: Any = URL_QUERY_ARGUMENT_PARSERS.get(name)
    if parse is None or not isinstance(value, str):
        return value
    try:
        return parse(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected another value than {value!r}") from None


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    return value


def _name(name: str, value: object) -> str:
    if not _text(name, value):
        raise ValueError(f"{name}: expected a name, got nothing")
    return _text(name, value)


def _flag(name: str, value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "yes", "1"):
        return True
    if isinstance(value, str) and value.lower() in ("false", "no", "0"):
        return False
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected true or false, got {value!r}")
    return value


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{name}: expected seconds, got {type(value).__name__}")
    try:
        seconds = float(value)
    except ValueError:
        raise ValueError(f"{name}: expected seconds, got {value!r}") from None
    if not 0 < seconds <= 1e9:
        raise ValueError(f"{name}: expected seconds, above 0 to 1e9, got {value!r}")
    return seconds


def _whole_seconds(name: str, value: object) -> int:
    seconds = _seconds(name, value)
    if seconds != int(seconds):
        raise ValueError(f"{name}: expected whole seconds, got {value!r}")
    return int(seconds)


_CONVERT = {
    "key_prefix": _text,
    "ttl": _whole_seconds,
    "immutable": _flag,
    "checksum": _flag,
    "cluster": _flag,
    "timeout": _seconds,
    "metrics": _name,
    "username": _text,
    "password_env": _name,
    "password_file": _name,
}
