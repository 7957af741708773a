"""A hook of mkdocs: what the site does with pages that also have to read well on GitHub and in a checkout.

A link to a file outside docs/ leads to the repository, or is plain text where that has no address. The search puts the
known errors first, and the long lists of the reference last.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

BOOST = {"errors.md": 4, "reference/json.md": 0.2, "reference/commands.md": 0.5}
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]*)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """mkdocs calls this with the text of every page."""

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), found[2]))
        if target.startswith("docs/"):
            return found[0]
        return f"[{found[1]}]({config.repo_url.rstrip('/')}/blob/main/{target})" if config.repo_url else found[1]

    page.meta.setdefault("search", {"boost": BOOST.get(page.file.src_uri, 1)})
    return LINK.sub(link, markdown)
