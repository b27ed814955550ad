"""The student: a vision tower and an adaptor, trained on pictures and the rows of a bank."""
