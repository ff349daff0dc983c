"""For the pages of the API: the examples at the end of docstrings, which start with ``>>>``, are shown as code.

Loaded by mkdocstrings, see mkdocs.yml; the parser of docstrings knows examples only in a section of their own.
"""

import textwrap
from typing import Any

import griffe


def with_sections(text: str) -> str:
    """A docstring whose paragraphs of examples are sections."""
    parts = text.split("\n\n")
    marked = [f"Examples:\n{textwrap.indent(part, '    ')}" if part.startswith(">>>") else part for part in parts]
    return "\n\n".join(marked)


class DoctestSections(griffe.Extension):
    """Marks the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of an object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = with_sections(obj.docstring.value)
