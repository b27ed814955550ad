"""Captions find others of their image: caption retrieval accuracy."""

from llm2clip.scores import CaptionRetrieval

EVALUATOR = CaptionRetrieval
NEEDS_IMAGES = False
