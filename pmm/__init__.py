"""PMM: person re-identification from training to production, with proof."""

__version__ = "0.1.0"
