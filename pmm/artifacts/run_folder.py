"""Names of the files in the folder of a training run."""

BEST = "best.pth"
"""The best model so far, without what only training needs."""
LAST = "last.pth"
"""The whole state of the run."""
METRICS_FILE = "metrics.jsonl"
"""A line per epoch."""
CONFIG_FILE = "config.json"
