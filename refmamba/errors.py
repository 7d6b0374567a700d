"""The errors a user can cause. Each message is one line: what is wrong, in which file or tensor, and what to do.

RefmambaError
├── SchemeError        a scheme's name or file does not parse
├── CheckpointError    a model folder cannot be read
├── HubError           a model cannot be fetched
├── TokenizerError     a tokenizer is missing, broken or does not fit the model
├── DataError          a text, its tokens, a number, or a calibration or task file is wrong
├── BackendError       a backend is unknown, not installed, or fails its start-up probe
└── NonFiniteError     a NaN or an infinity where a code is to be made (SPEC section 1)
"""

LONGEST = 288  # characters of a message: with the program's name before it a line has at most 300


def printable(text: str, longest: int = LONGEST) -> str:
    """A text as one line for a terminal: what cannot be printed is escaped, and of a long one the middle is left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(text) <= longest:
        return text
    tail = (longest - 3) // 3
    return f"{text[: longest - 3 - tail]}...{text[-tail:]}"


class RefmambaError(Exception):
    """Base of all errors that end a command with one line and exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class SchemeError(RefmambaError):
    """A scheme's name or file does not parse."""


class CheckpointError(RefmambaError):
    """A model folder cannot be read."""


class HubError(RefmambaError):
    """A model cannot be fetched from the hub."""


class TokenizerError(RefmambaError):
    """A tokenizer is missing, broken or does not fit the model."""


class DataError(RefmambaError):
    """A text, its tokens, a number, or a calibration or task file is wrong."""


class BackendError(RefmambaError):
    """A backend is unknown, not installed, or fails its start-up probe."""


class NonFiniteError(RefmambaError):
    """A NaN or an infinity where a code is to be made."""
