"""The student: a vision tower and an adaptor, trained on images and the rows of a bank."""
