"""output: how names and messages are written so that no name can steer a terminal."""

_SHORT = {"\\": r"\\", "\n": r"\n", "\t": r"\t", "\r": r"\r"}


def escape(name: bytes) -> str:
    r"""A name, as one line of printable text that stands for no other name.

    Like `ls -b`, but a space stays a space: a backslash becomes `\\`, a newline `\n`, and every byte of what is not
    printable (C0, C1, invisible and bidirectional marks, unusual spaces) or not UTF-8 its octal form, `\033`.
    """
    return _escaped(name.decode(errors="surrogateescape"), keep=" ")


def printable(text: str) -> str:
    r"""A message of any origin, with its lines and backslashes, but nothing that is not printable."""
    return _escaped(text, keep=" \n\\")


def _escaped(text: str, *, keep: str) -> str:
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        character
        if character in keep or (character.isprintable() and character != "\\")
        else _SHORT.get(character) or _octal(character)
        for character in text
    )


def _octal(character: str) -> str:
    # A lone surrogate stands for one byte that was not UTF-8, as in file names and arguments.
    try:
        encoded = character.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        encoded = character.encode(errors="surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in encoded)
