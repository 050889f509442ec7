"""Pictures and reports from the records of runs and benchmarks; nothing here edits, scores or loads a model."""
