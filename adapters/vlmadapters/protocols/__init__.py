"""What is trained on, what is tested on, in which table."""
