"""Replicas as threads of this process: for tests, benchmarks and embedding, where no cluster is wanted.

Does not survive what it runs: a replica here cannot be killed, only forgotten.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from rayskip.data.records import Shard
from rayskip.errors import ReplicaLost
from rayskip.pool import Done, Event, Failed, Lost, Ready, Replica


class LocalPool:
    """A Pool whose replicas come from `make_replica` and whose calls run in daemon threads."""

    def __init__(self, make_replica: Callable[[], Replica]) -> None:
        self._make = make_replica
        self._replicas: dict[int, Replica] = {}
        self._events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._started = 0

    def start(self) -> int:
        replica, self._started = self._started, self._started + 1
        self._replicas[replica] = self._make()
        self._spawn(self._load, replica)
        return replica

    def submit(self, replica: int, shard: Shard) -> None:
        self._spawn(self._run, replica, shard)

    def wait(self, timeout_s: float) -> list[Event]:
        try:
            events = [self._events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self._events.empty():
            events.append(self._events.get())
        return [event for each in events if (event := self._told(each))]

    def kill(self, replica: int) -> None:
        del self._replicas[replica]

    def close(self) -> None:
        self._replicas.clear()

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _told(self, event: Event | Exception) -> Event | None:
        """The event as the driver is to hear it; None of a replica that is gone."""
        if isinstance(event, Exception):
            raise event
        if event.replica not in self._replicas:
            return None
        if isinstance(event, Failed) and isinstance(event.error, ReplicaLost):
            event = Lost(event.replica, str(event.error))
        if isinstance(event, Lost):
            self.kill(event.replica)
        return event

    def _load(self, replica: int) -> None:
        try:
            self._events.put(Ready(replica, self._replicas[replica].ready()))
        except ReplicaLost as error:
            self._events.put(Lost(replica, str(error)))
        except Exception as error:
            self._events.put(error)

    def _run(self, replica: int, shard: Shard) -> None:
        try:
            self._events.put(Done(replica, self._replicas[replica].run(shard)))
        except Exception as error:
            self._events.put(Failed(replica, shard.index, error))
