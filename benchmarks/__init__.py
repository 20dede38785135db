"""Benchmark programs: they report ratios against a baseline of the same run and judge nothing."""
