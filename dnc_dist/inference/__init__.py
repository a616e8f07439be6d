"""What a trained model is used for: files of embeddings, an index to search, contact sheets of what was found, an export."""
