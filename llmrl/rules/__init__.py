"""Policy-update rules: one file a paper, each ending in factories that return a `Rule`."""
