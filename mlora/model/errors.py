"""Errors that a user can cause and mend; the command line prints them without a traceback and exits with 2."""


class ModelError(ValueError):
    """A base model that cannot be loaded or wrapped, or an adapter that does not fit it.

    Attributes:
        unreachable: whether it lies on a hub that cannot be reached from here.
    """

    def __init__(self, message: str, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable


class AdapterFileError(ModelError):
    """An adapter folder that cannot be read: which file, what is wrong, what is allowed."""
