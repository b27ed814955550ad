"""The miniature: generated pictures and captions, mini models, and the whole method on them in minutes."""
