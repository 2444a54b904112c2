"""Text generation without torch: a decoder graph with its cache, the choice of tokens, chats, and text as it grows."""
