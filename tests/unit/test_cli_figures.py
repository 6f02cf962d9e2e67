"""Pieces of the commands that need no server."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import typer

from fastkv.cli.contest import Gain, find_fastest
from fastkv.cli.models import known_models
from fastkv.cli.room import _allocated
from fastkv.cli.target import Target
from fastkv.cli.terminal import parse_counts, parse_size, percentiles, size_label
from fastkv.options import TileOptions


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("64K", 65536),
        ("1M", 1 << 20),
        ("1.5MiB", 3 << 19),
        ("2gb", 2 << 30),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1M", "0", "1T", "nan", "infK"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="such as 64K"):
        parse_size(text)


def test_counts_are_read_once_each() -> None:
    assert parse_counts("4,1,4", 8) == [4, 1]
    for text in ("", "0", "9", "1,x"):
        with pytest.raises(typer.BadParameter, match="from 1 to 8"):
            parse_counts(text, 8)


def test_sizes_are_written() -> None:
    labels = ["64 KiB", "1 MiB", "1 GiB", "15.3 MiB"]
    assert [size_label(n) for n in (65536, 1 << 20, 1 << 30, 16_000_000)] == labels


def test_percentiles_are_of_the_values_themselves() -> None:
    assert percentiles(range(1001), (0, 50, 99, 99.9, 100)) == [0, 500, 990, 999, 1000]
    assert percentiles([7], (50, 99.9)) == [7, 7]


def test_noise_is_no_gain() -> None:
    dice = random.Random(1)
    real = Counter[bool]()
    for _ in range(200):
        ours, theirs = ([dice.gauss(3, 0.2) for _ in range(30)] for _ in range(2))
        real[Gain.of(ours, theirs).real] += 1
    assert real[True] <= 10


def test_a_gain_beyond_the_noise_is_real() -> None:
    dice = random.Random(2)
    theirs = [dice.gauss(3, 0.1) for _ in range(30)]
    ours = [1.1 * dice.gauss(3, 0.1) for _ in range(30)]
    gain = Gain.of(ours, theirs)
    assert gain.real and gain.low < 1.1 < gain.high
    assert str(Gain(1.104, 1.05, 1.16)) == "+10 % (+5 to +16 %)"
    assert not Gain(1.01, 1.005, 1.02).real  # real, and not worth a setting


def test_the_fastest_is_found_and_most_time_goes_to_those_that_are_close() -> None:
    dice = random.Random(3)
    calls = Counter[int]()

    def measure(way: int) -> float:
        calls[way] += 1
        return way % 7 + dice.random()

    assert find_fastest(list(range(12)), measure, 0.0) == 6
    assert calls[6] > 2 * calls[1]
    assert calls[0] == calls[6]  # the first is what the others are compared with


def test_models_have_sources_and_known_sizes() -> None:
    models = known_models()
    sizes = {name: model.token_bytes for name, model in models.items()}
    assert sizes["llama-3.1-8b"] == 128 << 10
    assert sizes["llama-3.1-70b"] == sizes["llama-3.3-70b"] == 320 << 10
    assert sizes["deepseek-v3"] == 61 * 576 * 2  # MLA: one latent vector a layer
    assert sizes["gpt-oss-120b"] == 72 << 10
    assert all(model.source.startswith("https://") for model in models.values())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:pw@host:1/2?password=pw", "redis://host:1/2"),
        ("rediss://[::1]", "rediss://[::1]:6379"),
        ("unix://:pw@/run/redis.sock?db=1", "unix:///run/redis.sock"),
    ],
)
def test_a_shown_url_has_no_secrets(url: str, shown: str) -> None:
    target = Target(url, TileOptions(), "Redis 8", False)
    assert target.shown == shown and target.has_arguments != (shown.endswith("6379"))


@pytest.mark.parametrize("size", [4096, 70001, 1 << 20, (8 << 20) + 5, 32 << 20])
def test_room_is_reckoned_by_what_the_allocator_takes(size: int) -> None:
    assert size < _allocated(size) <= 1.26 * size + 512
