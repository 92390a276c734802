"""Andon: visual anomaly detection for the factory line."""

__version__ = "0.1.0"
