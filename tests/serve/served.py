"""A real server on a free port, in a thread of the test's process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI

from dstrain.serve.server import listen


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of a server that runs `app` until the block ends."""
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        httpx.get(f"{address}/health", timeout=30).raise_for_status()
        yield address
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
