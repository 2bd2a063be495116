"""A real S3 server on loopback, and a way to it that can be cut at any moment while the server lives on."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

from ranks import free_port

BUCKET = "checkpoints-of-tests"


def environment(port: int, key: str = "AKIATEST") -> dict[str, str]:
    """What a client has to have in its environment."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",  # of botocore by itself: what is tested are our own
    }


class Server:
    """moto's server with one bucket in it. What it holds is in its memory, and gone when it is killed."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                put(self.port, f"/{BUCKET}")
                return
            assert self._process.poll() is None, "moto's server ended"
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.1)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """A server until the end of the block."""
    server = Server()
    try:
        yield server
    finally:
        server.kill()


def put(port: int, path: str, content: bytes = b"", method: str = "PUT") -> None:
    """One request without a client library."""
    headers = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=content, headers=headers, method=method)
    urllib.request.urlopen(request, timeout=5).close()


class Way:
    """Forwards connections to a port, until it is cut: then it refuses new ones and the old ones are gone."""

    def __init__(self, to: int) -> None:
        self.port, self._to = free_port(), to
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.bytes = 0  # that went to the server
        self.refusal: bytes | None = None  # what whoever writes gets instead of an answer of the server
        self.refused = 0
        self.mend()

    def mend(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port))
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        assert self._listener is not None
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._listener, self._open = None, []

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                self._open += [client, server]
                for ends in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if counted and self.refusal is not None and data.startswith((b"PUT ", b"POST ")):
                    self.refused += 1
                    source.sendall(self.refusal)
                    while source.recv(1 << 16):  # the rest of what it wanted to write
                        pass
                    break
                self.bytes += len(data) if counted else 0
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def refusal(status: str, code: str, message: str) -> bytes:
    """An answer of an S3 server, as bytes."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return f"{head}\r\n\r\n{body}".encode()


def use(settings: dict[str, str]) -> None:
    """Let this process be a client with these settings from now on."""
    from dstrain.storages import fsspec as store

    os.environ.update(settings)
    store._made.cache_clear()
