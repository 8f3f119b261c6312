"""The plain definition of every effect; it shares nothing with the engine."""
