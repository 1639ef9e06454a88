"""What the page shows of a request: pieces of HTML. All text from elsewhere is escaped."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape

EMPTY = '<p class="ditc-hint">Describe a picture and press <b>Draw</b>. Previews appear here while it is drawn.</p>'


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A picture on the page.

    Attributes:
        png: the file.
        name: under which name it is saved; "" for a preview, which is not.
    """

    png: bytes
    caption: str
    name: str = ""


def progress(text: str, done: int = 0, total: int = 0) -> str:
    """A line of text, and a bar that moves once the number of steps is known."""
    value = f' max="{total}" value="{done}"' if total else ""
    bar = f'<progress aria-label="Progress"{value}></progress>'
    return f'<div class="ditc-status" role="status">{bar}<span>{escape(text)}</span></div>'


def done(text: str) -> str:
    """A line of text at the end of a request."""
    return f'<div class="ditc-status ditc-done" role="status"><span>{escape(text)}</span></div>'


def problem(text: str, hint: str | None = None) -> str:
    """Why there is no picture."""
    more = f"<span>{escape(_sentence(hint))}</span>" if hint else ""
    return f'<div class="ditc-status ditc-problem" role="alert"><b>{escape(_sentence(text))}</b>{more}</div>'


def pictures(shown: list[Shown]) -> str:
    """Pictures side by side."""
    return f'<div class="ditc-pictures">{"".join(map(_figure, shown))}</div>' if shown else ""


def _figure(one: Shown) -> str:
    source = f"data:image/png;base64,{base64.b64encode(one.png).decode()}"
    kind, link, key = "ditc-preview", "", ""
    if one.name:
        kind, key = "ditc-picture", ' role="button" tabindex="0"'  # page.js enlarges it
        link = f'<a href="#" role="button" data-name="{escape(one.name)}">Download PNG</a>'
    caption = f"<figcaption><span>{escape(one.caption)}</span>{link}</figcaption>"
    return f'<figure class="{kind}"><img src="{source}" alt="{escape(one.caption)}"{key}>{caption}</figure>'


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
