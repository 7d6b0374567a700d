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


class RefmambaError(Exception):
    """Base of all errors that end a command with one line and exit status 2."""


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
