"""Measurements behind every speed and memory claim, as ratios against a peer or a limit in the same run."""
