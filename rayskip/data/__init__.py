"""Records, file formats, prompt rendering and tokenizing. Does not know models."""
