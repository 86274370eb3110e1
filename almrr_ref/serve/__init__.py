"""A local page and an HTTP API of one network: judge pictures, move the threshold, watch a folder."""
