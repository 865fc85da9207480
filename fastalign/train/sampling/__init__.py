"""From prompts to scored samples and their advantages."""
