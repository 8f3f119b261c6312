"""What a model says: generation, responses, judges."""
