"""The named benchmarks: one file each, found by its name; nothing else knows of them.

A file here holds `CARD`, an `llm2clip.eval.card.Card`, and `read`, which takes an `llm2clip.eval.places.Place` and
gives the rows of the benchmark as the protocol has them.
"""
