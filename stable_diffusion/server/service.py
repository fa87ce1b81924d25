"""The shared parts of all interfaces: jobs that end if the client disconnects, event streams, the model in use."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any

from fastapi import Body
from fastapi import Request as Connection
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from ..app.worker import Job, Picture, Worker, make_job
from ..pipeline import StableDiffusion
from .security import in_one_line
from .settings import Settings

Fields = Annotated[dict[str, Any], Body()]  # of a JSON body


class Service:
    """Hold the worker and ``base``: the model in use, and the default settings of requests."""

    def __init__(self, settings: Settings, worker: Worker):
        self.settings, self.worker, self.base = settings, worker, settings.base

    @property
    def model(self) -> str:
        """Return the name of the model in use."""
        models = self.settings.library.models
        return next((name for name, source in models.items() if source == self.base.model), self.base.model)

    async def job(self, values: Mapping[str, Any], pictures: Mapping[str, Any] | None = None, **options: Any) -> Job:
        """Create a job from values by the names of fields; see :func:`stable_diffusion.app.worker.make_job`."""
        return await run_in_threadpool(make_job, self.base, values, pictures or {}, self.settings.limits, **options)

    async def draw(self, connection: Connection, job: Job) -> list[Picture]:
        """Run a job and return its images. Cancel it if the client disconnects; raise its exception if it fails."""
        async for _ in self.events(connection, job):
            pass
        return sorted(job.pictures, key=lambda picture: picture.number)

    async def events(self, connection: Connection, job: Job) -> AsyncIterator[Any]:
        """Run a job and yield its events, as ``draw`` does."""
        watcher = asyncio.create_task(_cancel_when_gone(connection, job))
        try:
            async for event in self.worker.run(job):
                yield event
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher

    async def stream(
        self, connection: Connection, job: Job, translate: Callable[[Any], Iterable[tuple[str, dict[str, Any]]]]
    ) -> StreamingResponse:
        """Run a job and send server-sent events: ``translate`` returns the names and the JSON for each event.

        Errors before the first step are raised; later ones are sent as events "error".
        """
        events = self.events(connection, job)
        first = await anext(events, None)

        async def lines() -> AsyncIterator[str]:
            event = first
            try:
                while event is not None:
                    for name, data in translate(event):
                        yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
                    event = await anext(events, None)
            except Exception as error:
                yield f"event: error\ndata: {json.dumps({'error': {'message': in_one_line(error)}})}\n\n"
            finally:
                await events.aclose()

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def change(self, connection: Connection, values: Mapping[str, Any]) -> None:
        """Use other settings from now on, such as another model.

        Raises ValueError or OSError if the model cannot be opened; the previous one stays in use.
        """
        job = Job(self.base.with_values(**values), task=lambda model: True)
        await self.draw(connection, job)
        if job.outcome:  # it may be interrupted before it begins
            self.base = self.base.with_values(**values)

    async def call(self, connection: Connection, task: Callable[[StableDiffusion], Any]) -> Any:
        """Call a function with the model in use, in the worker's thread in its turn, and return the result."""
        job = Job(self.base, task=task)
        await self.draw(connection, job)
        return job.outcome


async def _cancel_when_gone(connection: Connection, job: Job) -> None:
    while not await connection.is_disconnected():
        await asyncio.sleep(0.1)
    job.is_cancelled = True
