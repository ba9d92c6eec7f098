"""Formulas in TeX, as GitHub renders them too, become MathML: no script, no font, nothing from the network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
"""What pymdownx.arithmatex makes of $…$ and $$…$$."""
FUNCTION = re.compile(r"<mo>([a-z]+)</mo>")  # as an operator, min has a space on both sides
BAR = re.compile(r"<mo>(&#x02016;|&#x0007C;)</mo>")  # nor have ‖ and | where they begin and end a norm


def on_page_content(content: str, **_: Any) -> str:
    """Render the formulas of a page."""
    return FORMULA.sub(lambda found: _rendered(html.unescape(found[2]), block=found[1] == "div"), content)


def _rendered(tex: str, *, block: bool) -> str:
    mathml = convert(tex.strip(), display="block" if block else "inline")
    mathml = FUNCTION.sub(r"<mi>\1</mi>", mathml)
    return BAR.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', mathml)
