"""The demo's document and the questions about it."""

from __future__ import annotations

from importlib import resources

QUESTIONS = (
    "When did the Slow Survey begin?",
    "Which town is nearest to the observatory?",
    "How wide is the mirror of the Brannock Reflector?",
)


def asked(question: str) -> str:
    """What the user says: the document, and then the question."""
    document = (resources.files("tierloom") / "configs" / "demo.txt").read_text("utf-8").strip()
    return f"{document}\n\nAnswer from the text above. {question}"
