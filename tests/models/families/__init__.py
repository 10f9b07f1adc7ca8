"""Tiny random-weight pipelines of every family, and a worked example of each: its own `__call__`, and a plain loop.

Each file offers the same names (`Family` in common.py says which); import it as `from families import flux`.
"""
