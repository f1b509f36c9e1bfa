"""Bytes from one process to another over TCP, and no more: what a tier over TCP cannot go below."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time

from yardstick import GB, cpu_of

NBYTES = 256 << 20
SENDER = """
import os, socket, sys
data = bytearray(os.urandom(4096) * (int(sys.argv[2]) // 4096))
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as sock:
    while sock.recv(1):
        sock.sendall(data)
"""


def sockets(rounds: int) -> float:
    """CPU seconds of both ends per GB, median of rounds."""
    into = memoryview(bytearray(NBYTES))
    took = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        sender = subprocess.Popen([sys.executable, "-c", SENDER, port, str(NBYTES)])
        sock, _ = listener.accept()
        with sock:
            for _ in range(rounds):
                before = cpu_of(sender.pid) + time.process_time()
                sock.sendall(b"g")
                at = 0
                while at < NBYTES:
                    at += sock.recv_into(into[at : at + (1 << 20)])
                time.sleep(0.05)
                took.append(cpu_of(sender.pid) + time.process_time() - before)
        sender.wait(20)
    return statistics.median(took) / (NBYTES / GB)
