"""What evaluate and predict leave behind: scores.csv, metrics.json, overlays, one HTML page."""
