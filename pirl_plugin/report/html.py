"""The report as one HTML file that needs nothing else: style, script and figures are inside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

_HERE = Path(__file__).parent


def page(content: Mapping[str, Any], out: Path) -> str:
    """The page; everything in ``content`` is escaped, but for the figures' own markup.

    Args:
        content: what the template asks for.
        out: folder that the page will lie in, for relative links.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["link"] = lambda path: link(path, out)
    own = {name: Markup((_HERE / f"report.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    return environment.get_template("report.html.jinja").render(**content, **own, svg=Markup)


def link(path: Path, out: Path) -> str:
    """Address of a file or folder relative to the page's folder."""
    try:
        relative = Path(os.path.relpath(path.resolve(), out.resolve()))
    except ValueError:  # another drive
        return path.resolve().as_uri()
    return quote(relative.as_posix()) + ("/" if path.is_dir() else "")
