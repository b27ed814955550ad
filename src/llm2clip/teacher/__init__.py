"""Stage 1: an LLM is made into a caption encoder, and saved as a plain SentenceTransformer folder."""
