"""The formats of `export --to`: one file each, found by its name; nothing else knows of them.

A file `my_format.py` here is `--to my-format`. It holds `FORMAT`, a `llm2clip.export.format.Format`.
"""
