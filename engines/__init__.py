"""Engines: building, running and serving them."""

from dsa_export import interrupt

interrupt.expect()
