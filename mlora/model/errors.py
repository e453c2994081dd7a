"""Errors that a user can cause and mend; the command line prints them without a traceback and exits with 2."""


class ModelError(ValueError):
    """A base model that cannot be loaded or wrapped, or an adapter that does not fit it."""


class AdapterFileError(ModelError):
    """An adapter folder that cannot be read: which file, what is wrong, what is allowed."""
