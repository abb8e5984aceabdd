"""Mutated files of other people against all that reads them: ``python -m tests.fuzz --help``."""
