"""From logits to tokens: random streams, sampling, stopping. Does not know datasets, Ray or scheduling."""
