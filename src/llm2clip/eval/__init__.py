"""Evaluate: retrieval scores of any encoder, and reports of them."""
