"""A student begins as the model that its tower is half of (`inherit`), and keeps it in training (`keep`)."""
