"""Errors of prefixstore: each names the argument or tier, what was expected and what came."""


class StoreError(Exception):
    """Base of every error prefixstore raises."""


class ConfigError(StoreError):
    """A configuration value is unknown, of the wrong type or out of range."""


class TierError(StoreError):
    """A tier could not do what was asked; the store answers with a miss."""


class TierUnavailable(TierError):
    """The tier cannot be reached or opened."""


class TierTimeout(TierError):
    """The tier did not answer before the deadline."""


class TierPartError(TierError):
    """A part of the tier failed where other parts answer: that tells nothing of the tier."""


class TierPartSilent(TierPartError, TierUnavailable):
    """A part of the tier was not asked, for it gave no answer lately where other parts did."""


class TierPartTimeout(TierPartError, TierTimeout):
    """A part of the tier gave no answer before the deadline, where other parts did."""


class TierFull(TierError):
    """The tier has no room for a record, even after evicting what it may."""


class BlockCorrupted(TierError):
    """A record failed verification; it is a miss and is never used."""


class ModelChanged(StoreError, ValueError):
    """The model is not the one any more that the cache was opened with."""


class EngineError(StoreError):
    """An engine could not take a request on; nothing was computed for it."""


class EngineOverloaded(EngineError):
    """As many requests wait as may; try again later."""


class EngineClosed(EngineError):
    """The engine is draining or closed."""
