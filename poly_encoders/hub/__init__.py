"""Pushing a saved model to the Hub."""
