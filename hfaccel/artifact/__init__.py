"""Artifacts on disk: contract, manifest, hashing, verification, publishing."""
