"""The five stages, one module each; ``base.py`` holds their shared types."""
