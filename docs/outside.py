"""A hook of mkdocs: a link from a page to a file outside docs/ leads to the repository, or is plain text without one.

On GitHub and in a checkout such links work as they stand. On the site there is no such file.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]*)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """mkdocs calls this with the text of every page."""

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), found[2]))
        if target.startswith("docs/"):
            return found[0]
        return f"[{found[1]}]({config.repo_url.rstrip('/')}/blob/main/{target})" if config.repo_url else found[1]

    return LINK.sub(link, markdown)
