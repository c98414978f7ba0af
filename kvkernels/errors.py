"""Errors that kvkernels raises beyond ValueError."""


class UnsupportedError(RuntimeError):
    """No kernel serves the case; the message names the feature."""
