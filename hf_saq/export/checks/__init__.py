"""Verify that a graph predicts what its model predicts, and count what runs in integers."""

from .refusing import ExportCheckError
from .verification import Verification, verify

__all__ = ["ExportCheckError", "Verification", "verify"]
