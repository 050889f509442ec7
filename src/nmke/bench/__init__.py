"""Benchmarks: methods times streams of facts, one record per cell, compared over the same facts."""
