"""Key statistics: the second moment of keys, its null space, and the cache."""
