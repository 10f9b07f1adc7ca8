"""Suites that people report: their prompts, who judges the pictures, and the tables that come of it, as one command."""
