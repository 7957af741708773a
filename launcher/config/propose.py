"""Which GPU profile a partition's nodes are, with the evidence for it and against it.

A profile is proposed only where something names it and something else agrees. The type in the GRES is a name that an
administrator chose: some clouds write B200 for GB200, and CPU nodes may register GPUs that they do not have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.config.hardware import hardware
from launcher.scheduler.facts import Node
from launcher.scheduler.parse import compress


@dataclass(frozen=True)
class Evidence:
    """One observation, the profiles that it speaks for, and whether it names them or only fits them."""

    source: str  # GRES, features, node names, count, architecture, CPUs, memory
    what: str  # "GRES gpu:gb200:4", in the cluster's own words
    profiles: tuple[str, ...]
    names: bool = False


@dataclass(frozen=True)
class Proposal:
    """`profile` is "" where nothing can be said for sure; `candidates` are then those that nothing contradicts."""

    profile: str = ""
    evidence: tuple[Evidence, ...] = ()
    contradictions: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()


def propose(nodes: Sequence[Node]) -> Proposal:
    """The profile of `nodes`, which may be of several sorts: then all sorts must come to the same one."""
    sorts: dict[tuple[int, str], list[Node]] = {}
    for node in nodes:
        if node.gpus:
            sorts.setdefault((node.gpus, node.gpu_type), []).append(node)
    if not sorts:
        what = f"none of the {len(nodes)} nodes has GPUs in its GRES" if nodes else "there are no nodes"
        return Proposal(contradictions=(what,))
    proposals = [_propose_for(sort) for sort in sorts.values()]
    if len(proposals) == 1:
        return proposals[0]
    found = {p.profile for p in proposals}
    texts = [f"{gpus} GPUs" + (f" ({kind})" if kind else "") for gpus, kind in sorts]
    against = [f"the nodes are of {len(sorts)} sorts: {', '.join(texts)}"]
    return Proposal(
        profile=found.pop() if len(found) == 1 else "",
        evidence=tuple(dict.fromkeys(e for p in proposals for e in p.evidence)),
        contradictions=tuple(dict.fromkeys([*against, *(c for p in proposals for c in p.contradictions)])),
        candidates=tuple(dict.fromkeys(c for p in proposals for c in (p.profile, *p.candidates) if c)),
    )


def contradictions(profile: str, nodes: Sequence[Node]) -> list[str]:
    """What the nodes say against `profile`; empty where they agree or say nothing."""
    with_gpus = [node for node in nodes if node.gpus]
    if profile not in hardware() or not nodes:
        return []
    if not with_gpus:
        return list(propose(nodes).contradictions)
    return _against(profile, _evidence(with_gpus))


def _propose_for(nodes: Sequence[Node]) -> Proposal:
    """Count and architecture leave some profiles; what names one of them must not be the GRES alone, nor be
    disputed.
    """
    evidence = _evidence(nodes)
    hard = [e for e in evidence if e.source in ("count", "architecture")]
    names = [e for e in evidence if e.names]
    fitting = [name for name in hardware() if all(name in e.profiles for e in hard)]
    named_here = {name for e in names for name in e.profiles}
    chosen = [name for name in fitting if name in named_here]
    if len(chosen) == 1:
        name = chosen[0]
        sure = any(name in e.profiles for e in evidence if e.source not in ("GRES", "count"))
        agreed = sure and all(name in e.profiles for e in names)
        against = tuple(_against(name, evidence))
        return Proposal(name if agreed else "", evidence, against, () if agreed else tuple(fitting))
    said = [text for name in sorted(named_here.difference(fitting)) for text in _against(name, hard)]
    if len(chosen) > 1:
        said.append("; ".join(f"{e.what} says {' or '.join(e.profiles)}" for e in names))
    return Proposal("", evidence, tuple(dict.fromkeys(said)), tuple(chosen or fitting))


def _evidence(nodes: Sequence[Node]) -> tuple[Evidence, ...]:
    """All that can be seen of nodes with GPUs, what names a profile first."""
    kinds, count = hardware(), nodes[0].gpus
    features = sorted({feature for node in nodes for feature in node.features})
    hosts = compress([node.name for node in nodes])
    arches = {node.arch for node in nodes} - {""}
    found = []
    if types := named([nodes[0].gpu_type]):
        gres = f"GRES {_short(sorted({node.gres for node in nodes}))}"
        fit = [name for name, kind in kinds.items() if kind.gpus_per_node == count and {kind.arch} >= arches]
        wider = tuple(name for name in fit if name in types or (name[1:] in types and name[0] == "g"))
        if wider and not set(wider) & set(types):
            gres += f" (some clouds write {types[0].upper()} for {wider[0].upper()})"
        found.append(Evidence("GRES", gres, wider or types, names=True))
    if by_feature := named(features):
        found.append(Evidence("features", f"features {_short(features)}", by_feature, names=True))
    if by_host := named([re.sub(r"\[[^\]]*\]", "", hosts)]):
        found.append(Evidence("node names", f"node names {_short([hosts])}", by_host, names=True))
    by_count = tuple(name for name, kind in kinds.items() if kind.gpus_per_node == count)
    found.append(Evidence("count", f"{count} GPUs a node", by_count))
    if arches:
        by_arch = tuple(name for name, kind in kinds.items() if arches == {kind.arch})
        found.append(Evidence("architecture", "/".join(sorted(arches)), by_arch))
    cpus = {node.cpus for node in nodes}
    if len(cpus) == 1 and (by_cpus := tuple(name for name in kinds if kinds[name].cpus in cpus)):
        found.append(Evidence("CPUs", f"{nodes[0].cpus} CPUs a node", by_cpus))
    memory = min((node.memory_mib for node in nodes if node.memory_mib > 1), default=0)  # 1 MiB: never configured
    if memory:  # a node has at least half of its GPUs' memory
        by_memory = tuple(name for name in kinds if memory / 1024 >= kinds[name].memory_gib * count / 2)
        found.append(Evidence("memory", f"{memory / 1024:.0f} GiB of memory a node", by_memory))
    return tuple(found)


def _against(profile: str, evidence: Sequence[Evidence]) -> list[str]:
    """What contradicts `profile`: not the CPUs, of which a site may sell fewer, or keep some back."""
    return [
        f"{e.what} says {' or '.join(e.profiles)}, not {profile}" if e.names else f"{profile} does not fit {e.what}"
        for e in evidence
        if profile not in e.profiles and e.source != "CPUs"
    ]


def named(words: Sequence[str]) -> tuple[str, ...]:
    """Profiles whose name stands in `words` by itself: "b200" is not in "gb200", but is in "nvidia_b200"."""
    text = " ".join(sorted(words)).lower()
    return tuple(name for name in hardware() if re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![0-9])", text))


def _short(words: Sequence[str]) -> str:
    text = ", ".join(words)
    return text if len(text) <= 80 else f"{text[:77]}..."
