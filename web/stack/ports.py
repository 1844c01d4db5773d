"""Listening sockets and free ports. Opens sockets on this machine only."""

from __future__ import annotations

import errno
import ipaddress
import socket

from web.stack.errors import StackError

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, which web inherits: a restart of web then refuses no connection.

    Port 0 picks a free one. Raises StackError that names the option to change.
    """
    family, address = _resolve(host, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StackError(_why(error, host, port)) from None
    return listener


def listen_preferring(host: str, port: int) -> socket.socket:
    """As `listen`, on any free port where this one is taken."""
    try:
        return listen(host, port)
    except StackError:
        return listen(host, 0)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on just now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def url(host: str, port: int) -> str:
    """The address to reach a server that listens on `host`; a wildcard is reached by loopback."""
    address = _address(host)
    if address is not None and address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StackError(f"--host {host}: no such address ({error.strerror})") from None
    # IPv4 first: "localhost" is both, and clients try 127.0.0.1.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, (str(address[0]), port)


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is taken by another program: choose another with --port, "
            "or --port 0 for any free one"
        )
    if error.errno == errno.EACCES:
        return f"port {port} may not be opened by this user: choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: this machine has no such address"
    return f"cannot listen on {host}, port {port}: {error.strerror}"
