"""What is trained on: data sets from anywhere, checked, and how their rows become batches."""
