"""The version, where setup can read it without importing torch."""

__version__ = "0.2.0"
