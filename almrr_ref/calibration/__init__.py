"""What good images teach: features and memory before training; the threshold, and what it promises, after it."""
