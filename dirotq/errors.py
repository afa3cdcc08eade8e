"""Everything DiRotQ raises on purpose.

A message is one paragraph: what is wrong, what was found, what is allowed, what to do about it.
The command line prints it without a traceback and exits with status 2.
"""


class DirotqError(Exception):
    """Base class of every error that a user can meet and mend."""


class ConfigError(DirotqError):
    """The configuration, or a value in it, cannot be turned into a runnable pipeline."""


class ArtifactError(DirotqError):
    """An artifact is missing, incomplete, damaged, or written by a newer DiRotQ."""


class UnsupportedError(DirotqError):
    """This model, layer, file format or machine is outside of what DiRotQ handles."""


class NumericalError(DirotqError):
    """A computation left the numbers it is defined for; the message names the site."""
