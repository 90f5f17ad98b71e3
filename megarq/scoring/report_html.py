"""HTML from Python: every string becomes text, escaped, unless it is Html already.

tag("p", "a < b", class_="note") -> <p class="note">a &lt; b</p>
"""

import html
import re

_VOID = {"meta", "img", "line", "path", "circle", "rect"}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Html(str):
    """Markup that is safe as it is."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Anything as HTML text, also between quotes. What is no printable text, prompts hold it, becomes U+FFFD."""
    if isinstance(text, Html):
        return text
    printable = _UNPRINTABLE.sub("\ufffd", str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return Html(html.escape(printable, quote=True))


def join(*parts: object) -> Html:
    """Parts one after another; None is nothing."""
    return Html("".join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """An element. Of attribute names, the last _ is dropped and others become -; those that are None or False too."""
    told = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{told}>" if name in ("meta", "img") else f"<{name}{told}/>")
    return Html(f"<{name}{told}>{join(*content)}</{name}>")
