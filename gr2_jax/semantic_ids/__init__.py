"""Item text to vectors, vectors to codes, codes to one ID per item."""
