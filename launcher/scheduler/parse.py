"""What Slurm's commands print, as values. Every function here is pure and takes text as it came.

Formats: `scontrol show config`, `scontrol -o show node|partition|topology`, `sinfo -h -N -o`, `srun --help`, as
printed by Slurm 22.05 to 25.11 (the first two spellings of a field that differ between them are both read).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any

from launcher.base.values import whole
from launcher.scheduler.facts import Block, Node, Partition

NOTHING = frozenset(("", "(null)", "N/A", "n/a", "None"))
MAX_HOSTS = 200_000  # in one host list; Slurm itself stops at 65,533 nodes
# Fields of `show node` that hold an administrator's free text. They are the last ones, so what stands before is safe.
FREE_TEXT = re.compile(r" (Reason|Comment|Extra)=")
STAMP = re.compile(r" \[[^\[\]@ ]+@[^\[\]]+\](?= [A-Z]\w*=|\s*$)")  # " [root@2026-01-02T03:04:05]"
AFTER_REASON = re.compile(r" (?:Comment|Extra|ReservationName|InstanceId|InstanceType|Topology)=")
DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
OTHER_WORDS = re.compile(r"^(?:s\w+): ")  # "scontrol: warning: ..." among the answer
# sinfo's and scontrol's one-character marks behind a state.
MARKS = {
    "*": "NOT_RESPONDING",
    "~": "POWERED_DOWN",
    "#": "POWERING_UP",
    "!": "POWER_DOWN",
    "%": "POWERING_DOWN",
    "$": "MAINT",
    "@": "REBOOT_REQUESTED",
    "^": "REBOOT_ISSUED",
    "-": "PLANNED",
}
# sinfo's words for what scontrol says as base state and flags.
WORDS = {
    "ALLOC": ("ALLOCATED",),
    "MIX": ("MIXED",),
    "COMP": ("COMPLETING",),
    "DRAINED": ("IDLE", "DRAIN"),
    "DRAINING": ("MIXED", "DRAIN"),
    "DRNG": ("MIXED", "DRAIN"),
    "RESV": ("RESERVED",),
    "PLND": ("IDLE", "PLANNED"),
    "PLANNED": ("IDLE", "PLANNED"),
    "RESERVED": ("IDLE", "RESERVED"),
    "MAINT": ("IDLE", "MAINT"),
    "UNK": ("UNKNOWN",),
    "POW_DN": ("POWERED_DOWN",),
    "POW_UP": ("POWERING_UP",),
    "FUTR": ("FUTURE",),
    "NO_RESPOND": ("NOT_RESPONDING",),
}


def config(text: str) -> dict[str, str]:
    """`scontrol show config` by key; "(null)" becomes ""."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and re.fullmatch(r"\w+", key.strip()):
            value = value.strip()
            found.setdefault(key.strip(), "" if value in NOTHING else value)
    return found


def version(text: str) -> tuple[int, int] | None:
    """(25, 11) from "slurm 25.11.2", "slurm-wlm 22.05.8" or "25.11.2"."""
    found = re.search(r"(?<![\d.])(\d{2})\.(\d{2})(?:\.|\D|$)", text)
    return (int(found[1]), int(found[2])) if found else None


def nodes(text: str) -> tuple[tuple[Node, ...], int]:
    """The nodes of `scontrol -o show node`, and how many records could not be read (cut off, not one record a line)."""
    found: dict[str, Node] = {}
    broken = 0
    for record in _records(text, "NodeName="):
        node = _node(record)
        if node is None:
            broken += 1
        else:
            found[node.name] = node
    return tuple(found.values()), broken


def _records(text: str, start: str) -> list[str]:
    """One string a record; a reason may hold a newline, and other words may stand between the lines."""
    records: list[str] = []
    for line in text.split("\n"):
        if line.startswith(start):
            records.append(line)
        elif records and line.strip() and not OTHER_WORDS.match(line):
            records[-1] += " " + line.strip()
    return records


def _node(record: str) -> Node | None:
    free_text = FREE_TEXT.search(record)
    head, tail = (record[: free_text.start()], record[free_text.start() :]) if free_text else (record, "")
    fields: dict[str, str] = {}
    for word in head.split(" "):  # only OS= has spaces in it, and its other words have no "="
        key, equals, value = word.partition("=")
        if equals and key not in fields and value not in NOTHING:
            fields[key] = value
    if not fields.get("NodeName") or not fields.get("State"):
        return None
    gres = fields.get("Gres", "")
    count, kind = gpus(gres)
    if not count and (tres := re.search(r"(?:^|,)gres/gpu=(\d+)", fields.get("CfgTRES", ""))):
        count = int(tres[1])
    return Node(
        name=fields["NodeName"],
        states=states(fields["State"]),
        reason=_reason(tail),
        partitions=_list(fields.get("Partitions", "")),
        features=_list(fields.get("ActiveFeatures", "") or fields.get("AvailableFeatures", "")),
        gres=gres,
        gpus=count,
        gpu_type=kind,
        cpus=_int(fields.get("CPUTot", "")),
        memory_mib=_int(fields.get("RealMemory", "")),
        arch=fields.get("Arch", ""),
        booted=_date(fields.get("BootTime", "")),
        tmp_mib=_int(fields.get("TmpDisk", "")),
    )


