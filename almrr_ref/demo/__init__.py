"""The procedural demo set and check sets of one's own images: ``python -m almrr_ref.demo``."""
