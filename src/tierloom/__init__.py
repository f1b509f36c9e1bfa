"""tierloom keeps the KV cache of large language models and gives it back when the same text comes again."""

__version__ = "0.1.0"
