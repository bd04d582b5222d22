"""Comparison and measurement."""

from dsa_export import interrupt

interrupt.expect()
