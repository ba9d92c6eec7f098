"""The version, where setup can read it without importing torch."""

__version__ = "0.1.0"