def _reason(tail: str) -> str:
    """The reason ends with Slurm's [user@time]; where that is missing, with the next field that Slurm writes."""
    if not tail.startswith(" Reason="):
        return ""
    text = tail[len(" Reason=") :]
    if stamp := STAMP.search(text):
        return text[: stamp.end()].strip(" ")
    after = AFTER_REASON.search(text)
    return text[: after.start() if after else None].strip(" ")


@lru_cache(4096)  # thousands of nodes share a few words
def states(word: str) -> frozenset[str]:
    """{"IDLE", "DRAIN"} from "IDLE+DRAIN", "idle*", "drained", "MIXED+PLANNED", "DOWN*+NOT_RESPONDING"."""
    found: set[str] = set()
    for part in word.upper().split("+"):
        base = part.rstrip("".join(MARKS))
        words = WORDS.get(base, (base,))
        found.update(words[-1:] if found else words)  # behind a base state, it is the flag alone
        found.update(MARKS[mark] for mark in part[len(base) :])
    return frozenset(found - {""})


@lru_cache(4096)
def gpus(gres: str) -> tuple[int, str]:
    """(count, type) of the GPUs in a GRES such as "gpu:gb200:4(S:0-1),nvme:2"; type "" where untyped or mixed."""
    count, kinds = 0, set()
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        parts = item.strip().split(":")
        if parts[0].lower() != "gpu":
            continue
        number = parts[-1] if len(parts) > 1 and whole(parts[-1]) is not None else ""
        kind = ":".join(parts[1:-1] if number else parts[1:]).lower()
        count += int(number[:9]) if number else 1
        kinds.add("" if kind in ("(null)", "no_consume") else kind)
    return count, kinds.pop() if len(kinds) == 1 else ""


def sinfo_nodes(text: str) -> tuple[Node, ...]:
    """Nodes of `sinfo -h -N -o "%N|%R|%T|%G|%f|%c|%m|%E"`, a line per node and partition: a second source."""
    found: dict[str, Node] = {}
    for line in text.splitlines():
        parts = line.strip().split("|", 7)
        if len(parts) != 8 or not parts[0] or not parts[2]:
            continue
        name, partition, state, gres, features, cpus, memory, reason = (p.strip() for p in parts)
        before = found[name].partitions if name in found else ()
        count, kind = gpus("" if gres in NOTHING else gres)
        found[name] = Node(
            name,
            states(state),
            "" if reason.lower() == "none" else reason,
            (*before, partition),
            _list(features),
            "" if gres in NOTHING else gres,
            count,
            kind,
            _int(cpus),
            _int(memory),
        )
    return tuple(found.values())


def partitions(text: str) -> tuple[tuple[Partition, ...], int]:
    """`scontrol -o show partition`, and how many records could not be read. Nodes expanded; none where none are
    listed.
    """
    found, broken = [], 0
    for record in _records(text, "PartitionName="):
        fields = dict(word.split("=", 1) for word in reversed(record.split(" ")) if "=" in word)
        if not fields.get("PartitionName") or "State" not in fields:
            broken += 1
            continue
        most, groups = fields.get("MaxNodes", ""), fields.get("AllowGroups", "ALL")
        found.append(
            Partition(
                name=fields["PartitionName"],
                default=fields.get("Default", "").upper() == "YES",
                state=fields["State"].upper(),
                max_time_s=seconds(fields.get("MaxTime", "")),
                max_nodes=whole(most),
                nodes=expand(fields.get("Nodes", "")),
                min_nodes=_int(fields.get("MinNodes", "")),
                groups=() if groups.upper() == "ALL" else _list(groups),
                root_only=fields.get("RootOnly", "").upper() == "YES",
                needs_reservation=fields.get("ReqResv", "").upper() == "YES",
            )
        )
    return tuple(found), broken


def partitions_of(nodes: Iterable[Node]) -> tuple[Partition, ...]:
    """What the nodes themselves say of their partitions, where `show partition` could not be read."""
    members: dict[str, list[str]] = {}
    for node in nodes:
        for name in node.partitions:
            members.setdefault(name, []).append(node.name)
    return tuple(Partition(name, nodes=tuple(names), guessed=True) for name, names in members.items())


def seconds(text: str) -> int | None:
    """Slurm's "7-00:00:00", "01:00:00" or minutes as seconds; None for UNLIMITED and what is no time."""
    found = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", text.strip())
    if not found:
        return None
    days, *rest = (int(part) if part else None for part in found.groups())
    a, b, c = rest
    if days is not None:
        return days * 86400 + (a or 0) * 3600 + (b or 0) * 60 + (c or 0)
    if c is not None:
        return (a or 0) * 3600 + (b or 0) * 60 + c
    return (a or 0) * 60 + (b or 0)


