"""HTML in which nothing that was read is ever markup: text is escaped where an element is made, which is the only way to make one."""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = {"img", "input", "meta"}


class Html(str):
    """Markup; only ``element`` and what draws pictures make it."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Html:
    """An element; children and attributes are escaped unless they are ``Html``. ``cls`` stands for ``class``, ``_`` for ``-``."""
    words = "".join(
        f' {"class" if name == "cls" else name.replace("_", "-")}="{html.escape(value)}"' for name, value in attributes.items() if value
    )
    return Html(f"<{tag}{words}>" if tag in _VOID else f"<{tag}{words}>{join(children)}</{tag}>")


def join(parts: Iterable[str]) -> Html:
    """Several pieces after each other."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))
