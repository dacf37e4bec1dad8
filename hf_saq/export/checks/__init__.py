"""Verify that a graph predicts what its model predicts, and count what runs in integers."""

from .verification import ExportCheckError, verify

__all__ = ["ExportCheckError", "verify"]
