"""What an asyncio client's settings can only say on its event loop, for the connector's
thread: credentials, and the addresses that Sentinel gives.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeAlias, TypeVar

from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError
from redis.sentinel import MasterNotFoundError, SlaveNotFoundError

#: Gives an event loop that is running now.
FindLoop: TypeAlias = "Callable[[], asyncio.AbstractEventLoop | None]"

# Seconds that an answer may take, or a loop be busy with something else.
_TIMEOUT = 30.0

_Answer = TypeVar("_Answer")


def _await(
    find_loop: FindLoop, what: str, ask: Callable[[], Coroutine[Any, Any, _Answer]]
) -> _Answer:
    """The answer of a coroutine, awaited on a loop of the client's, where its own
    resources live.
    """
    loop = find_loop()
    if loop is None:
        raise ConnectionError(f"No event loop is left to ask {what} on.")
    asked = asyncio.run_coroutine_threadsafe(ask(), loop)
    try:
        return asked.result(_TIMEOUT)
    except concurrent.futures.TimeoutError as error:
        if asked.done():
            return asked.result()  # from Python 3.11 on, its own may be of that class
        asked.cancel()
        raise ConnectionError(f"Asking {what} took over {_TIMEOUT:g} s.") from error


class AwaitedCredentials(CredentialProvider):
    """A provider of an asyncio client."""

    def __init__(self, provider: CredentialProvider, find_loop: FindLoop) -> None:
        self._provider = provider
        self._find_loop = find_loop

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        return _await(
            self._find_loop, "for credentials", self._provider.get_credentials_async
        )


class AwaitedSentinel:
    """Stands in for the pool that a sync Sentinel connection asks for its address."""

    def __init__(self, pool: Any, find_loop: FindLoop) -> None:
        self.is_master: bool = pool.is_master
        self.check_connection: bool = pool.check_connection
        self.service_name: str = pool.service_name
        self._pool = pool  # a weak proxy, as redis-py's own connections have it
        self._find_loop = find_loop

    def get_master_address(self) -> tuple[str, int]:
        address: tuple[str, int] = _await(
            self._find_loop, "Sentinel", self._pool.get_master_address
        )
        return address

    def rotate_slaves(self) -> Iterator[tuple[str, int]]:
        """As redis-py's: each replica once, then the master."""

        async def turn() -> tuple[str, int]:
            found = self._pool.rotate_slaves()
            try:
                address: tuple[str, int] = await found.__anext__()
                return address
            finally:
                await found.aclose()

        tried = set()
        while True:
            address = _await(self._find_loop, "Sentinel", turn)
            if address in tried:
                break
            tried.add(address)
            yield address
        try:
            master = self.get_master_address()
        except MasterNotFoundError:
            pass
        else:
            if master not in tried:
                yield master
        raise SlaveNotFoundError(f"No slave found for {self.service_name!r}")
