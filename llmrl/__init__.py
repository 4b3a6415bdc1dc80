"""llmrl: RL post-training of language models that cannot be silently wrong. See README.md."""

__version__ = "0.1.0"
