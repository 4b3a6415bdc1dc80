"""Scores over sampled traces: pass@k and friends. Works on traces from any source."""
