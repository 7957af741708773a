"""A root directory of a foreign architecture in half a minute: nothing of it is run while it is made.

mmdebstrap can unpack the packages natively; installing them as usual would run dpkg and the maintainer scripts under
emulation, for 5 to 9 minutes. This file is mmdebstrap's hook after the unpacking: it writes into dpkg's database that
the packages are installed, so that apt in the container knows it, and does the little that the tests need of what
the scripts would have done.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def register(root: Path) -> None:
    """Enters every package of the apt cache below `root` in dpkg's database there."""
    database = root / "var" / "lib" / "dpkg"
    (database / "info" / "format").write_text("1\n")
    stanzas = []
    for deb in sorted((root / "var" / "cache" / "apt" / "archives").glob("*.deb")):
        control = output("dpkg-deb", "--field", str(deb))
        fields = dict(line.split(": ", 1) for line in control.splitlines() if line[:1].isalpha() and ": " in line)
        first, _, rest = control.partition("\n")
        stanzas.append(f"{first}\nStatus: install ok installed\n{rest.rstrip()}\n")
        name = fields["Package"]
        if fields.get("Multi-Arch") == "same":
            name += f":{fields['Architecture']}"
        files = [line.split(maxsplit=5)[5] for line in output("dpkg-deb", "--contents", str(deb)).splitlines()]
        paths = ["/." if path == "./" else path[1:].split(" -> ")[0].rstrip("/") for path in files]
        (database / "info" / f"{name}.list").write_text("\n".join([*paths, ""]))
    (database / "status").write_text("\n".join([*stanzas, ""]))


def configure(root: Path) -> None:
    """What the scripts of base-passwd, dash and mawk leave behind; and apt without a source."""
    for name in ("passwd", "group"):
        content = (root / "usr" / "share" / "base-passwd" / f"{name}.master").read_text()
        (root / "etc" / name).write_text(content)
    for link, target in (("bin/sh", "dash"), ("usr/bin/awk", "mawk")):
        if not (root / link).exists():
            (root / link).symlink_to(target)
    # Everything that the Dockerfile asks for is there; reading Debian's lists would cost a minute under emulation.
    (root / "etc" / "apt" / "sources.list").write_text("")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    register(Path(sys.argv[1]))
    configure(Path(sys.argv[1]))
