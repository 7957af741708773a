"""What Slurm's commands print, as values. Pure; the formats are those of Slurm 22.05 to 25.11.

`records` reads lines of key=value (scontrol -o show ...), `rows` values between bars (squeue, sacct). Nothing is
guessed: an answer that is cut off or in another form raises ValueError, and is then no answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from itertools import groupby

from launcher.base.values import whole
from launcher.scheduler.facts import Block, Node, Partition, Topology

NOTHING = frozenset(("", "(null)", "N/A", "n/a", "None"))
MAX_HOSTS = 200_000  # in one host list; Slurm itself stops at 65,533 nodes
# Fields of `show node` that hold an administrator's free text. They are the last ones, so what stands before is safe.
FREE_TEXT = re.compile(r" (Reason|Comment|Extra)=")
# The reason ends with Slurm's own "[root@2026-01-02T03:04:05]"; where that is missing, with the next field.
REASON = re.compile(
    r" Reason=(.*? \[[^\[\]@ ]+@[^\[\]]+\](?= [A-Z]\w*=|\s*$)"
    r"|.*?(?= (?:Comment|Extra|ReservationName|InstanceId|InstanceType|Topology)=|$))"
)
DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
OTHER_WORDS = re.compile(r"^(?:s\w+): ")  # "scontrol: warning: ..." among the answer
NO_NODES = "No nodes in the system"


def records(text: str, start: str, needed: str) -> list[dict[str, str]]:
    """The fields of each line that begins with `start`=; "" for Slurm's words for nothing.

    A reason may hold a newline, and other words may stand between the lines. Raises ValueError where a record lacks the
    field `needed`.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if line.startswith(f"{start}="):
            lines.append(line)
        elif lines and line.strip() and not OTHER_WORDS.match(line):
            lines[-1] += " " + line.strip()
    found = [_fields(line) for line in lines]
    broken = sum(not (fields[start] and fields.get(needed)) for fields in found)
    if broken:
        raise ValueError(f"{broken} records are cut off or in another form")
    return found


def _fields(record: str) -> dict[str, str]:
    free_text = FREE_TEXT.search(record)
    head, tail = (record[: free_text.start()], record[free_text.start() :]) if free_text else (record, "")
    reason = REASON.match(tail)
    fields = {"Reason": reason[1].strip(" ") if reason else ""}
    for word in head.split(" "):  # only OS= has spaces in it, and its other words have no "="
        key, equals, value = word.partition("=")
        if equals and key not in fields:
            fields[key] = "" if value in NOTHING else value
    return fields


def rows(text: str, columns: int) -> list[list[str]]:
    """Lines of values between bars that begin with a job's number; the last value may hold any character.

    Other lines are warnings, or an array's. Raises ValueError for a line that is cut off: its job is there, and must
    not be taken for one that is gone.
    """
    found = []
    for line in text.splitlines():
        parts = line.strip().split("|", columns - 1)
        if re.fullmatch("[0-9]+", parts[0]):
            if len(parts) < columns:
                raise ValueError(line)
            found.append(parts)
    return found


