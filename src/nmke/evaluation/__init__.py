"""Measuring edits: protocols, benchmarks, runners."""
