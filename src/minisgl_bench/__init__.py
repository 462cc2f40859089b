"""Benchmarks of the engine and of its parts, found by `minisgl bench` through an entry point."""
