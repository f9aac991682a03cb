"""Decoders that run through transformers' own modules: those that no family of ours knows."""
