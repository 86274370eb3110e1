"""A command's surroundings: flags and errors, files, checkpoints, the log, several processes."""
