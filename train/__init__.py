"""Training and evaluation."""

from dsa_export import interrupt

interrupt.expect()
