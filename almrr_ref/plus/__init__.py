"""What the preset ``plus`` adds to the paper: standardised features, a memory, weighed evidence, varied anomalies."""
