"""Time and bytes of each stage against what the machine could do."""
