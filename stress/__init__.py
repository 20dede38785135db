"""Stress programs: bounded under pytest, long by option (`python -m stress.NAME --help`)."""
