"""The miniature: generated images and captions, mini models, and the whole method on them in minutes."""
