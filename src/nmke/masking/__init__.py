"""From scores to the neurons that may change."""
