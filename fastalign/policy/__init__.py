"""Between sampling and the policy loss, over packed tokens."""
