"""The version of this package, where every other room can read it."""

__version__ = "0.1.0"
