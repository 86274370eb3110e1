"""A watched folder: which files are whole, the journal of what was judged, and the message to another machine."""
