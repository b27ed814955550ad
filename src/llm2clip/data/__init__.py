"""Data: from what `--data` names to samples, and from where an image lies to its pixels.

source   opens what a source names (`spec`) and reads it, by a table of readers: `tars`, `tables`, `files`
sample   what comes out: where an image lies, and its captions (`columns`) by kind; what is wrong is counted by `bad`
images   any encoded image (`bytes`) as RGB
"""
