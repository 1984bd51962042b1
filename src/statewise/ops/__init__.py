"""Operators (being assembled)."""