def time_text(limit_s: int) -> str:
    """Seconds as Slurm writes a limit."""
    days, rest = divmod(limit_s, 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def topology(text: str) -> tuple[str, tuple[Block, ...]]:
    """The kind of topology that `scontrol show topology` shows ("block", "tree" or ""), and its blocks.

    An AggregatedBlock (from 24.11) is made of blocks that have lines of their own. A block may have no nodes.
    """
    blocks, kind = [], ""
    for line in text.splitlines():
        fields = dict(word.split("=", 1) for word in reversed(line.split()) if "=" in word)
        if "SwitchName" in fields:
            kind = kind or "tree"
        elif "BlockName" in fields or "AggregatedBlock" in fields:
            kind = "block"
            if "BlockName" in fields:
                blocks.append(Block(fields["BlockName"], expand(fields.get("Nodes", ""))))
    return kind, tuple(blocks)


def topology_is_cut_off(text: str) -> bool:
    """Whether the answer ends within a record: then what it has of blocks is not all."""
    return bool(text.strip()) and (not text.endswith("\n") or text.count("[") != text.count("]"))


def container_options(help_text: str) -> tuple[str, ...]:
    """Pyxis' options in `srun --help`; none where its plugin is not loaded."""
    return tuple(dict.fromkeys(re.findall(r"--(?:no-)?container-[a-z-]*[a-z]", help_text)))


def squashfuse(plugstack: str) -> bool | None:
    """Whether Pyxis mounts images (True) or has enroot unpack them (False, its default), by its line in
    plugstack.conf.
    """
    for line in plugstack.splitlines():
        if re.search(r"^\s*(required|optional)\s+\S*pyxis\S*\.so\b", line):
            return bool(re.search(r"\suse_squashfuse=(1|true)\b", line))
    return None


def expand(hosts: str) -> tuple[str, ...]:
    """Names of a host list: "n[1-2,07]x,login" is n1x, n2x, n07x, login. Empty for Slurm's words for none.

    A list that is not one (unbalanced brackets, ranges beyond MAX_HOSTS) yields nothing: its caller has other sources.
    """
    if hosts in NOTHING or hosts == "ALL" or hosts.count("[") != hosts.count("]"):
        return ()
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", hosts):
        expanded = [""]
        for part in re.findall(r"\[[^\]]*\]|[^\[]+", item):
            numbers = _numbers(part[1:-1]) if part[0] == "[" else [part]
            if len(expanded) * len(numbers) + len(names) > MAX_HOSTS:
                return ()
            expanded = [before + number for before in expanded for number in numbers]
        names += expanded
    return tuple(names)


def _numbers(ranges: str) -> list[str]:
    found: list[str] = []
    for piece in ranges.split(","):
        first, dash, last = piece.partition("-")
        if not dash:
            found.append(first)
        elif (low := whole(first)) is not None and (high := whole(last)) is not None and high - low <= MAX_HOSTS:
            found += [f"{number:0{len(first)}d}" for number in range(low, high + 1)]
    return found


def compress(names: Sequence[str]) -> str:
    """A short host list for `names`: "n[001-003,005],login". Sorted; `expand` undoes it."""
    groups: dict[tuple[str, int, str], list[int]] = {}  # by prefix, digits, suffix
    plain = []
    for name in dict.fromkeys(names):
        found = re.fullmatch(r"(.*?)(\d{1,9})(\D*)", name)
        if found and name.isascii():
            groups.setdefault((found[1], len(found[2]), found[3]), []).append(int(found[2]))
        else:
            plain.append(name)
    texts = list(plain)
    for (prefix, width, suffix), numbers in groups.items():
        numbers.sort()
        runs = [[numbers[0], numbers[0]]]
        for before, number in pairwise(numbers):
            if number == before + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        parts = [f"{a:0{width}d}" + (f"-{b:0{width}d}" if b > a else "") for a, b in runs]
        only = len(numbers) == 1
        texts.append(f"{prefix}{parts[0] if only else '[' + ','.join(parts) + ']'}{suffix}")
    return ",".join(sorted(texts))


@lru_cache(4096)
def _list(text: str) -> tuple[str, ...]:
    return () if text in NOTHING else tuple(part for part in text.split(",") if part)


def _date(text: str) -> str:
    """A time as Slurm writes it; "" for "None" and "Unknown", of a node that never registered, and for nonsense."""
    try:
        return text if DATE.fullmatch(text) and datetime.fromisoformat(text) else ""
    except ValueError:
        return ""


def _int(text: str) -> int:
    digits: Any = re.match(r"\d{1,15}", text)  # sinfo marks the least of several with "+"
    return int(digits[0]) if digits else 0
