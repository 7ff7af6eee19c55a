"""Carries a job's events from the service's threads into an asyncio loop. Knows no protocol."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from typing import TypeVar

from ..service import Done, Event, Failed, Job

Other = TypeVar("Other")


def carry(job: Job, arrived: asyncio.Queue[Event | Other]) -> None:
    """Start a thread that puts the job's events on a queue of the running loop: at most a job's tokens."""
    loop = asyncio.get_running_loop()

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            for event in job.events():
                loop.call_soon_threadsafe(arrived.put_nowait, event)

    threading.Thread(target=run, name="job-events", daemon=True).start()


async def events_of(job: Job) -> AsyncGenerator[Event]:
    """The job's events, the last being Done or Failed. Leaving early, or being cancelled, cancels the job."""
    arrived: asyncio.Queue[Event] = asyncio.Queue()
    carry(job, arrived)
    try:
        while True:
            event = await arrived.get()
            yield event
            if isinstance(event, Done | Failed):
                return
    finally:
        job.cancel()
