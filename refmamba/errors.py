"""The errors a user can cause. Each message is one printable line of at most LONGEST characters: what is wrong, in which file
or tensor, and what to do.

RefmambaError
├── FileError                a file cannot be read, whatever it should hold
│   ├── MissingFileError     it is not there
│   ├── UnreadableFileError  it is there, and the system does not let it be read
│   ├── SpecialFileError     it is a folder, a pipe, a device or a socket
│   ├── FileTooLargeError    it is larger than anything that it could rightly be
│   ├── EncodingError        it is not UTF-8
│   └── JSONError            it is not JSON, or JSON too deep or with numbers too long to be read
├── SchemeError              a scheme's name or file does not parse
├── CheckpointError          a model folder cannot be read
│   ├── ForeignModelError    it is another kind of model, which is named, or saved by another program
│   ├── ConfigError          a size or switch in config.json is missing, or not what it must be
│   ├── WeightFileError      a weight file is truncated, or not in its format
│   └── TensorError          a tensor is missing, superfluous, twice there, or of another shape, type or range
├── HubError                 a model cannot be fetched
├── TokenizerError           a tokenizer is missing, broken or does not fit the model
├── DataError                a text, its tokens, a number, or a calibration or task file is wrong
├── BackendError             a backend is unknown, not installed, or fails its start-up probe
└── NonFiniteError           a NaN or an infinity where a code is to be made (SPEC section 1)
"""

LONGEST = 288  # characters of a message: with the program's name before it a line has at most 300


def printable(text: str, longest: int = LONGEST) -> str:
    """A text as one line for a terminal: what cannot be printed is escaped, and a long one is cut.

    Of "FILE: what is wrong" the start of FILE is left out, of any other text the middle.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(text) <= longest:
        return text
    file, colon, words = text.partition(": ")
    room = longest - len(f"...{colon}{words}")
    if colon and longest // 3 < room < len(file):
        return f"...{file[-room:]}{colon}{words}"
    tail = (longest - 3) // 3
    return f"{text[: longest - 3 - tail]}...{text[-tail:]}"


class RefmambaError(Exception):
    """Base of all errors that end a command with one line and exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class FileError(RefmambaError):
    """A file cannot be read, whatever it should hold."""


class MissingFileError(FileError):
    """A file is not there."""


class UnreadableFileError(FileError):
    """A file is there, and the system does not let it be read."""


class SpecialFileError(FileError):
    """A folder, a pipe, a device or a socket where a file is needed."""


class FileTooLargeError(FileError):
    """A file is larger than anything that it could rightly be."""


class EncodingError(FileError):
    """A text file is not UTF-8."""


class JSONError(FileError):
    """A file is not JSON, or JSON too deep or with numbers too long to be read."""


class SchemeError(RefmambaError):
    """A scheme's name or file does not parse."""


class CheckpointError(RefmambaError):
    """A model folder cannot be read."""


class ForeignModelError(CheckpointError):
    """Another kind of model, which the message names, or one that another program saved in its own way."""


class ConfigError(CheckpointError):
    """A size or switch in config.json is missing, or not what it must be."""


class WeightFileError(CheckpointError):
    """A weight file is truncated, or not in its format."""


class TensorError(CheckpointError):
    """A tensor is missing, superfluous, twice there, or of another shape, type or range."""


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
