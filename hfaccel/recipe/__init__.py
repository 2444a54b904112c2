"""Recipes: schema, loading with the origin of each value, targets."""
