"""What `evaluate` scores: one file each, found by its name; nothing else knows of them.

A file here holds `EVALUATOR`, which takes the samples of a dataset and gives an `llm2clip.protocols.Evaluator`, and
`NEEDS_IMAGES`: False if it also scores a text encoder alone. They run in the order of their names.
"""
