"""Errors of the modeling layer that a user can act on."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration value, key or file that does not fit; the message names it."""


class UninitializedParameter(RuntimeError):
    """A parameter that neither the checkpoint nor `_init_weights` filled."""
