"""`dstrain serve`: a model behind a socket, until a signal; what was begun is answered before it ends."""

import ctypes
import gc
import ipaddress
import signal
import socket
import stat
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import uvicorn

from dstrain.errors import EXIT_DONE, UserError
from dstrain.predict.load_predictor import load_predictor
from dstrain.predict.loaded import transformers_folder
from dstrain.serve.app import Limits, Values, make_app

SHORTEST_TOKEN = 16
BACKLOG = 2048  # connections that wait to be accepted
FEW_ROWS = 16  # not worth halving
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BLOCK_BYTES, KEPT_BYTES = 32 * 2**20, 2**30  # the first is the most that glibc allows


def serve_command(args: Namespace) -> int:
    """`dstrain serve MODEL [--host] [--port] [--token-file FILE] …`: exit code 0 after SIGTERM or Ctrl-C."""
    limits = Limits(args.batch_rows, args.queue_rows, args.threads, int(args.body_mb * 2**20), args.timeout_seconds)
    for option in ("batch_rows", "queue_rows", "threads", "body_mb", "timeout_seconds"):
        if not getattr(args, option) > 0:
            name = option.replace("_", "-")
            raise UserError(f"--{name} {getattr(args, option)} must be more than 0")
    if limits.queue_rows < limits.batch_rows:
        raise UserError(f"--queue-rows {limits.queue_rows} holds no batch of --batch-rows {limits.batch_rows}")
    token = read_token(Path(args.token_file)) if args.token_file else None
    if token is None and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} lets other machines in, and nobody is asked for a token; give --token-file FILE, "
            f"or listen on 127.0.0.1 behind a proxy that asks"
        )
    listening = listen(args.host, args.port)
    with listening:
        folder = transformers_folder(Path(args.model))
        cores = max(1, torch.get_num_threads() // limits.threads)
        torch.set_num_threads(cores)  # of this thread: a graph has as many as it is loaded with
        predictor = load_predictor(folder, args.precision)

        def predict(inputs: list[Values]) -> list[dict[str, Any]]:
            torch.set_num_threads(cores)  # of the thread that calls it
            halves = -(-len(inputs) // 2)  # the longer texts, and the shorter ones: less of a batch is padding
            return predictor.answers(inputs, max(halves, FEW_ROWS))

        predict([("warm up",) * len(predictor.fields)])  # the first call is slow, and nobody should wait for it
        stay_fast()
        server: uvicorn.Server
        app = make_app(
            folder.name,
            predict,
            fields=predictor.fields,
            limits=limits,
            token=token,
            stopping=lambda: server.should_exit,
        )
        quiet: dict[str, Any] = {"access_log": False, "server_header": False, "proxy_headers": False}
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **quiet))

        def stop(*_: object) -> None:
            server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):  # until uvicorn listens to them; and it raises them once more
            signal.signal(number, stop)
        host, port = listening.getsockname()[:2]
        print(f"serving {folder} on http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C stops)", flush=True)
        server.run(sockets=[listening])
    return EXIT_DONE


def stay_fast() -> None:
    """Spare the process pauses of the collector and of malloc, once it has all that it will keep."""
    gc.collect()
    gc.freeze()  # a million objects that live as long as the server: looking through them stops all answers
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")  # what a batch frees is for the next one, not to be given back and asked for
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def read_token(file: Path) -> str:
    """The token in a file, which only its owner may read. Raises UserError where it is not so, or too short."""
    try:
        token, mode = file.read_text(encoding="utf-8").strip(), file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file}: {getattr(error, 'strerror', None) or error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"--token-file {file} can be read by others; run: chmod 600 {file}")
    if len(token) < SHORTEST_TOKEN or not token.isascii() or any(c.isspace() for c in token):
        raise UserError(
            f"--token-file {file} must hold one word of {SHORTEST_TOKEN} ASCII characters at least; "
            f"make one with: openssl rand -hex 32"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address, port 0 for any free one. Raises UserError where that is impossible."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: ports go from 0, any free one, to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}; --port 0 takes any free port") from error
    return listening
