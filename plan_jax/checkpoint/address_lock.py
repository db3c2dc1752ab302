"""The lock of a run at an address: an object that says who writes there, and when it last did.

A bucket has no locks, so this is the best that can be done with objects: whoever runs writes the
object again and again. An object that nobody has written for a while belongs to a process that has
ended, and so does one of a process of this host that does not exist any more.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from plan_jax import parallel
from plan_jax.checkpoint.lock import (
    FILE,
    describe_owner,
    is_alive,
    parse_owner,
    refuse_second,
)
from plan_jax.storage import Place
from plan_jax.types import UserError

BEAT = 20.0  # seconds between two writes
SETTLE = 1.0  # of runs that start at the same time, the last one to write goes on
OLD = 600.0  # seconds after which nobody waits for a write, whatever the two clocks say


class AddressLock:
    """Holds the lock of a run at an address; a context manager."""

    def __init__(self, place: Place) -> None:
        """Prepares the lock of a run, and takes nothing yet."""
        self.place = place
        self.token = secrets.token_hex(8)
        self.usurper: dict[str, Any] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="address lock", daemon=True)

    def __enter__(self) -> "AddressLock":
        """Takes the lock.

        Raises:
          UserError: another run holds it, or the address cannot be written.
        """
        content = self.place.read(FILE)
        if content is not None and self._is_held(content):
            raise self._refusal(self._read_whole())
        self._write()
        time.sleep(SETTLE)
        owner = self._read_whole()
        if owner.get("token") != self.token:
            raise self._refusal(owner)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Releases the lock, unless another run has taken it."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(UserError):  # it is stale soon
            if self._read().get("token") == self.token:
                self.place.delete([FILE])

    def require(self) -> None:
        """Raises UserError if another run has taken the lock, as while this process was frozen.

        The lock is read, since the next beat of a process that goes on may be seconds away.
        """
        owner = self._read()
        if owner and owner.get("token") != self.token:
            self.usurper = owner
        if self.usurper:
            raise self._refusal(self.usurper)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(UserError):  # the network; the next write may succeed
                owner = self._read()
                if owner and owner.get("token") != self.token:
                    self.usurper = owner
                    return
                self._write()

    def _read(self) -> dict[str, Any]:
        return parse_owner(self.place.read(FILE) or b"")

    def _read_whole(self) -> dict[str, Any]:
        """Returns what the lock says, after a moment if another process is just writing it."""
        for _ in range(20):
            owner = self._read()
            if owner:
                break
            time.sleep(0.05)
        return owner

    def _write(self) -> None:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        self.place.write(FILE, json.dumps(owner | {"token": self.token}).encode())

    def _is_held(self, content: bytes) -> bool:
        """Returns whether another process still writes the lock, which it waits to see.

        Bytes are compared: where an object appears before it is complete, half of a lock is a lock.
        """
        owner = parse_owner(content)
        # A process of that number may be another one, as after a container has been restarted.
        if owner.get("host") == socket.gethostname() and not is_alive(owner):
            return False
        written = owner.get("time")
        if isinstance(written, int | float) and time.time() - written > OLD:
            return False
        seconds = 3 * BEAT
        parallel.print_once(
            f"{self.place.address} was in use by {describe_owner(owner)}; waiting {seconds:.0f} s"
            " to see whether it still is"
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(BEAT / 4, 5.0))
            current = self.place.read(FILE)
            if current != content:
                return current is not None
        return False

    def _refusal(self, owner: Mapping[str, Any]) -> UserError:
        return refuse_second(self.place.address, describe_owner(owner))
