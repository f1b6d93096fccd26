"""The behaviour of an outbox: run on every implementation that `implementations.py` names."""
