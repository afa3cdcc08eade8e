"""A line of three toy stages with a config tree of its own: what the core's tests run."""
