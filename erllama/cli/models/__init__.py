"""Commands about models: `models` lists them, `pull` downloads one, and `fit` compares one with the free memory."""
