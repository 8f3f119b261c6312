"""What is asked about: pairs and prompts, published sets, chat templates and tokens, splits."""
