"""Speech recognition without torch: sound to log-mel features, features to tokens, tokens to text with times."""
