"""The compiled module as files: its sources, how it is built, where it lies. Imports without torch, for setup.py."""