def config(text: str) -> dict[str, str]:
    """`scontrol show config` by key; "(null)" becomes ""."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and re.fullmatch(r"\w+", key.strip()):
            found.setdefault(key.strip(), "" if value.strip() in NOTHING else value.strip())
    if not found:
        raise ValueError("nothing of it can be read")
    return found


def version(text: str) -> tuple[int, int] | None:
    """(25, 11) from "slurm 25.11.2", "slurm-wlm 22.05.8" or "25.11.2"."""
    found = re.search(r"(?<![\d.])(\d{2})\.(\d{2})(?:\.|\D|$)", text)
    return (int(found[1]), int(found[2])) if found else None


def nodes(text: str) -> tuple[Node, ...]:
    """`scontrol -o show node`"""
    found = {fields["NodeName"]: _node(fields) for fields in records(text, "NodeName", "State")}
    if not found and text.strip() not in ("", NO_NODES):
        raise ValueError("it answered nonsense")
    return tuple(found.values())


def _node(fields: dict[str, str]) -> Node:
    gres = fields.get("Gres", "")
    tres = re.search(r"(?:^|,)gres/gpu=(\d{1,9})", fields.get("CfgTRES", ""))
    kinds = {kind.partition(":")[2].lower() for kind, _ in gres_of(gres) if kind.partition(":")[0] == "gpu"}
    return Node(
        name=fields["NodeName"],
        states=states(fields["State"]),
        reason=fields["Reason"],
        partitions=_list(fields.get("Partitions", "")),
        features=_list(fields.get("ActiveFeatures", "") or fields.get("AvailableFeatures", "")),
        gres=gres,
        gpus=count_of(gres, "gpu") or (int(tres[1]) if tres else 0),
        gpu_type=kinds.pop() if len(kinds) == 1 else "",
        cpus=_int(fields, "CPUTot"),
        memory_mib=_int(fields, "RealMemory"),
        arch=fields.get("Arch", ""),
        booted=_date(fields.get("BootTime", "")),
        tmp_mib=_int(fields, "TmpDisk"),
    )


@lru_cache(4096)  # thousands of nodes share a few words
def states(word: str) -> frozenset[str]:
    """{"IDLE", "DRAIN"} from "IDLE+DRAIN"; {"DOWN", "NOT_RESPONDING"} from "DOWN*". A flag that is not known stays."""
    found = {part.rstrip("*") for part in word.upper().split("+")} - {""}
    return frozenset(found | {"NOT_RESPONDING"} if "*" in word else found)


@lru_cache(4096)
def gres_of(text: str) -> tuple[tuple[str, int], ...]:
    """(("gpu:gb200", 4), ("nvme", 2)) from "gpu:gb200:4(S:0-1),nvme:2"; one of what has no number."""
    found = []
    for item in re.sub(r"\([^)]*\)", "", text).split(","):
        kind, _, count = item.strip().rpartition(":")
        number = whole(count) if kind else None
        found.append((item.strip(), 1) if number is None else (kind, number))
    return tuple((kind, number) for kind, number in found if kind)


def count_of(text: str, wanted: str) -> int:
    """How many of the generic resource `wanted` ("gpu", "gpu:gb200") a GRES has."""
    return sum(number for kind, number in gres_of(text) if kind == wanted or kind.startswith(f"{wanted}:"))


def partitions(text: str) -> tuple[Partition, ...]:
    """`scontrol -o show partition`"""
    return tuple(
        Partition(
            name=fields["PartitionName"],
            default=fields.get("Default", "").upper() == "YES",
            state=fields["State"].upper(),
            max_time_s=seconds(fields.get("MaxTime", "")),
            max_nodes=whole(fields.get("MaxNodes", "")),
            nodes=expand(fields.get("Nodes", "")),
            min_nodes=_int(fields, "MinNodes"),
            groups=() if fields.get("AllowGroups", "").upper() == "ALL" else _list(fields.get("AllowGroups", "")),
            root_only=fields.get("RootOnly", "").upper() == "YES",
            needs_reservation=fields.get("ReqResv", "").upper() == "YES",
            topology=fields.get("Topology", ""),
        )
        for fields in records(text, "PartitionName", "State")
    )


def blocks(text: str) -> tuple[Block, ...]:
    """The blocks of `scontrol -o show topology`. One may have no nodes; an AggregatedBlock (from 24.11) is made of
    blocks that have lines of their own.
    """
    found = records(text, "BlockName", "BlockName")
    return tuple(Block(fields["BlockName"], expand(fields.get("Nodes", ""))) for fields in found)


def topology(text: str) -> Topology:
    """`scontrol -o show topology NAME`, of whatever kind that is. Raises ValueError for an answer of no known kind."""
    if found := blocks(text):
        return Topology("block", found)
    if text.strip() and not text.startswith(("SwitchName=", "TopologyName=")):
        raise ValueError("nothing of it can be read")
    return Topology("tree" if text.startswith("SwitchName=") else "flat")


def container_options(help_text: str) -> tuple[str, ...]:
    """Pyxis' options in `srun --help`; none where its plugin is not loaded."""
    return tuple(dict.fromkeys(re.findall(r"--(?:no-)?container-[a-z-]*[a-z]", help_text)))


def squashfuse(plugstack: str) -> bool | None:
    """Whether Pyxis mounts images (True) or has enroot unpack them (False, its default), by its line in
    plugstack.conf.
    """
    for line in plugstack.splitlines():
        if re.search(r"^\s*(required|optional)\s+\S*pyxis\S*\.so\b", line):
            return bool(re.search(r"\suse_squashfuse=(1|true|yes|y)\b", line, re.IGNORECASE))
    return None


def seconds(text: str) -> int | None:
    """Slurm's "7-00:00:00", "01:00:00" or minutes as seconds; None for UNLIMITED and what is no time."""
    found = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", text.strip())
    if not found:
        return None
    days, *parts = (None if part is None else int(part) for part in found.groups())
    given = [part for part in parts if part is not None]
    if days is None and len(given) < 3:  # minutes come first
        given = [0, *given]
    hours, minutes, rest = [*given, 0, 0][:3]
    return (days or 0) * 86400 + hours * 3600 + minutes * 60 + rest


def time_text(limit_s: int) -> str:
    """Seconds as Slurm writes a limit."""
    days, rest = divmod(limit_s, 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def expand(hosts: str) -> tuple[str, ...]:
    """Names of a host list: "n[1-2,07]x,login" is n1x, n2x, n07x, login. Empty for Slurm's words for none.

    A list that is not one (unbalanced brackets, ranges beyond MAX_HOSTS) yields nothing.
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
    texts = []
    for name in dict.fromkeys(names):
        found = re.fullmatch(r"(.*?)(\d{1,9})(\D*)", name)
        if found and name.isascii():
            groups.setdefault((found[1], len(found[2]), found[3]), []).append(int(found[2]))
        else:
            texts.append(name)
    for (prefix, width, suffix), numbers in groups.items():
        runs = [list(run) for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
        ends = [(run[0][1], run[-1][1]) for run in runs]
        parts = ",".join(f"{a:0{width}d}" + (f"-{b:0{width}d}" if b > a else "") for a, b in ends)
        texts.append(f"{prefix}{parts if len(numbers) == 1 else f'[{parts}]'}{suffix}")
    return ",".join(sorted(texts))


@lru_cache(4096)
def _list(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _date(text: str) -> str:
    """A time as Slurm writes it; "" for "None" and "Unknown", of a node that never registered, and for nonsense."""
    try:
        return text if DATE.fullmatch(text) and datetime.fromisoformat(text) else ""
    except ValueError:
        return ""


def _int(fields: dict[str, str], key: str) -> int:
    return whole(fields.get(key, "")) or 0
