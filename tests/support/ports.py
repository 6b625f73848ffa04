"""Ports for servers that have to be told theirs."""

from __future__ import annotations

import socket

_KEPT: list[socket.socket] = []


def kept_port() -> int:
    """A port that no other program is given by chance while this process lives: a socket that never listens is bound to it.

    A server may bind it all the same, as servers do (SO_REUSEADDR). Until one does, connections are refused.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _KEPT.append(holder)
    return int(holder.getsockname()[1])
