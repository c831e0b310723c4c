"""Fixtures of the room that converts."""

from __future__ import annotations

from tests.convert.conftest import source

__all__ = ["source"]
