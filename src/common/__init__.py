"""What all rooms use, and what imports none of them."""
