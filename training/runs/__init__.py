"""A run: its arguments, trainer, callbacks, and how it is stopped, gone on with and pushed."""
