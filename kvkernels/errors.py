"""Errors that kvkernels raises beyond ValueError."""


class UnsupportedError(RuntimeError):
    """No kernel serves the case; the message names the feature."""


class UnsupportedAttributeError(UnsupportedError, AttributeError):
    """Something that stands for a tensor has no such attribute; `hasattr` answers False."""
