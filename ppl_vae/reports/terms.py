"""Terms: a sentence for each word of a report that a student may not know, the only source for pages and glossaries."""

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files

_SOURCE = files("ppl_vae.reports").joinpath("terms.json").read_text("utf-8")
TERMS: Mapping[str, tuple[str, str]] = {name: (how, sentence) for name, (how, sentence) in json.loads(_SOURCE).items()}
"""How each term is written, as a regular expression, and its sentence."""
_ANY = re.compile(rf"(?<![\w-])(?:{'|'.join(f'(?P<t{i}>{how})' for i, (how, _) in enumerate(TERMS.values()))})")


def split(text: str) -> Iterator[tuple[str, str | None]]:
    """Split a text into parts, each with the term that it names, or None."""
    end = 0
    for match in _ANY.finditer(text):
        yield text[end : match.start()], None
        yield match[0], list(TERMS)[int(str(match.lastgroup)[1:])]
        end = match.end()
    yield text[end:], None
