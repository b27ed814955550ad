"""Export: a trained student as a folder that other programs load."""
