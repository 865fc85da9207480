"""From files to tokenised examples."""
