"""`accelerate launch` on one machine, listening on loopback only.

torch's key-value store, by which ranks find each other, listens at every address of the machine without a
password: anyone who reaches the port could write into it. It accepts a socket that is bound already, so it gets one.
Started as `python -P -m tasks.jobs.training.ranks ACCELERATE'S ARGUMENTS` by tasks.runtime.process.child.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

from accelerate.commands import launch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

LOOPBACK = "127.0.0.1"
BACKLOG = 128
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # what ranks talk over; else that of the machine's own name


def store_on_loopback(host: str, port: int, world: int, is_master: bool, timeout: timedelta, **more: Any) -> TCPStore:
    """A TCPStore as torch's launcher makes it, but for the address at which the first one listens."""
    if not is_master:
        return TCPStore(host, port, world, is_master, timeout, **more)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    listener.listen(BACKLOG)
    return TCPStore(LOOPBACK, port, world, is_master, timeout, master_listen_fd=listener.detach(), **more)


def main() -> None:
    """Turn into the launcher."""
    for name in INTERFACES:
        os.environ.setdefault(name, "lo")
    static_tcp_rendezvous.TCPStore = store_on_loopback  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    launch.main()


if __name__ == "__main__":
    main()
