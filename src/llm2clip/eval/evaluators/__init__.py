"""What `evaluate` scores: one file each, found by its name; nothing else knows of them.

A file here holds `EVALUATOR`, which takes the samples of a dataset and gives an `llm2clip.protocols.Evaluator`, and
`NEEDS_IMAGES`: False if a text encoder alone is scored, too. They run in the order of their names.
"""
