"""Runs a reward server: which reward, where it listens, and who lets idle connections go."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import os
import secrets
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tempflow.media import Kind
from tempflow.names import nearest
from tempflow.rewards import from_function
from tempflow.rewards.protocol import Reward, prepare
from tempflow.serve.app import Settings, make_app

TOKEN = "TEMPFLOW_REWARD_TOKEN"
"""The environment variable that holds the token, on both sides."""

SHORTEST = 16
"""Characters of a token."""

CONNECTIONS = 512
"""Connections at a time."""

IDLE = 30.0
"""Seconds that a connection may take for a request's headers, or to read an answer."""

GRACE = 10
"""Seconds that requests at work have when the server is told to stop."""


class Patient(H11Protocol):
    """Lets a connection go that has had no request at work for `IDLE` seconds: one that sends its headers drop by drop,
    goes on sending a body that was refused, or does not read its answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._look()

    def _look(self) -> None:
        if self.transport.is_closing() and not self.transport.get_write_buffer_size():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle_since = self.loop.time()
        if self.loop.time() - self._idle_since > IDLE:
            self.transport.abort()
        else:
            self.loop.call_later(1.0, self._look)


def serve(reward: Reward, settings: Settings, host: str, port: int, token: str, ready: Callable[[str], None]) -> None:
    """Loads the reward, listens, and answers until a signal ends it. `ready` is called with the URL once it listens.

    Raises ValueError where the address cannot be listened at, and what the reward's `prepare` raises.
    """
    prepare(reward)
    listening = _listen(host, port)
    config = uvicorn.Config(
        make_app(reward, token, settings),
        http=Patient,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )
    name = f"[{host}]" if ":" in host else host
    ready(f"http://{name}:{listening.getsockname()[1]}")
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """Before `ready` is called, so that who is told the URL is heard."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(CONNECTIONS)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"host, port: {host}:{port} cannot be listened at ({why}); nearest valid: --port 0") from error
    return listening


# -------------------------------------------------------------------------------------------------------------- token
def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_token(file: str) -> tuple[str, str]:
    """The token, and where it comes from: a file, made with a new one where it isn't there; else the environment; else
    a new one ("").

    Raises ValueError for a file that others can read, and a token that is too short.
    """
    if not file:
        given = os.environ.get(TOKEN, "").strip()
        return (_long(given, TOKEN), TOKEN) if given else (secrets.token_urlsafe(32), "")
    path = Path(file)
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read(path), file
    except OSError as error:
        raise ValueError(f"token_file: {file!r} cannot be written ({error.strerror or error})") from error
    token = secrets.token_urlsafe(32)
    with os.fdopen(made, "w") as out:
        out.write(token + "\n")
    return token, file


def _read(path: Path) -> str:
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        raise ValueError(f"token_file: others can read {str(path)!r} ({mode:o}); nearest valid: chmod 600 {path}")
    return _long(path.read_text().strip(), str(path))


def _long(token: str, where: str) -> str:
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"{where}: no token of {SHORTEST} or more ASCII characters; nearest valid: a new one, from here"
        )
    return token


# ----------------------------------------------------------------------------------------------------------- function
def load_function(where: str, groupwise: bool = False, takes: Kind = "picture") -> Reward:
    """A reward from "FILE.py:NAME": a reward object there, a class of such, or a function as `from_function` takes it.

    The file is run. So this is for who starts a server by hand; nothing that comes over a wire or from a configuration
    leads here. Raises ValueError where there is no such file or name, and what the file raises.
    """
    place, _, name = where.rpartition(":")
    path = Path(place).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"function: {where!r} names no Python file; nearest valid: --function scorer.py:score")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` has it
    spec.loader.exec_module(module)
    there: dict[str, Any] = {n: value for n, value in vars(module).items() if not n.startswith("_") and callable(value)}
    if name not in vars(module):
        raise ValueError(f"function: {place} has no {name!r}; nearest valid: {nearest(name, there)}")
    found = vars(module)[name]
    if isinstance(found, type) and hasattr(found, "score"):
        found = found()
    return found if isinstance(found, Reward) else from_function(found, groupwise=groupwise, takes=takes)
