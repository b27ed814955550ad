"""Images and captions find each other, by kind of caption; the score that training picks weights by is the same."""

from llm2clip.scores import Retrieval

EVALUATOR = Retrieval
NEEDS_IMAGES = True
