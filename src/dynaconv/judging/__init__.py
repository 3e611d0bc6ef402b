"""Judging: how good a trained network is on a split."""
