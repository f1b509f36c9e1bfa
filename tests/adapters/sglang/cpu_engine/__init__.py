"""Stands in for what SGLang needs of a GPU, so that it runs on a CPU: see `start.py`."""
