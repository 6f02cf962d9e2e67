"""What the connector's thread asks on the client's event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fastkv.awaited import _await


def test_a_time_out_of_the_coroutines_own_is_not_taken_for_ours() -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def ask() -> str:
        raise asyncio.TimeoutError("the vault is slow")

    try:
        with pytest.raises(asyncio.TimeoutError, match="the vault is slow"):
            _await(lambda: loop, "for credentials", ask)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
