"""Builders by their short name: everything public of `grr.models.builders`."""

from grr.models.builders import *  # noqa: F403
from grr.models.builders import __all__  # noqa: F401
