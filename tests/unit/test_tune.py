"""What `fastkv tune` tells of the settings that it measured. No server."""

from __future__ import annotations

from fastkv.cli.tune import Choice, _described
from fastkv.options import TileOptions


def test_a_window_that_was_tried_is_told_though_its_number_is_the_default() -> None:
    # Left out, it would not be what was measured: 256 KiB from a server that is near.
    tried = TileOptions(workers=1, window_bytes=512 << 10, range_bytes=256 << 10)
    told = _described(Choice(256, tried))["settings"]
    assert told["tile_window_bytes"] == 512 << 10
    assert told["tile_range_bytes"] == 256 << 10


def test_defaults_are_not_told() -> None:
    assert _described(Choice(256, TileOptions()))["settings"] == {}
