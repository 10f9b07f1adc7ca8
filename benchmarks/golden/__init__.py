"""Golden updates: the weights that every algorithm trains to on a tiny model, frozen as numbers (docs/golden.md)."""
