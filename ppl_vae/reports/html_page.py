"""HTML pages: a report in one file that needs nothing else, made of its Markdown, numbers and pictures."""

import base64
import io
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.font_manager import FontProperties
from matplotlib.image import imread
from matplotlib.mathtext import math_to_image

from ppl_vae.reports.terms import TERMS, split

DOUBTS, FIGURES = "What to distrust", "Figures"  # sections that stand first, or are pictures


class Number(NamedTuple):
    """A number of the first screen.

    Attributes:
        label: what it is.
        value: its figure.
        error: its error in words, or why it has none.
        unit: its unit, and of what it is a mean.
        kind: `estimate`, `lower bound` or `closed form`.
    """

    label: str
    value: str
    error: str
    unit: str
    kind: str


class Picture(NamedTuple):
    """A picture of a page: its caption, which is also its text for those who cannot see it, and a PNG file's bytes.

    On dark ground a page turns the lightness of a picture round, but not of one whose own ground is transparent.
    """

    caption: str
    png: bytes


def page(
    text: str, *, about: str, numbers: Sequence[Number] = (), pictures: Sequence[Picture] = (), first: int = 0
) -> str:
    """Write an HTML page: one file, with its pictures inside, that asks for nothing from elsewhere.

    Args:
        text: in Markdown, of a title and sections. The one called "What to distrust" stands on the first screen, one
            called "Figures" is left to the pictures, the others are folded below.
        about: a sentence on what the page is about, in Markdown.
        numbers: those of the first screen.
        pictures: all of them.
        first: which one stands on the first screen.
    """
    title, *sections = re.split(r"^#{1,2} ", text, flags=re.MULTILINE)[1:]
    title, _, intro = title.partition("\n")
    bodies = dict(section.split("\n", 1) for section in sections)
    used: dict[str, str] = {}
    writer = _Writer(used)
    shown = {
        "title": re.sub(r"\\(.)", r"\1", title),
        "about": writer.inline(about),
        "numbers": [Number(*(writer.inline(part) for part in number)) for number in numbers],
        "pictures": [(writer.inline(each.caption), _plain(each.caption), *_embedded(each.png)) for each in pictures],
        "first": first,
        "doubts": writer.block(bodies.pop(DOUBTS, "")),
        "intro": writer.block(intro),
        "sections": [(name, writer.block(body)) for name, body in bodies.items() if name != FIGURES],
        "terms": {name: TERMS[name][1] for name in TERMS if name in used},
        "slug": _slug,
    }
    source = files("ppl_vae.reports").joinpath("page.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(source).render(shown)


def plain(text: Any) -> str:
    """A text of the user's in Markdown, on one line, without any marks of its own."""
    return re.sub(r"[\\`*\[\]<>|$#]", r"\\\g<0>", " ".join(str(text).split()))


class _Writer:
    """Turns Markdown into HTML; terms lead to the glossary, at their first place in each block.

    Args:
        used: takes the terms that were met.
    """

    def __init__(self, used: dict[str, str]) -> None:
        self.used, self.here = used, set[str]()
        self.markdown = MarkdownIt("zero").enable(["table", "list", "heading", "fence", "backticks", "emphasis"])
        self.markdown.enable("escape")
        self.markdown.inline.ruler.before("escape", "math", _find_math)
        renderer: Any = self.markdown.renderer
        for kind in ("text", "math", "fence", "code_inline", "table_open", "table_close", "th_open"):
            renderer.rules[kind] = getattr(self, f"_{kind}")

    def block(self, text: str) -> Markup:
        self.here.clear()
        return Markup(self.markdown.render(text))

    def inline(self, text: str) -> Markup:
        self.here.clear()
        return Markup(self.markdown.renderInline(text))

    def _text(self, tokens: Any, index: int, *_: Any) -> str:
        parts = []
        for part, term in split(_joined(tokens[index].content)):
            if term is None or term in self.here:
                parts.append(escape(part))
                continue
            self.here.add(term)
            self.used[term] = part
            link = '<a class="term" href="#term-{}" title="{}">{}</a>'
            parts.append(Markup(link).format(_slug(term), TERMS[term][1], part))
        return "".join(parts)

    def _math(self, tokens: Any, index: int, *_: Any) -> str:
        return _drawn(tokens[index].content)

    def _fence(self, tokens: Any, index: int, *_: Any) -> str:
        return Markup('<pre tabindex="0"><code>{}</code></pre>').format(tokens[index].content)

    def _code_inline(self, tokens: Any, index: int, *_: Any) -> str:
        """Code on the line, whose options are not broken at their hyphens."""
        words = (
            Markup("<span>{}</span>" if word.startswith("-") else "{}").format(word)
            for word in tokens[index].content.split(" ")
        )
        return Markup("<code>{}</code>").format(Markup(" ").join(words))

    def _table_open(self, *_: Any) -> str:
        return '<div class="table" tabindex="0" role="group" aria-label="Table"><table>'

    def _table_close(self, *_: Any) -> str:
        return "</table></div>"

    def _th_open(self, tokens: Any, index: int, *_: Any) -> str:
        right = "right" in str(tokens[index].attrGet("style"))
        return f'<th scope="col"{" class=" + chr(34) + "right" + chr(34) if right else ""}>'


def _find_math(state: Any, silent: bool) -> bool:
    """A rule of Markdown: a formula between dollars."""
    match = re.compile(r"\$([^$\n]+)\$").match(state.src, state.pos)
    if match is None:
        return False
    if not silent:
        state.push("math", "", 0).content = match[1]
    state.pos = match.end()
    return True


@cache
def _drawn(formula: str) -> str:
    """A formula as a small picture on the line, or as it is written where it cannot be drawn."""
    svg = io.BytesIO()
    try:
        with rc_context({"savefig.facecolor": "none"}):
            depth = math_to_image(f"${formula}$", svg, prop=FontProperties(size=11), format="svg", dpi=72)
    except ValueError:
        return Markup("<code>{}</code>").format(formula)
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
    image = '<img class="math" style="vertical-align:-{:.1f}pt" src="{}" alt="{}">'
    return Markup(image).format(float(depth), source, formula)


def _embedded(png: bytes) -> tuple[str, int, int, bool]:
    """A PNG file as a source of an image, its width and height in CSS pixels at 120 dots per inch, if it is opaque."""
    picture = imread(io.BytesIO(png), format="png")
    height, width = (round(side * 0.8) for side in picture.shape[:2])
    opaque = picture.shape[-1] != 4 or bool(picture[0, 0, 3] == 1)
    return "data:image/png;base64," + base64.b64encode(png).decode(), width, height, opaque


def _joined(text: str) -> str:
    """Signs that stay with their numbers, and true ones for those of ASCII."""
    text = text.replace(" ± ", "\N{NO-BREAK SPACE}± ").replace("± ", "±\N{NO-BREAK SPACE}")
    text = text.replace(">= ", "≥\N{NO-BREAK SPACE}").replace("<= ", "≤\N{NO-BREAK SPACE}")
    return re.sub(r"(?<![\w.-])-(?=\d)", "\N{MINUS SIGN}", text)


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text).replace("$", "")


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")
