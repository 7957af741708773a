"""The interface that carries the route to the head node, and this node's address on it."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from typing import Any

from titan import Refused

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of a network interface


def find_network(node: dict[str, Any], env: Any) -> dict[str, str]:
    """The interface that carries the route to the head node, and this node's address on it.

    Raises Refused where several nodes would each meet only themselves.
    """
    head, several = env.get("TITAN_HEAD_ADDR", ""), max(node["job"]["nodes"], int(env.get("TITAN_NODES") or 0)) > 1
    fix = "start it with the job script: sbatch <run_dir>/job.sbatch"
    if not head:
        if several:
            raise Refused("TITAN_HEAD_ADDR is not set: the nodes cannot find each other", fix)
        head = "127.0.0.1"
    try:
        family, _, _, _, address = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: it only asks the kernel for the route
            local = str(probe.getsockname()[0])
    except OSError as error:
        raise Refused(f"there is no route to the head node {head}: {error.strerror or error}", fix) from error
    if several and ":" in local:
        raise Refused(f"the head node's address {head} is IPv6: the nodes meet over IPv4", fix)
    if several and node["profile"]["device"] == "cuda" and ipaddress.ip_address(local).is_loopback:
        raise Refused(f"the head node's address {head} is loopback: every node would train alone", fix)
    return {"address": local, "iface": interface_of(local)}


def interface_of(address: str) -> str:
    """The name of the interface whose IPv4 address this is; empty when none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
