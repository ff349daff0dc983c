"""What is learnt: retrieval or classification."""
