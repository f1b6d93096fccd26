"""Delivery: what leaves the outbox, when, in which order, and what every kind of trouble does to that."""
