"""A model served over HTTP, in the forms that clients of rerankers and embedders already speak."""
