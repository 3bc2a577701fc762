"""Turns the package's docstrings, which are Markdown in Google's style, into the reStructuredText that Sphinx reads.

Google's sections ("Args:", "Returns:") are left to sphinx.ext.napoleon, which comes after.
"""

import re


_FENCE = re.compile(r"^( *)```(\w*)$")
_OPTION = re.compile(r"^( *)(\w+) \((.*)\):$")
_QUOTE = re.compile(r"^( *)> ?(.*)$")
_INLINE = re.compile(
    r"\[`(?P<reference>~?[\w.]+)`\](?!\()"
    r"|\[(?P<text>[^\]]+)\]\((?P<url>https?://[^)]+)\)"
    r"|(?P<page>(?:docs|benchmarks/results)/\w+)\.md"
    r"|(?P<ticks>`+)(?P<code>.+?)(?P=ticks)",
    re.DOTALL,
)


def to_restructured_text(lines: list[str]) -> list[str]:
    """Converts one docstring, line by line as autodoc gives it.

    Args:
        lines: Without the indentation that all of them share.

    Returns:
        The same text with code blocks, notes, references, and one `py:attribute` for each option of a config, so that
        every option can be linked to and searched for.
    """
    converted: list[str] = []
    paragraph: list[str] = []

    def end_paragraph() -> None:
        if paragraph:
            converted.extend(_inline("\n".join(_with_blank_before_list(paragraph))).split("\n"))
            paragraph.clear()

    lines = _with_names_on_one_line(lines)
    position, in_options, shift = 0, False, 0
    while position < len(lines):
        line = lines[position]
        position += 1
        if fence := _FENCE.match(line):
            end_paragraph()
            indent, language = fence.groups()
            end = next(i for i in range(position, len(lines)) if lines[i].strip() == "```")
            code = [text[len(indent) :] for text in lines[position:end]]
            converted += ["", f"{indent}.. code-block:: {language or 'text'}", ""]
            converted += [f"{indent}    {text}".rstrip() for text in code] + [""]
            position = end + 1
        elif quote := _QUOTE.match(line):
            end_paragraph()
            block = [quote[2]]
            while position < len(lines) and (following := _QUOTE.match(lines[position])):
                block.append(following[2])
                position += 1
            if block[0] == "[!NOTE]":
                in_options = False
                text = _inline("\n".join(block[1:])).split("\n")
                converted += ["", ".. note::", "", *(f"    {part}".rstrip() for part in text), ""]
            else:
                in_options = True
                converted += ["", f".. rubric:: {_inline(' '.join(block))}", ""]
        elif in_options and (option := _OPTION.match(line)):
            end_paragraph()
            shift = len(option[1])
            converted += ["", f".. py:attribute:: {option[2]}", *_type_and_value(option[3]), ""]
        elif in_options and line.startswith(" ") and shift:
            paragraph.append(line[shift:])
        elif line.strip():
            in_options = in_options and line.startswith(" ")
            paragraph.append(line)
        else:
            end_paragraph()
            converted.append("")
    end_paragraph()
    return converted


def _with_names_on_one_line(lines: list[str]) -> list[str]:
    """Napoleon reads the names that share a description, "first, second: ...", from one line."""
    joined: list[str] = []
    for line in lines:
        if joined and re.fullmatch(r" +\w+(, \w+)*,", joined[-1]):
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
    return joined


def _type_and_value(text: str) -> list[str]:
    """Of "`int` or `str`, *optional*, defaults to `8`" the type, and the value where there is one."""
    kind, _, default = text.partition("defaults to")
    types = " | ".join(re.findall(r"`([^`]+)`", kind))
    value = re.search(r"`([^`]+)`", default)
    return [f"    :type: {types}"] + ([f"    :value: {value[1]}"] if value else [])


def _with_blank_before_list(paragraph: list[str]) -> list[str]:
    """In reStructuredText a list that follows a line of text needs a blank line between the two."""
    separated: list[str] = []
    for line in paragraph:
        starts_item = re.match(r"( *)(\*|-|\d+\.) ", line)
        if starts_item and separated and not re.match(r" *(\*|-|\d+\.) ", separated[-1]):
            previous = len(separated[-1]) - len(separated[-1].lstrip())
            if previous <= len(starts_item[1]) and separated[-1].strip():
                separated.append("")
        separated.append(line)
    return separated


def _inline(text: str) -> str:
    pieces, end = [], 0
    for found in _INLINE.finditer(text):
        pieces.append(_escaped(text[end : found.start()]))
        if found["reference"]:
            name = found["reference"]
            markup = f":py:obj:`{name}`" if "." in name else f":py:obj:`~.{name}`"
        elif found["url"]:
            markup = f"`{found['text']} <{found['url']}>`__"
        elif found["page"]:
            markup = f":doc:`{found[0]} </{found['page']}>`"
        else:
            markup = f"``{found['code'].strip()}``"
        # Markup must stand between spaces or punctuation; an escaped space is one that is not shown.
        before, after = text[: found.start()][-1:], text[found.end() :][:1]
        pieces.append(("\\ " if before.isalnum() else "") + markup + ("\\ " if after.isalnum() else ""))
        end = found.end()
    pieces.append(_escaped(text[end:]))
    return "".join(pieces)


def _escaped(text: str) -> str:
    """Escapes what means something in reStructuredText and nothing in these docstrings."""
    text = text.replace("\\", "\\\\").replace("|", "\\|")
    text = re.sub(r"(\w)_(?!\w)", r"\1\\_", text)
    # "*args" and a lone "*"; emphasis stays, and so do bullets.
    emphasis = re.compile(r"(\*\*[^*\s][^*]*\*\*|\*[^*\s][^*]*\*)")
    parts = emphasis.split(text)
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"(?<!\n)(?<!^)(?<!  )\*(?! )|\*(?=\w)", r"\\*", parts[index])
    return "".join(parts)
