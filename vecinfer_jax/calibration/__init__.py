"""From text to codebooks and scales: activation statistics, k-means, artefacts."""
