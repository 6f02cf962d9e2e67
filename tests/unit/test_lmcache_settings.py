"""What LMCache's parameters and the URL's query mean, and where passwords show."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from redis.exceptions import DataError

from fastkv.lmcache import NativeClient
from fastkv.lmcache.settings import Settings


def test_the_query_wins_over_the_parameters_beside_it() -> None:
    settings = Settings.of(
        "fastkv://h:1/2?ttl=60&client_name=a&checksum=true&key_prefix=a%3Ab",
        {"ttl": 5, "timeout": 3, "socket_timeout": 1.5, "metrics": "kv"},
    )
    assert settings.metrics == "kv"
    assert settings.url == "redis://h:1/2?client_name=a"
    assert (settings.ttl, settings.timeout) == (60, 3.0)
    assert (settings.checksum, settings.immutable) == (True, True)
    assert settings.key_prefix == "a:b"
    assert settings.client_arguments()["socket_timeout"] == 1.5


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("fastkvs://h:1?ttl=60", "rediss://h:1"),
        ("unix:///tmp/a.sock?db=1&immutable=no", "unix:///tmp/a.sock?db=1"),
        ("redis://[::1]:7/0", "redis://[::1]:7/0"),
    ],
)
def test_what_is_left_of_the_url_is_redis_pys(url: str, plain: str) -> None:
    assert Settings.of(url, {}).url == plain


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"ttl": 1.5}, ValueError, "ttl: expected whole seconds, got 1.5"),
        ({"ttl": 0}, ValueError, "ttl: expected seconds, above 0 to 1e9, got 0"),
        ({"ttl": 1e10}, ValueError, "ttl: expected seconds, above 0 to 1e9"),
        ({"socket_timeout": None}, ValueError, "socket_timeout: expected seconds"),
        ({"socket_timeout": -1}, ValueError, "socket_timeout: expected seconds"),
        ({"socket_timeout": "soon"}, ValueError, "socket_timeout: .*'soon'"),
        ({"password_env": ""}, ValueError, "password_env: expected a name"),
        ({"ttl": "soon"}, ValueError, "ttl: expected seconds, got 'soon'"),
        ({"timeout": True}, TypeError, "timeout: expected seconds, got bool"),
        ({"checksum": "perhaps"}, TypeError, "checksum: expected true or false"),
        ({"key_prefix": 1}, TypeError, "key_prefix: expected a str, got int"),
        ({"tile_workers": "2"}, TypeError, "tile_workers: expected an int, got str"),
        ({"colour": "red"}, TypeError, "colour"),
        ({"password_env": "NOT_THERE"}, ValueError, "no NOT_THERE"),
        ({"password_file": "/not/there"}, FileNotFoundError, "/not/there"),
        ({"password_env": "A", "password_file": "b"}, ValueError, "got both"),
    ],
)
def test_a_wrong_setting_is_an_error_at_once(
    given: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        NativeClient("redis://127.0.0.1:1", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["127.0.0.1:6379", "http://127.0.0.1", 6379])
def test_a_wrong_url_is_an_error_at_once(url: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        NativeClient(url)


def test_two_passwords_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hush")
    with pytest.raises(DataError):
        NativeClient("redis://:other@127.0.0.1:1", password_env="SECRET")


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("redis://:hush@127.0.0.1:1", {}),
        ("redis://127.0.0.1:1?password=hush", {}),
        ("redis://127.0.0.1:1", {"password": "hush"}),
    ],
)
def test_a_password_in_the_configuration_is_warned_of_and_not_shown(
    url: str, given: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        client = NativeClient(url, **given)  # type: ignore[arg-type]
        client.close()
    assert "password_env" in caplog.text
    assert "hush" not in caplog.text + repr(Settings.of(url, given))


def test_a_password_that_is_no_part_of_a_url_is_not_shown() -> None:
    with pytest.raises(ValueError, match="must be encoded") as refused:
        NativeClient("redis://:hush/hush@127.0.0.1:1")
    assert "hush" not in str(refused.value)


def test_text_is_read_as_in_a_url() -> None:
    given = {"socket_timeout": "1.5", "retry_on_timeout": "false", "client_name": "1"}
    arguments = Settings.of("redis://h", given).client_arguments()
    assert arguments["socket_timeout"] == 1.5
    assert arguments["retry_on_timeout"] is False
    assert arguments["client_name"] == "1"


def test_the_first_of_two_and_no_fragment() -> None:
    settings = Settings.of("redis://h?ttl=1&ttl=2&key_prefix=a#b", {})
    assert (settings.ttl, settings.key_prefix, settings.url) == (1, "a", "redis://h")


def test_a_secret_is_read_again_for_each_connection(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("one\n")
    settings = Settings.of("redis://h", {"password_file": str(path), "username": "u"})
    provider = settings.client_arguments()["credential_provider"]
    assert provider.get_credentials() == ("u", "one")
    path.write_text("two")
    assert provider.get_credentials() == ("u", "two")


def test_the_user_may_stand_in_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hush")
    settings = Settings.of("redis://bo%40b@h:1/2", {"password_env": "SECRET"})
    assert settings.url == "redis://h:1/2"
    provider = settings.client_arguments()["credential_provider"]
    assert provider.get_credentials() == ("bo@b", "hush")


def test_importing_needs_neither_lmcache_nor_torch() -> None:
    code = """
import sys
sys.modules["lmcache"] = sys.modules["torch"] = sys.modules["xxhash"] = None
import fastkv.lmcache
fastkv.lmcache.NativeClient("redis://127.0.0.1:1").close()
try:
    fastkv.lmcache.FastKVAdapter
except ImportError:
    pass
else:
    raise AssertionError
try:
    fastkv.lmcache.NativeClient("redis://127.0.0.1:1", checksum=True)
except ImportError as error:
    assert "fastkv[lmcache]" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
