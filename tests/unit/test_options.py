"""The tile_* arguments, wherever they are given. No server, no connection."""

from __future__ import annotations

from typing import Any

import pytest
import redis

import fastkv
import fastkv.asyncio
from fastkv.options import TileOptions


@pytest.mark.parametrize("cls", [fastkv.Redis, fastkv.asyncio.Redis])
@pytest.mark.parametrize(
    ("url", "kwargs", "expected"),
    [
        ("redis://h:1/2?tile_workers=3&client_name=a%20b", {}, TileOptions(3)),
        (
            "redis://h:1/2?client_name=a%20b&tile_connections=7",
            {},
            TileOptions(None, 7),
        ),
        ("redis://h:1/2?client_name=a%20b", {"tile_workers": 2}, TileOptions(2)),
        (
            "redis://h:1/2?client_name=a%20b&tile_workers=5",
            {"tile_workers": 2},
            TileOptions(5),
        ),
    ],
)
def test_urls_and_keywords_give_options_and_leave_the_rest_to_redis(
    cls: Any, url: str, kwargs: dict[str, int], expected: TileOptions
) -> None:
    client = cls.from_url(url, **kwargs)
    assert client._tile_options == expected
    settings = client.connection_pool.connection_kwargs
    assert settings["client_name"] == "a b"
    assert settings["db"] == 2
    assert not [key for key in settings if key.startswith("tile_")]


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"tile_workers": 0}, ValueError, "tile_workers: expected 1 to 64, got 0"),
        (
            {"tile_connections": "4"},
            TypeError,
            "tile_connections: expected an int, got str",
        ),
        ({"tile_window_bytes": -1}, ValueError, "tile_window_bytes"),
        ({"tile_workers": True}, TypeError, "got bool"),
        ({"tile_range_bytes": -1}, ValueError, "expected 0 to"),
    ],
)
def test_bad_options_are_refused_when_the_client_is_made(
    kwargs: dict[str, Any], error: type[Exception], said: str
) -> None:
    for cls in (fastkv.Redis, fastkv.asyncio.Redis):
        with pytest.raises(error, match=said):
            cls(**kwargs)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("tile_workers=x", "expected an int, got 'x'"),
        ("tile_wrokers=1", "unknown; known are"),
    ],
)
def test_bad_options_in_a_url_are_refused(query: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fastkv.Redis.from_url(f"redis://h?{query}")


def test_defaults_stay_within_the_pools_limit() -> None:
    for most in (1, 2, 5, 100):
        workers, connections, window, ranges = TileOptions().filled(most)
        assert 1 <= workers <= connections <= most
        assert window == 512 << 10
        assert ranges == 512 << 10
    assert TileOptions().near_load_bytes == 256 << 10
    assert TileOptions(window_bytes=1 << 20).near_load_bytes == 1 << 20
    assert TileOptions(workers=8).filled(100)[:2] == (8, 9)
    assert TileOptions(workers=2, connections=16).filled(100)[:2] == (2, 17)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"host": "h", "port": 7, "db": 3, "password": "p", "username": "u"},
        {"unix_socket_path": "/x", "socket_timeout": 1.5, "client_name": "n"},
        {"protocol": 2, "decode_responses": True, "max_connections": 3},
        {"ssl": True, "ssl_cert_reqs": "none"},
    ],
)
def test_pools_are_made_as_redis_makes_them(kwargs: dict[str, Any]) -> None:
    ours = fastkv.Redis(**kwargs, tile_workers=2)
    theirs = redis.Redis(**kwargs)

    # Each pool has objects of its own; those of one class are alike.
    def comparable(client: redis.Redis) -> dict[str, object]:
        return {
            key: value
            if isinstance(value, (str, int, float, list, type(None)))
            else type(value)
            for key, value in client.connection_pool.connection_kwargs.items()
        }

    assert comparable(ours) == comparable(theirs)
    assert type(ours.connection_pool) is type(theirs.connection_pool)
    assert (
        ours.connection_pool.connection_class is theirs.connection_pool.connection_class
    )
    assert (
        ours.connection_pool.max_connections == theirs.connection_pool.max_connections
    )


def test_positional_arguments_mean_what_they_mean_in_redis() -> None:
    client = fastkv.Redis("h", 7, 3, "secret")
    assert client.connection_pool.connection_kwargs["host"] == "h"
    assert client.connection_pool.connection_kwargs["password"] == "secret"
    assert "secret" not in repr(client)
